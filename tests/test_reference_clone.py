"""A cloned voice is the official package's: the same codes and embedding from the same file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import official
import pytest
import torch
from test_reference_audio import file_bytes
from test_speaker_encoder import speech_like

from qwen_megakernel.tts_model import TTSDecoder

RATES = [
    8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400,
    192_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tiny_base):
    return official.inference.Qwen3TTSModel.from_pretrained(str(tiny_base), dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(tiny_base) -> Iterator[TTSDecoder]:
    with TTSDecoder.load(tiny_base, num_slots=1, dtype="fp32") as tts:
        yield tts


@pytest.mark.parametrize("seconds", [4.0, 1.003])
@pytest.mark.parametrize("rate", RATES)
def test_a_recording_gives_the_official_codes(theirs, ours, rate: int, seconds: float, tmp_path: Path):
    """4 s are whole frames: one sample more is a frame more."""
    path = tmp_path / "reference.wav"
    path.write_bytes(file_bytes(speech_like(round(seconds * rate)).numpy(), rate))
    (expected,) = theirs.create_voice_clone_prompt(ref_audio=str(path), ref_text="Some words.")
    voice = ours.clone_voice(path.read_bytes(), "Some words.")
    assert voice.ref_codes.shape == expected.ref_code.shape
    assert torch.equal(voice.ref_codes, expected.ref_code)
    torch.testing.assert_close(
        voice.speaker_embedding, expected.ref_spk_embedding.float(), rtol=1e-4, atol=1e-5
    )
