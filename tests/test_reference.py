"""The official package is the reference: equal checkpoints give equal rows, hidden states and codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import official
import pytest
import torch
from prompt_text import give_text
from torch import Tensor

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.config import GenerationParams, ModelConfig, SamplingParams
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.model.talker import Talker, mrope_tables, rope_tables
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice

TEXT = "Hello there, how are you doing today? It's 1234 fine."
OTHER = "A second text that is quite a bit longer than the first one was, and goes on: and on, and on."
REF_TEXT = "The reference was read aloud."
NUM_FRAMES = 48
GREEDY = GenerationParams(
    talker=SamplingParams(0.0, 0, 1.0, 1.05), predictor=SamplingParams(0.0, 0, 1.0, 1.0)
)


@dataclass
class Both:
    """The official model and this project's on one checkpoint, in one precision."""

    theirs: object
    talker: Talker
    config: ModelConfig
    prompts: PromptBuilder

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Both:
        theirs = official.inference.Qwen3TTSModel.from_pretrained(str(folder), dtype=dtype)
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            talker = Talker(checkpoint.config.talker, checkpoint.config.predictor)
        checkpoint.load("talker.", talker, dtype=dtype)
        # The official package does not clean text.
        prompts = PromptBuilder(talker, checkpoint.config, load_tokenizer(folder), clean_text=False)
        return cls(theirs, talker, checkpoint.config, prompts)

    def backend(self, **options) -> TorchBackend:
        return TorchBackend(self.talker, self.config.talker, self.config.predictor, **options)

    def random_embedding(self, seed: int = 0) -> Tensor:
        return torch.randn(self.config.talker.hidden_size, generator=torch.Generator().manual_seed(seed))

    def official_inputs(self, texts: list[str], *, instruct: str = "", **options) -> dict:
        """The inputs that official `generate` gives its talker: prompt rows and trailing text."""
        captured: dict = {}

        class Captured(Exception):
            pass

        def capture(**kwargs):
            captured.update(kwargs)
            raise Captured

        talker = self.theirs.model.talker
        original, talker.generate = talker.generate, capture
        try:
            self.official_codes(texts, instruct=instruct, **options)
        except Captured:
            return captured
        finally:
            talker.generate = original
        raise AssertionError("the official talker was not called")

    def official_codes(
        self, texts: list[str], *, instruct: str = "", num_frames: int = NUM_FRAMES, **options
    ):
        """Greedy codes and hidden rows of official `generate`."""
        theirs = self.theirs
        ids = theirs._tokenize_texts([theirs._build_assistant_text(text) for text in texts])
        instruct_ids = (
            theirs._tokenize_texts([theirs._build_instruct_text(instruct)]) if instruct else None
        )
        with torch.no_grad():
            return theirs.model.generate(
                input_ids=ids,
                instruct_ids=instruct_ids,
                do_sample=False,
                subtalker_dosample=False,
                max_new_tokens=num_frames + 1,
                **options,
            )

    def clone_prompt(self, count: int = 1, *, icl: bool = False, frames: int = 9) -> dict:
        """Arguments of official `generate` for a cloned voice, the same for each text."""
        item = official.inference.VoiceClonePromptItem(
            ref_code=self.ref_codes(frames) if icl else None,
            ref_spk_embedding=self.random_embedding(),
            x_vector_only_mode=not icl,
            icl_mode=icl,
            ref_text=REF_TEXT if icl else None,
        )
        theirs = self.theirs
        ref_ids = theirs._tokenize_texts([theirs._build_ref_text(REF_TEXT)])[0] if icl else None
        return {
            "voice_clone_prompt": theirs._prompt_items_to_voice_clone_prompt([item] * count),
            "ref_ids": [ref_ids] * count,
        }

    @staticmethod
    def ref_codes(frames: int) -> Tensor:
        return torch.randint(0, 2048, (frames, 16), generator=torch.Generator().manual_seed(1))

    def voice(self, *, icl: bool = False, frames: int = 9) -> Voice:
        if icl:
            return Voice.icl(self.random_embedding(), self.ref_codes(frames), REF_TEXT)
        return Voice.x_vector(self.random_embedding())


