"""A cloned voice equals the official package's: one file gives the same codes, embedding and sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from slow_cases import slow_after
from test_reference_audio import file_bytes
from test_speaker_encoder import speech_like

from qwen_megakernel import GenerationParams, SamplingParams
from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.engine.reference_states import official_context
from qwen_megakernel.tts_model import TTSDecoder

RATES = [
    8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400,
    192_000,
]  # fmt: skip
NUM_FRAMES = 24
GREEDY = GenerationParams(
    talker=SamplingParams(0.0, 0, 1.0, 1.05),
    predictor=SamplingParams(0.0, 0, 1.0, 1.0),
    max_frames=NUM_FRAMES,
    guards=Guards(repeat_frames=0, silence_s=0),
)


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
    """4 s are whole frames, so one more sample is one more frame."""
    path = tmp_path / "reference.wav"
    path.write_bytes(file_bytes(speech_like(round(seconds * rate)).numpy(), rate))
    (expected,) = theirs.create_voice_clone_prompt(ref_audio=str(path), ref_text="Some words.")
    voice = ours.clone_voice(path.read_bytes(), "Some words.")
    assert voice.ref_codes.shape == expected.ref_code.shape
    assert torch.equal(voice.ref_codes, expected.ref_code)
    torch.testing.assert_close(
        voice.speaker_embedding, expected.ref_spk_embedding.float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("seconds", "streaming"), slow_after(1, [(1.0, True), (1.0, False), (29.9, True), (29.9, False)])
)
def test_a_clone_in_context_sounds_as_the_official_one(theirs, ours, seconds, streaming, tmp_path):
    """The official codec decodes the reference before the speech, and drops the reference's samples."""
    path, text = tmp_path / "reference.wav", "Hello there, how are you doing today?"
    path.write_bytes(file_bytes(speech_like(round(seconds * 24_000)).numpy(), 24_000))
    prompt = theirs.create_voice_clone_prompt(ref_audio=str(path), ref_text="Some words.")
    (expected,), _ = theirs.generate_voice_clone(
        text=text,
        language="English",
        voice_clone_prompt=prompt,
        non_streaming_mode=not streaming,
        do_sample=False,
        subtalker_dosample=False,
        repetition_penalty=1.05,
        max_new_tokens=NUM_FRAMES + 1,
    )
    voice = ours.clone_voice(path.read_bytes(), "Some words.")
    options = {"language": "english", "streaming": streaming, "params": GREEDY}
    for _ in range(2):  # the second turn copies what the first one prepared
        samples = ours.synthesize(text, voice, **options)
        assert len(samples) == NUM_FRAMES * HOP
        assert len(expected) - len(samples) in (0, 1), "the official cut rounds"
        assert np.abs(samples - expected[-len(samples) :]).max() < 1e-4


@pytest.mark.slow
def test_a_reference_is_decoded_once_a_voice(ours, recording, monkeypatch):
    decoded = []
    decode = ours._engine._codec.state_after
    monkeypatch.setattr(
        ours._engine._codec, "state_after", lambda codes: (decoded.append(len(codes)), decode(codes))[1]
    )
    voices = [ours.clone_voice(recording.read_bytes(), "Some words.") for _ in range(2)]
    for voice in (*voices, *voices, voices[0]):
        ours.synthesize("Hi.", voice, params=GREEDY)
    assert decoded == [len(voice.ref_codes) for voice in voices]


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (299, 299), (300, 25), (374, 99)])
def test_of_a_long_reference_the_official_context_is_decoded(frames, kept):
    codes = torch.arange(frames)[:, None].expand(-1, 16)
    assert official_context(codes)[:, 0].tolist() == list(range(frames - kept, frames))
