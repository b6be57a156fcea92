"""Random checkpoints: the official layout to the letter, and lively enough to test with."""

import filecmp
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwen_megakernel.__main__ import main
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.synth.checkpoint import SHAPES, SynthError, tensor_specs, write_checkpoint
from qwen_megakernel.synth.config import root_config, speech_config
from qwen_megakernel.synth.tokenizer import write_tokenizer

MODES = ("base", "custom_voice", "voice_design")
LEAD = "<|im_start|>assistant\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def specs_of(shape: str, mode: str = "base"):
    """Tensor specs of the root file and of the speech tokenizer's file."""
    return tensor_specs(ModelConfig.from_dicts(root_config(shape, mode), speech_config(shape)))


def shapes_of(specs_or_tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in specs_or_tensors.items()}


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def official_model(tiny_base):
    """The official wrapper with the tiny checkpoint loaded, in float32."""
    official = pytest.importorskip("official")
    return official.inference.Qwen3TTSModel.from_pretrained(str(tiny_base), dtype=torch.float32)


# --- layout ---


def test_files_are_those_of_a_release(tiny_base):
    assert files_of(tiny_base) == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "speech_tokenizer/config.json",
        "speech_tokenizer/model.safetensors",
        "speech_tokenizer/preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    }


@pytest.mark.parametrize(
    ("shape", "mode"), [*((s, "base") for s in SHAPES), *(("tiny", m) for m in MODES[1:])]
)
def test_model_tensors_are_the_official_classs(shape, mode):
    official = pytest.importorskip("official")
    config = root_config(shape, mode)
    with torch.device("meta"):
        model = official.model.Qwen3TTSForConditionalGeneration(
            official.model.Qwen3TTSConfig(**json.loads(json.dumps(config)))
        )
    assert shapes_of(specs_of(shape, mode)[0]) == shapes_of(model.state_dict())


@pytest.mark.parametrize("shape", ["tiny", "0.6b"])
def test_speech_tensors_are_the_official_classs(shape):
    official = pytest.importorskip("official")
    config = speech_config(shape)
    with torch.device("meta"):
        model = official.codec.Qwen3TTSTokenizerV2Model(
            official.codec.Qwen3TTSTokenizerV2Config(**json.loads(json.dumps(config)))
        )
    assert shapes_of(specs_of(shape)[1]) == shapes_of(model.state_dict())


def test_only_the_wide_talker_has_a_projection_to_the_predictor():
    name = "talker.code_predictor.small_to_mtp_projection.weight"
    found = {shape: specs_of(shape)[0].get(name) for shape in SHAPES}
    assert {shape: spec and spec.shape for shape, spec in found.items()} == {
        "tiny": None,
        "tiny-1.7b": (128, 192),
        "0.6b": None,
        "1.7b": (1024, 2048),
    }


def test_parameter_counts_of_the_true_shape_are_the_released_ones():
    root, speech = specs_of("0.6b")
    sizes = {name: spec.numel for name, spec in (root | speech).items()}

    def count(prefix: str) -> float:
        return sum(n for name, n in sizes.items() if name.startswith(prefix)) / 1e6

    assert count("talker.model.layers.") == pytest.approx(440.5, abs=0.1)
    assert count("talker.code_predictor.model.layers.") == pytest.approx(78.7, abs=0.1)
    assert count("talker.code_predictor.") == pytest.approx(141.6, abs=0.1)
    assert count("decoder.") == pytest.approx(114.3, abs=0.1)