@pytest.fixture(scope="module")
def base(tiny_base):
    return Both.load(tiny_base)


@pytest.fixture(scope="module")
def wide(tiny_base_1_7b):
    return Both.load(tiny_base_1_7b)


@pytest.fixture(scope="module")
def preset(tiny_custom_voice):
    return Both.load(tiny_custom_voice)


@pytest.fixture(scope="module")
def design(tiny_voice_design):
    return Both.load(tiny_voice_design)


def assert_same_rows(both: Both, prompt, theirs: dict, text: str = TEXT) -> None:
    give_text(both.prompts, prompt, text)
    rows = prompt.rows()
    expected = theirs["inputs_embeds"][0]
    assert rows.shape == expected.shape
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    trailing = theirs["trailing_text_hidden"][0]
    for row in [*trailing, both.prompts.pad_row, both.prompts.pad_row]:
        torch.testing.assert_close(prompt.next_text_row(), row, rtol=1e-4, atol=1e-5)
        prompt.advance()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("language", ["auto", "english", "Chinese", "japanese"])
def test_x_vector_rows(base, language, streaming):
    theirs = base.official_inputs(
        [TEXT], languages=[language], non_streaming_mode=not streaming, **base.clone_prompt()
    )
    prompt = base.prompts.open(base.voice(), language, streaming=streaming)
    assert_same_rows(base, prompt, theirs)


def test_every_language_of_the_checkpoint(base):
    for language in base.config.talker.languages:
        theirs = base.official_inputs(["Hi."], languages=[language], **base.clone_prompt())
        assert_same_rows(base, base.prompts.open(base.voice(), language), theirs, "Hi.")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("frames", [2, 9, 60])
def test_icl_rows_for_references_shorter_and_longer_than_the_text(base, frames, streaming):
    theirs = base.official_inputs(
        [TEXT],
        languages=["english"],
        non_streaming_mode=not streaming,
        **base.clone_prompt(icl=True, frames=frames),
    )
    prompt = base.prompts.open(base.voice(icl=True, frames=frames), "english", streaming=streaming)
    assert_same_rows(base, prompt, theirs)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("speaker", "language"),
    [
        ("vivian", "english"),
        ("Dylan", "auto"),
        ("dylan", "chinese"),
        ("eric", "english"),
        ("eric", "Auto"),
    ],
)
def test_preset_rows_and_dialects(preset, speaker, language, streaming):
    theirs = preset.official_inputs(
        [TEXT], languages=[language], speakers=[speaker], non_streaming_mode=not streaming
    )
    prompt = preset.prompts.open(Voice.preset(speaker), language, streaming=streaming)
    assert_same_rows(preset, prompt, theirs)


@pytest.mark.parametrize("instruct", ["", "A calm, low voice."])
def test_voice_design_rows(design, instruct):
    theirs = design.official_inputs(
        [TEXT], instruct=instruct, languages=["english"], non_streaming_mode=True
    )
    prompt = design.prompts.open(Voice.designed(), "english", instruct=instruct)
    assert_same_rows(design, prompt, theirs)


def test_no_speaker_on_a_base_checkpoint(base):
    theirs = base.official_inputs([TEXT], languages=["english"])
    assert_same_rows(base, base.prompts.open(Voice.designed(), "english"), theirs)


def decode_all(both: Both, backend: TorchBackend, texts: list[str], language: str, num_frames: int):
    """Greedy frames of several texts at once, in slots in reverse order."""
    prompts, slots = [], list(reversed(range(len(texts))))
    for slot, text in zip(slots, texts, strict=True):
        prompt = both.prompts.open(both.voice(), language)
        give_text(both.prompts, prompt, text)
        backend.prefill(slot, prompt.rows(), GREEDY)
        prompts.append(prompt)
    frames, text_rows = [], torch.zeros(len(texts), both.config.talker.hidden_size)
    for _ in range(num_frames):
        frames.append(backend.decode_frame(slots, text_rows))
        text_rows = torch.stack([p.next_text_row() for p in prompts])
        for prompt in prompts:
            prompt.advance()
    return frames


