"""Voices, voice files, cloning, the operator's folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from test_codec_encoder import MIMI
from test_reference_audio import GOOD, file_bytes, tone
from test_speaker_encoder import TINY

from qwen_megakernel.codec.encoder import CodecEncoder
from qwen_megakernel.prompt.reference_audio import VoiceError, decode_reference
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder
from qwen_megakernel.prompt.voice import (
    MAX_REF_FRAMES,
    MAX_REF_TEXT,
    Voice,
    VoiceCloner,
    load_voices,
    voice_name_ok,
)
from qwen_megakernel.tts_model import TTSDecoder

EMBEDDING = torch.randn(24, generator=torch.Generator().manual_seed(1))
CODES = torch.randint(0, 2048, (7, 16), generator=torch.Generator().manual_seed(2))


def icl(text: str = "Guten Tag, wie geht's? 你好") -> Voice:
    return Voice.icl(EMBEDDING, CODES, text)


def test_modes():
    assert Voice.preset("Ono_Anna").speaker == "ono_anna"
    voices = [Voice.preset("ryan"), Voice.x_vector(EMBEDDING), icl(), Voice.designed()]
    assert [v.mode for v in voices] == ["preset", "x_vector", "icl", "designed"]
    half = Voice.x_vector(EMBEDDING.bfloat16().requires_grad_())
    assert half.speaker_embedding.dtype == torch.float32
    assert not half.speaker_embedding.requires_grad
    assert Voice.icl(EMBEDDING, CODES, " hello\n").ref_text == "hello"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Voice.preset("../ryan"), "preset"),
        (lambda: Voice.preset(""), "preset"),
        (lambda: Voice(speaker="ryan", speaker_embedding=EMBEDDING), "both are given"),
        (lambda: Voice(ref_codes=CODES, ref_text="a"), "need a speaker embedding"),
        (lambda: Voice(speaker_embedding=EMBEDDING, ref_codes=CODES), "go together"),
        (lambda: Voice(speaker_embedding=EMBEDDING, ref_text="a"), "go together"),
        (lambda: Voice(speaker="ryan", ref_codes=CODES, ref_text="a"), "need a speaker embedding"),
        (lambda: Voice.x_vector(EMBEDDING[None]), "float32 of \\[1, 24\\]"),
        (lambda: Voice.x_vector(EMBEDDING[:0]), "float32 of \\[0\\]"),
        (lambda: Voice.x_vector(EMBEDDING / 0), "not finite"),
        (lambda: Voice(speaker_embedding=EMBEDDING.double()), "float64"),
        (lambda: Voice.icl(EMBEDDING, CODES[:, :15], "a"), "int64 of \\[7, 15\\]"),
        (lambda: Voice.icl(EMBEDDING, CODES[:0], "a"), "0 frames, allowed: 1 to 376"),
        (lambda: Voice.icl(EMBEDDING, CODES[:1].repeat(MAX_REF_FRAMES + 1, 1), "a"), "377 frames"),
        (lambda: Voice.icl(EMBEDDING, CODES + 2048, "a"), "allowed: 0 to 2047"),
        (lambda: Voice.icl(EMBEDDING, CODES.clamp(max=0) + 2048, "a"), "are 2048 to 2048, allowed"),
        (lambda: Voice.icl(EMBEDDING, CODES.clamp(max=0) - 1, "a"), "allowed: 0 to 2047"),
        (lambda: icl(" \n"), "reference text has 0 characters"),
        (lambda: icl("a" * (MAX_REF_TEXT + 1)), "2001 characters, allowed: 1 to 2000"),
        (lambda: icl("\ud83d"), "surrogate"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, match):
    with pytest.raises(VoiceError, match=match):
        make()


@pytest.mark.parametrize("voice", [Voice.x_vector(EMBEDDING), icl()], ids=["x_vector", "icl"])
def test_save_and_load_is_exact(voice, tmp_path):
    path = tmp_path / "v.safetensors"
    voice.save(path)
    loaded = Voice.load(path)
    assert (loaded.mode, loaded.ref_text, loaded.speaker) == (voice.mode, voice.ref_text, None)
    assert torch.equal(loaded.speaker_embedding, voice.speaker_embedding)
    if voice.mode == "icl":
        assert torch.equal(loaded.ref_codes, voice.ref_codes)
    path.unlink()  # nothing stays mapped to the file
    assert loaded.speaker_embedding.sum().isfinite()


@pytest.mark.parametrize("voice", [Voice.preset("ryan"), Voice.designed()])
def test_voices_without_tensors_are_not_saved(voice, tmp_path):
    with pytest.raises(VoiceError, match="is not saved"):
        voice.save(tmp_path / "v.safetensors")


def load_error(path) -> str:
    with pytest.raises(VoiceError) as caught:
        Voice.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_foreign_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    icl().save(path)
    whole = path.read_bytes()
    for keep in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        load_error(path)
    for data in (b"\xff" * 64, b"\x80\x04}q\x00." + bytes(64), GOOD, bytes(4096)):
        path.write_bytes(data)
        load_error(path)
    assert "not a file of up to 1048576" in load_error(tmp_path)
    assert "not a file" in load_error(tmp_path / "missing.safetensors")
    path.write_bytes(bytes(1024 * 1024 + 1))
    assert "not a file of up to" in load_error(path)


META = {"format": "qwen-megakernel-voice", "version": "1", "hidden_size": "24"}


ONLY = {"speaker_embedding": EMBEDDING}
BOTH = {"speaker_embedding": EMBEDDING, "ref_codes": CODES}
TOLD = {"mode": "icl", "ref_text": "a"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        (ONLY, None, "format is None"),
        (ONLY, META | {"mode": "x_vector", "version": "2"}, "version is '2'"),
        (ONLY, META, "stated as"),
        (ONLY, META | {"mode": "preset"}, "stated as"),
        (ONLY, META | {"mode": "x_vector", "hidden_size": "25"}, "stated as"),
        (ONLY, META | {"mode": "x_vector", "ref_text": "a"}, "go together"),
        (ONLY, META | TOLD, "its tensors are not"),
        ({"other": EMBEDDING}, META | {"mode": "x_vector"}, "its tensors are not"),
        ({"speaker_embedding": EMBEDDING * torch.inf}, META | {"mode": "x_vector"}, "not finite"),
        ({"speaker_embedding": EMBEDDING.half()}, META | {"mode": "x_vector"}, "float16"),
        (BOTH, META | {"mode": "x_vector"}, "its tensors are not"),
        (BOTH, META | {"mode": "icl"}, "go together"),
        (BOTH | {"ref_codes": CODES + 9999}, META | TOLD, "allowed: 0 to 2047"),
        (BOTH | {"ref_codes": CODES.int()}, META | TOLD, "int32"),
    ],
)
def test_file_contents_are_checked(tensors, metadata, match, tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    assert match in load_error(path)


def test_file_metadata_is_what_the_format_says(tmp_path):
    """Users keep these files: a change of the format needs a new version."""
    path = tmp_path / "v.safetensors"
    icl("hello").save(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == META | {"mode": "icl", "ref_text": "hello"}
    assert {k: (v["dtype"], v["shape"]) for k, v in header.items()} == {
        "speaker_embedding": ("F32", [24]),
        "ref_codes": ("I64", [7, 16]),
    }


# --- cloning and the folder --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloner() -> VoiceCloner:
    torch.manual_seed(3)
    return VoiceCloner(SpeakerEncoder(TINY), CodecEncoder(MIMI))


def test_clone(cloner):
    x_vector, both = cloner.clone(GOOD), cloner.clone(GOOD, " Hello. ")
    assert (x_vector.mode, both.mode, both.ref_text) == ("x_vector", "icl", "Hello.")
    audio = torch.from_numpy(decode_reference(GOOD))
    assert torch.equal(x_vector.speaker_embedding, cloner.speaker_encoder.embed(audio))
    assert torch.equal(both.speaker_embedding, x_vector.speaker_embedding)
    assert torch.equal(both.ref_codes, cloner.codec_encoder.encode(audio))
    assert both.ref_codes.shape == (19, 16)
    assert cloner.hidden_size == len(x_vector.speaker_embedding) == 24


def test_without_a_codec_encoder_only_the_transcript_is_refused(tiny_base, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_base, folder)
    config = folder / "speech_tokenizer" / "config.json"
    content = json.loads(config.read_text())
    del content["encoder_config"]
    config.write_text(json.dumps(content))
    weights = config.with_name("model.safetensors")
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k.startswith("decoder.")}, weights)
    with TTSDecoder.load(folder, num_slots=1) as tts:
        assert tts.clone_voice(GOOD).mode == "x_vector"
        with pytest.raises(VoiceError, match="has no codec encoder"):
            tts.clone_voice(GOOD, "Hello.")


def test_clone_of_the_longest_and_shortest_reference(cloner):
    assert len(cloner.clone(file_bytes(tone(30, 11_025), 11_025), "a").ref_codes) == 376
    assert len(cloner.clone(file_bytes(tone(1, 11_025), 11_025), "a").ref_codes) == 13


def test_clone_checks_the_text_first(cloner, monkeypatch):
    monkeypatch.setattr("qwen_megakernel.prompt.voice.decode_reference", None)
    with pytest.raises(VoiceError, match="reference text"):
        cloner.clone(GOOD, "")


@pytest.mark.parametrize("name", ["a", "A-b_9", "0", "x" * 64])
def test_good_names(name):
    assert voice_name_ok(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "C:a", "a.b", "a\n", "a\0", " a", "a b", "-a",
     "_a", "ä", "١", "x" * 65, "~", "%2e%2e", "a;b", "$HOME"],
)  # fmt: skip
def test_bad_names(name):
    assert not voice_name_ok(name)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "voices"
    path.mkdir()
    return path


def test_load_voices(folder, cloner):
    icl("saved").save(folder / "saved.safetensors")
    (folder / "plain.wav").write_bytes(file_bytes(tone(1.5, 16_000), 16_000))
    (folder / "Told.FLAC").write_bytes(GOOD)
    (folder / "Told.txt").write_text("\ufeffHello there.\n", encoding="utf-8")
    for ignored in ("README.md", "notes.txt", "._plain.wav", ".hidden.safetensors", "song.mp3"):
        (folder / ignored).write_bytes(b"?")
    (folder / "deeper").mkdir()
    (folder / "deeper/other.wav").write_bytes(b"?")
    (folder / "link.flac").symlink_to("Told.FLAC")
    voices = load_voices(folder, cloner)
    assert {name: voice.mode for name, voice in voices.items()} == {
        "saved": "icl", "plain": "x_vector", "Told": "icl", "link": "x_vector",
    }  # fmt: skip
    assert voices["Told"].ref_text == "Hello there."
    assert torch.equal(voices["saved"].ref_codes, CODES)
    assert "../voices/plain" not in voices


def test_load_voices_of_an_empty_and_of_no_folder(folder, cloner):
    assert load_voices(folder, cloner) == {}
    with pytest.raises(VoiceError, match="not a folder"):
        load_voices(folder / "nothing", cloner)


@pytest.mark.parametrize("name", ["a b.wav", "a.b.flac", "ä.safetensors", "a\nb.wav", "-rf.wav"])
def test_load_voices_refuses_bad_names(name, folder, cloner):
    (folder / name).write_bytes(GOOD)
    with pytest.raises(VoiceError, match="allowed names") as caught:
        load_voices(folder, cloner)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v.wav", "v.safetensors", "v.txt"])
def test_load_voices_refuses_links_that_lead_out(name, folder, cloner, tmp_path):
    outside = tmp_path / "outside"
    if name == "v.safetensors":
        icl().save(outside)
    else:
        outside.write_bytes(GOOD if name == "v.wav" else b"secret")
    if name == "v.txt":
        (folder / "v.wav").write_bytes(GOOD)
    (folder / name).symlink_to(outside)
    with pytest.raises(VoiceError, match=f"{name}: leads out of the folder"):
        load_voices(folder, cloner)


def test_load_voices_refuses_what_is_no_file(folder, cloner):
    (folder / "v.wav").symlink_to("v.wav")
    with pytest.raises(VoiceError, match=r"v\.wav: "):
        load_voices(folder, cloner)
    (folder / "v.wav").unlink()
    (folder / "v.wav").symlink_to("nothing")
    with pytest.raises(VoiceError, match=r"v\.wav: "):
        load_voices(folder, cloner)
    (folder / "v.wav").unlink()
    os.mkfifo(folder / "v.wav")  # reading it would wait for ever
    with pytest.raises(VoiceError, match="not a file"):
        load_voices(folder, cloner)
    (folder / "v.wav").unlink()
    (folder / "v.wav").write_bytes(GOOD)
    (folder / "v.txt").mkdir()
    with pytest.raises(VoiceError, match=r"v\.txt: .*not a file"):
        load_voices(folder, cloner)


def test_load_voices_names_the_bad_file(folder, cloner):
    (folder / "a.wav").write_bytes(GOOD)
    (folder / "b.wav").write_bytes(b"garbage")
    with pytest.raises(VoiceError, match=r"b\.wav: reference audio begins"):
        load_voices(folder, cloner)
    (folder / "b.wav").write_bytes(GOOD)
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VoiceError, match=r"b\.txt: not readable as UTF-8"):
        load_voices(folder, cloner)
    (folder / "b.txt").write_text("  \n")
    with pytest.raises(VoiceError, match=r"b\.wav: reference text"):
        load_voices(folder, cloner)
    (folder / "b.txt").write_text("a" * 100_000)
    with pytest.raises(VoiceError, match=r"b\.txt: too long"):
        load_voices(folder, cloner)
    (folder / "b.txt").unlink()
    (folder / "b.flac").write_bytes(GOOD)
    with pytest.raises(VoiceError, match="second file for the voice 'b'"):
        load_voices(folder, cloner)


def test_load_voices_refuses_another_models_voice(folder, cloner):
    Voice.x_vector(torch.randn(2048)).save(folder / "big.safetensors")
    with pytest.raises(VoiceError, match=r"big\.safetensors: a voice for a model of width 2048.*24"):
        load_voices(folder, cloner)