def test_dtypes_and_note_in_the_files(tiny_base):
    for name, dtype in (("", "BF16"), ("speech_tokenizer/", "F32")):
        with safe_open(tiny_base / f"{name}model.safetensors", "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {dtype}  # noqa: SIM118
            assert file.metadata()["format"] == "pt"
            assert "noise" in file.metadata()["synthetic"]


@pytest.mark.parametrize("mode", MODES)
def test_configuration_is_read_by_ours(mode, request):
    config = ModelConfig.from_folder(request.getfixturevalue(f"tiny_{mode}"))
    assert config.mode == mode
    assert config.size == "0b6"
    assert (config.speaker_encoder is not None) == (mode == "base")
    assert config.talker.language_ids["english"] == 2050
    assert ("beijing_dialect" in config.talker.language_ids) == (mode == "custom_voice")
    assert len(config.talker.speaker_ids) == (9 if mode == "custom_voice" else 0)
    assert len(set(config.talker.speaker_ids.values())) == len(config.talker.speaker_ids)
    dialects = {"dylan": "beijing_dialect", "eric": "sichuan_dialect"} if mode == "custom_voice" else {}
    assert config.talker.speaker_dialects == dialects


# --- the same arguments give the same bytes ---


def test_same_seed_same_bytes_other_seed_other_weights(tiny_base, tmp_path):
    write_checkpoint(tmp_path / "again", shape="tiny", mode="base", seed=0)
    write_checkpoint(tmp_path / "other", shape="tiny", mode="base", seed=1)
    names = sorted(files_of(tiny_base))
    same, _, errors = filecmp.cmpfiles(tiny_base, tmp_path / "again", names, shallow=False)
    assert (same, errors) == (names, [])
    for part in ("", "speech_tokenizer/"):
        ours = load_file(tiny_base / f"{part}model.safetensors")
        other = load_file(tmp_path / f"other/{part}model.safetensors")
        constant = {n for n in ours if n.endswith(".initialized")}
        assert {n for n, t in ours.items() if torch.equal(t, other[n])} == constant


def test_tensors_of_one_shape_differ(tiny_base):
    tensors = load_file(tiny_base / "model.safetensors")
    values = {tuple(t.float().flatten()[:16].tolist()) for t in tensors.values()}
    assert len(values) == len(tensors)


def test_a_tensor_does_not_depend_on_what_else_is_written(tiny_base, tiny_custom_voice):
    base = load_file(tiny_base / "model.safetensors")
    custom = load_file(tiny_custom_voice / "model.safetensors")
    assert base.keys() - custom.keys() == {n for n in base if n.startswith("speaker_encoder.")}
    assert all(torch.equal(base[name], tensor) for name, tensor in custom.items())


def test_large_tensors_are_drawn_in_pieces_without_repeating(monkeypatch, tmp_path):
    monkeypatch.setattr("qwen_megakernel.synth.checkpoint._CHUNK", 1000)
    steps = []
    write_checkpoint(
        tmp_path / "c",
        shape="tiny",
        mode="base",
        progress=lambda done, total: steps.append((done, total)),
    )
    with safe_open(tmp_path / "c/model.safetensors", "pt") as file:
        rows = file.get_tensor("talker.model.text_embedding.weight").float().flatten()
    assert not torch.equal(rows[:1000], rows[1000:2000])
    assert abs(rows.std().item() - 1.0) < 0.01
    assert steps[-1][0] == steps[-1][1]
    assert all(a[0] < b[0] for a, b in itertools.pairwise(steps) if a[1] == b[1])


# --- text ---


@pytest.fixture(scope="module", params=["tiny", "0.6b"])
def tokenizer(request, tiny_base, tmp_path_factory):
    if request.param == "tiny":
        return load_tokenizer(tiny_base), ModelConfig.from_folder(tiny_base)
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny=False)
    return load_tokenizer(folder), ModelConfig.from_dicts(
        root_config("0.6b", "base"), speech_config("0.6b")
    )


def test_template_has_the_lengths_that_the_official_code_cuts(tokenizer):
    encode, config = lambda text: tokenizer[0].encode(text).ids, tokenizer[1]
    lead, tail = encode(LEAD), encode(TAIL)
    assert (len(lead), len(tail), len(encode("<|im_end|>\n"))) == (3, 5, 2)
    assert lead[0] == config.im_start_id
    assert tail[0] == config.im_end_id
    assert tail[2:] == lead
    assert len(encode("<|im_start|>user\n")) == 3
    for text in ("Good morning!", "\nx", "assistant", "今天天气很好"):
        assert encode(LEAD + text + TAIL) == [*lead, *encode(text), *tail]


def test_special_tokens_have_the_ids_of_the_configuration(tokenizer):
    ids, config = tokenizer[0].token_to_id, tokenizer[1]
    assert ids("<|im_start|>") == config.im_start_id
    assert ids("<|im_end|>") == config.im_end_id
    assert ids("<tts_pad>") == config.tts_pad_id
    assert ids("<tts_text_bos>") == config.tts_bos_id
    assert ids("<tts_text_eod>") == config.tts_eos_id
    assert tokenizer[0].encode("<tts_pad>").ids == [config.tts_pad_id]
    assert max(tokenizer[0].get_vocab().values()) < config.talker.text_vocab_size
    if config.tts_pad_id > 2000:  # the true ids
        assert tokenizer[0].encode(LEAD).ids[:2] == [151644, 77091]