def until_eos(codes: Tensor, eos: int) -> Tensor:
    ends = (codes[:, 0] == eos).nonzero()
    return codes[: ends[0, 0]] if len(ends) else codes


def assert_same_speech(both: Both, texts: list[str], num_frames: int) -> None:
    codes, hidden = both.official_codes(
        texts, languages=["english"] * len(texts), num_frames=num_frames, **both.clone_prompt(len(texts))
    )
    backend = both.backend(num_slots=max(4, len(texts)), max_positions=256)
    frames = decode_all(both, backend, texts, "english", num_frames)
    for i in range(len(texts)):
        ours = until_eos(torch.stack([f.codes[i] for f in frames]), both.config.talker.codec_eos_id)
        assert len(codes[i]) > num_frames // 2, "the reference ended too soon to say anything"
        assert torch.equal(ours, codes[i][: len(ours)])
        assert len(ours) == len(codes[i])
        rows = torch.stack([f.hidden[i] for f in frames])[: len(ours)]
        scale = hidden[i].abs().max()
        assert (rows - hidden[i]).abs().max() < 1e-4 * scale


def test_greedy_codes_and_hidden_rows(base):
    assert_same_speech(base, [TEXT], NUM_FRAMES)


@pytest.mark.slow
def test_greedy_codes_of_a_batch(base):
    assert_same_speech(base, [TEXT, OTHER, "Hi there, you."], NUM_FRAMES)


@pytest.mark.slow
def test_greedy_codes_with_a_projection_to_the_predictor(wide):
    assert_same_speech(wide, [TEXT], NUM_FRAMES)


def test_logits_of_talker_and_predictor(base):
    """The heads, compared on the hidden rows. Greedy codes alone would hide a wrong scale."""
    backend = base.backend(num_slots=1, max_positions=64)
    frame = decode_all(base, backend, [TEXT], "english", 1)[0]
    theirs = base.theirs.model.talker
    with torch.no_grad():
        logits = theirs.codec_head(frame.hidden)
        codes = frame.codes
        expected, _ = theirs.forward_sub_talker_finetune(codes, frame.hidden)
    torch.testing.assert_close(frame.talker_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frame.predictor_logits, expected, rtol=1e-4, atol=1e-4)