@pytest.mark.parametrize(
    "text", ["Hello world, it's 42!", "Größe élève", "今天 오늘 Поезд", "🙂\t\x00 ", "e\u0301"]
)
def test_any_text_survives(tokenizer, text):
    import unicodedata

    tok = tokenizer[0]
    assert tok.decode(tok.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_english_is_compressed(tokenizer):
    text = "Good morning, and thank you for calling."
    assert len(tokenizer[0].encode(text).ids) < len(text) / 2


# --- the official code runs on it, and its numbers are lively ---


def test_official_code_loads_every_tensor(official_model, tiny_base):
    for model, folder in (
        (official_model.model, tiny_base),
        (official_model.model.speech_tokenizer.model, tiny_base / "speech_tokenizer"),
    ):
        stored = load_file(folder / "model.safetensors")
        loaded = model.state_dict()
        assert loaded.keys() == stored.keys()
        assert [n for n, t in stored.items() if not torch.equal(loaded[n], t.float())] == []


def test_official_code_generates(official_model):
    reference = 0.1 * np.random.default_rng(0).standard_normal(9600).astype(np.float32)
    prompt = official_model.create_voice_clone_prompt(ref_audio=(reference, 24000), ref_text="hello")
    (audio,), rate = official_model.generate_voice_clone(
        text="Good morning.", language="english", voice_clone_prompt=prompt, max_new_tokens=4
    )
    assert rate == 24000
    assert len(audio) == 3 * 1920  # the last of four frames of codes has no sound yet
    assert np.isfinite(audio).all()
    codes = prompt[0].ref_code
    assert codes.shape == (5, 16)
    assert len(set(codes.flatten().tolist())) > 40
    assert 0.1 < prompt[0].ref_spk_embedding.square().mean().sqrt() < 2


@torch.inference_mode()
def test_logits_are_spread_and_eos_is_one_of_many(official_model):
    talker = official_model.model.talker
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2048, (1, 40, 16), generator=generator)
    rows = talker.model.codec_embedding(codes[..., 0])
    for group, embedding in enumerate(talker.code_predictor.model.codec_embedding, start=1):
        rows = rows + embedding(codes[..., group])
    words = torch.randint(0, 1000, (1, 40), generator=generator)
    text = talker.text_projection(talker.model.text_embedding(words))
    assert 0.5 < text.std() / rows.std() < 2  # neither side dominates the other
    hidden = talker.model(inputs_embeds=rows + text).last_hidden_state[0]
    logits = talker.codec_head(hidden)
    assert 2 < logits[:, :2048].std(dim=-1).mean() < 4
    allowed = torch.cat([logits[:, :2048], logits[:, 2150:2151]], dim=-1)
    assert allowed.softmax(dim=-1)[:, -1].mean() < 0.01
    predictor = talker.code_predictor
    rows = torch.stack([hidden, talker.model.codec_embedding(codes[0, :, 0])], dim=1)
    hidden = predictor.model(inputs_embeds=predictor.small_to_mtp_projection(rows)).last_hidden_state
    assert 2 < predictor.lm_head[0](hidden[:, -1]).std(dim=-1).mean() < 4


@torch.inference_mode()
def test_waveform_is_neither_silent_nor_clipped_and_every_part_shapes_it(official_model):
    decoder = official_model.model.speech_tokenizer.model.decoder
    codes = torch.randint(0, 2048, (1, 16, 6), generator=torch.Generator().manual_seed(0))
    audio = decoder(codes)
    assert 0.05 < audio.square().mean().sqrt() < 0.3
    assert audio.abs().max() < 1
    assert audio.mean().abs() < 0.03
    parts = (
        "gamma", "layer_scale.scale", "act1.alpha", "act2.beta", "norm.weight", "q_proj.weight",
        "k_proj.weight", "mlp.up_proj.weight", "rvq_rest.vq.layers.14._codebook.embedding_sum",
        "rvq_first.vq.layers.0._codebook.cluster_usage", "dwconv.conv.bias", "block.1.conv.weight",
    )  # fmt: skip
    for part in parts:
        name, tensor = next((n, t) for n, t in decoder.named_parameters() if n.endswith(part))
        kept = tensor.clone()
        tensor.mul_(0.8)
        change = (decoder(codes) - audio).square().mean().sqrt() / audio.square().mean().sqrt()
        tensor.copy_(kept)
        assert change > 1e-3, name


# --- command line and refusals ---


def test_command_writes_and_says_that_it_is_noise(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    assert main(["synth-checkpoint", str(folder), "--type", "custom_voice", "--seed", "3"]) == 0
    assert ModelConfig.from_folder(folder).mode == "custom_voice"
    assert "noise" in capsys.readouterr().out
    assert (
        main(["synth-checkpoint", str(folder), "--shape", "tiny-1.7b"]) == 0
    )  # its own may be replaced
    assert ModelConfig.from_folder(folder).talker.hidden_size == 192


def test_command_refuses_a_folder_with_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["synth-checkpoint", str(tmp_path)]) == 1
    assert "choose a new folder" in capsys.readouterr().err
    assert files_of(tmp_path) == {"thesis.tex"}


def test_real_weights_are_not_overwritten(tmp_path):
    from safetensors.torch import save_file

    save_file({"talker.x": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SynthError, match="no synthetic checkpoint"):
        write_checkpoint(tmp_path, shape="tiny", mode="base")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_interrupted_write_leaves_no_weights_and_can_be_repeated(tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, shape="tiny", mode="base", progress=stop)
    assert files_of(tmp_path) == set()
    write_checkpoint(tmp_path, shape="tiny", mode="base")
    assert len(files_of(tmp_path)) == 10


@pytest.mark.parametrize(("shape", "mode"), [("huge", "base"), ("tiny", "singing")])
def test_unknown_shape_or_mode(tmp_path, shape, mode):
    with pytest.raises(SynthError, match="expected one of"):
        write_checkpoint(tmp_path, shape=shape, mode=mode)


def test_unknown_command_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sing"])
    assert exit_info.value.code == 2
    assert "synth-checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_true_shape_is_written_as_released(base_0_6b):
    assert (base_0_6b / "model.safetensors").stat().st_size == pytest.approx(1.83e9, rel=0.02)
    assert load_tokenizer(base_0_6b).encode(LEAD).ids[:2] == [151644, 77091]
    assert ModelConfig.from_folder(base_0_6b).talker.num_layers == 28