def forced_logits(both: Both, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits here: talker [frames, vocabulary], predictor [frames, 15, vocabulary]."""
    backend = both.backend(num_slots=1, max_positions=128)
    prompt = both.prompts.open(both.voice(), "english")
    give_text(both.prompts, prompt, TEXT)
    backend.prefill(0, prompt.rows(), GREEDY)
    talker, predictor, text_row = [], [], torch.zeros(both.config.talker.hidden_size)
    for frame in codes:
        out = backend.decode_frame([0], text_row[None], forced_codes=frame[None])
        talker.append(out.talker_logits[0])
        predictor.append(out.predictor_logits[0])
        text_row = prompt.next_text_row()
        prompt.advance()
    return torch.stack(talker), torch.stack(predictor)


def official_forced_logits(both: Both, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The official model's teacher-forced logits, from one pass over prompt and frames."""
    inputs = both.official_inputs([TEXT], languages=["english"], **both.clone_prompt())
    talker = both.theirs.model.talker
    trailing = inputs["trailing_text_hidden"][0]
    pad = inputs["tts_pad_embed"][0]
    text = torch.cat([trailing, pad.expand(max(0, len(codes) - len(trailing)), -1)])[: len(codes)]
    embeddings = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
    summed = torch.stack([embed(codes[:, i]) for i, embed in enumerate(embeddings)], 1).sum(1)
    rows = torch.cat([inputs["inputs_embeds"][0], (summed + text)[:-1]])
    with torch.no_grad():
        hidden = talker.model(inputs_embeds=rows[None]).last_hidden_state[0, -len(codes) :]
        predictor, _ = talker.forward_sub_talker_finetune(codes, hidden)
        return talker.codec_head(hidden).float(), predictor.float()


@pytest.mark.slow
def test_bf16_is_no_further_from_fp32_than_the_official_bf16(base, tiny_base):
    codes = torch.randint(0, 2048, (24, 16), generator=torch.Generator().manual_seed(2))
    half = Both.load(tiny_base, torch.bfloat16)
    exact = official_forced_logits(base, codes)
    for ours, truth in zip(forced_logits(base, codes), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    theirs = official_forced_logits(half, codes)
    for ours, other, truth in zip(forced_logits(half, codes), theirs, exact, strict=True):
        error, allowed = (ours - truth).norm(), (other - truth).norm()
        assert 0 < error <= 1.25 * allowed, f"{error:.3f} against {allowed:.3f}"


def test_three_equal_axes_are_plain_rope(base):
    positions = torch.arange(100)
    plain = rope_tables(base.config.talker, positions)
    for ours, expected in zip(
        mrope_tables(base.config.talker, positions.expand(3, -1)), plain, strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_different_axes_are_the_official_interleaving(base):
    config, generator = base.config.talker, torch.Generator().manual_seed(0)
    positions = torch.randint(0, 50, (3, 7), generator=generator)
    q = torch.randn(1, 2, 7, config.head_dim, generator=generator)
    cos, sin = rope_tables(config, positions[:, None])
    expected, _ = official.model.apply_multimodal_rotary_pos_emb(
        q, q, cos, sin, list(config.mrope_section), True
    )
    cos, sin = mrope_tables(config, positions)
    rotated = torch.cat([-q[..., config.head_dim // 2 :], q[..., : config.head_dim // 2]], -1)
    torch.testing.assert_close(q * cos + rotated * sin, expected)


@pytest.mark.slow
def test_true_shape_prefill_and_four_frames(base_0_6b):
    assert_same_speech(Both.load(base_0_6b), [TEXT], 4)


def sampled(both: Both, backend: TorchBackend, slots: list[int], seeds: list[int], num_frames: int):
    """Default-sampled codes [n, frames, 16] of the same prompt under several seeds."""
    prompts = []
    for slot, seed in zip(slots, seeds, strict=True):
        prompt = both.prompts.open(both.voice(), "english")
        give_text(both.prompts, prompt, TEXT)
        backend.prefill(slot, prompt.rows(), GenerationParams(seed=seed))
        prompts.append(prompt)
    codes, text_rows = [], torch.zeros(len(slots), both.config.talker.hidden_size)
    for _ in range(num_frames):
        codes.append(backend.decode(slots, text_rows))
        text_rows = torch.stack([p.next_text_row() for p in prompts])
        for prompt in prompts:
            prompt.advance()
    for slot in slots:
        backend.release(slot)
    return torch.stack(codes, dim=1)


@pytest.mark.slow
def test_same_seed_gives_the_same_codes_in_any_company(base):
    backend = base.backend(num_slots=12, max_positions=128)
    alone = sampled(base, backend, [0], [5], 24)[0]
    assert torch.equal(sampled(base, backend, [11], [5], 24)[0], alone), "another slot"
    seeds = [9, 1, 5, 2, 3, 4, 6, 5]
    together = sampled(base, backend, [3, 4, 9, 1, 2, 0, 7, 6], seeds, 24)
    assert len(seeds) == backend.max_batch
    assert torch.equal(together[2], alone), "among seven others"
    assert torch.equal(together[7], alone), "among seven others, last row"
    assert not torch.equal(together[0], alone), "another seed must differ"


def test_a_stream_joins_and_leaves_without_touching_others(base):
    backend = base.backend(num_slots=3, max_positions=128)
    alone = sampled(base, backend, [0], [7], 16)[0]
    prompt = base.prompts.open(base.voice(), "english")
    give_text(base.prompts, prompt, TEXT)
    rows, hidden = prompt.rows(), base.config.talker.hidden_size
    backend.prefill(0, rows, GenerationParams(seed=7))
    codes, text_row = [], torch.zeros(hidden)
    for frame in range(16):
        if frame == 4:
            backend.prefill(2, rows[:5], GenerationParams(seed=8))
        if frame == 9:
            backend.release(2)
        slots = [2, 0] if 4 <= frame < 9 else [0]
        both_rows = torch.stack([torch.zeros(hidden)] * (len(slots) - 1) + [text_row])
        codes.append(backend.decode(slots, both_rows)[-1])
        text_row = prompt.next_text_row()
        prompt.advance()
    assert torch.equal(torch.stack(codes), alone)


def test_injected_noise_replaces_the_draws(base):
    backend = base.backend(num_slots=2, max_positions=64)
    row = torch.zeros(1, base.config.talker.hidden_size)
    noise = torch.full((1, 16, 3072), -1e9)
    noise[0, :, 17] = 0.0  # would win if it were not cut off
    wide_open = SamplingParams(1.0, 0, 1.0, 1.0)
    params = GenerationParams(talker=wide_open, predictor=wide_open)
    backend.prefill(0, base.prompts.pad_row[None], params)
    assert backend.decode([0], row, noise).tolist() == [[17] * 16]


def test_eos_only_after_the_minimum_and_control_codes_never(base):
    eos, vocab = base.config.talker.codec_eos_id, base.config.talker.vocab_size
    backend = base.backend(num_slots=1, max_positions=64)
    row, noise = torch.zeros(1, base.config.talker.hidden_size), torch.zeros(1, 16, vocab)
    noise[0, 0, vocab - 1024 :] = 1e6  # control codes would win
    noise[0, 0, eos] = 1e5
    wide_open = SamplingParams(1.0, 0, 1.0, 1.0)
    params = GenerationParams(talker=wide_open, predictor=wide_open, min_frames=2)
    backend.prefill(0, base.prompts.pad_row[None], params)
    first = [int(backend.decode([0], row, noise)[0, 0]) for _ in range(3)]
    assert first[0] < 2048
    assert first[1] < 2048
    assert first[2] == eos


def test_a_wider_frame_decodes_the_same_and_one_too_wide_is_refused(base):
    narrow, wide = (base.backend(max_batch=n, max_positions=64) for n in (2, 11))
    assert (narrow.num_slots, wide.num_slots) == (2, 11)
    seeds = list(range(11))
    together = sampled(base, wide, seeds, seeds, 3)
    assert torch.equal(sampled(base, narrow, [0, 1], seeds[:2], 3), together[:2])
    row = torch.zeros(3, base.config.talker.hidden_size)
    with pytest.raises(ValueError, match="3 slots in a frame, allowed: 1 to 2"):
        narrow.decode([0, 1, 2], row)
    with pytest.raises(ValueError, match="max_batch is 0, allowed: at least 1"):
        base.backend(max_batch=0)


def test_wrong_calls_are_named(base):
    backend = base.backend(num_slots=2, max_positions=4)
    hidden = base.config.talker.hidden_size
    row = torch.zeros(1, hidden)
    with pytest.raises(ValueError, match="slot 0 is not in use"):
        backend.decode([0], row)
    with pytest.raises(ValueError, match="slot is 2, allowed: 0 to 1"):
        backend.prefill(2, row, GREEDY)
    with pytest.raises(ValueError, match="4 rows, allowed: 1 to 3"):
        backend.prefill(0, torch.zeros(4, hidden), GREEDY)
    backend.prefill(0, torch.zeros(3, hidden), GREEDY)
    with pytest.raises(ValueError, match="slot 0 is in use"):
        backend.prefill(0, row, GREEDY)
    with pytest.raises(ValueError, match="repeat"):
        backend.decode([0, 0], row.expand(2, -1))
    with pytest.raises(ValueError, match="text_rows is"):
        backend.decode([0], row[0])
    backend.decode([0], row)
    backend.decode([0], row)
    with pytest.raises(ValueError, match="slot 0 is full"):
        backend.decode([0], row)
    backend.release(0)
    with pytest.raises(ValueError, match="slot 0 is not in use"):
        backend.release(0)
