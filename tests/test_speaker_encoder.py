"""The speaker encoder against the official classes, with random weights."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from qwen_megakernel.config import SpeakerEncoderConfig
from qwen_megakernel.prompt.speaker_encoder import NUM_MELS, SpeakerEncoder, log_mel, mel_filters

TRUE = SpeakerEncoderConfig.from_dict({"enc_dim": 1024, "sample_rate": 24000})
TINY = replace(
    TRUE, enc_dim=24, enc_channels=(16, 16, 16, 16, 48), enc_attention_channels=8, enc_se_channels=8,
    enc_res2net_scale=4,
)  # fmt: skip


def speech_like(samples: int, seed: int = 0) -> torch.Tensor:
    """A gliding harmonic tone with noise and pauses, peak below 1."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 24_000
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 1.3 * t)) / 24_000
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    gate = (np.sin(2 * np.pi * 2.1 * t) > -0.5) * 0.2
    return torch.from_numpy((gate * tone + 0.002 * rng.standard_normal(samples)).astype(np.float32))


def official_mel(audio: torch.Tensor) -> torch.Tensor:
    import official

    mels = official.model.mel_spectrogram(
        audio[None], n_fft=1024, num_mels=128, sampling_rate=24000, hop_size=256, win_size=1024, fmin=0,
        fmax=12000,
    )  # fmt: skip
    return mels[0].T


def pair(config: SpeakerEncoderConfig, seed: int = 0) -> tuple[SpeakerEncoder, torch.nn.Module]:
    """This project's encoder, loaded strictly with the official one's weights, and the official one."""
    import official

    torch.manual_seed(seed)
    theirs = official.model.Qwen3TTSSpeakerEncoder(
        official.model.Qwen3TTSSpeakerEncoderConfig(**asdict(config))
    ).eval()
    with torch.device("meta"):
        ours = SpeakerEncoder(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours, theirs


def test_mel_filters_equal_librosa():
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(sr=24000, n_fft=1024, n_mels=128, fmin=0, fmax=12000)
    ours = mel_filters()
    assert ours.shape == expected.shape == (NUM_MELS, 513)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)
    assert (ours.max(axis=1) > 0).all(), "a filter without any bin"


@pytest.mark.parametrize("samples", [1280, 24_000, 24_001, 50_003])
def test_log_mel_equals_official(samples):
    audio = speech_like(samples)
    ours, expected = log_mel(audio), official_mel(audio)
    assert ours.shape == expected.shape == ((samples - 256) // 256 + 1, 128)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_log_mel_of_silence_is_the_floor():
    floor = log_mel(torch.zeros(24_000))
    torch.testing.assert_close(floor, torch.full_like(floor, math.log(1e-5)))


def test_log_mel_finds_a_tone():
    """By the filter bank alone, 440 Hz is in the filter with the nearest centre."""
    audio = torch.sin(2 * torch.pi * 440 * torch.arange(24_000) / 24_000)
    peak = int(log_mel(audio).mean(0).argmax())
    assert peak == int(mel_filters()[:, round(440 / 24_000 * 1024)].argmax())


@pytest.mark.parametrize("samples", [1280, 24_000, 37_777])
def test_embedding_equals_official(samples):
    ours, theirs = pair(TINY)
    audio = speech_like(samples)
    with torch.no_grad():
        expected = theirs(official_mel(audio)[None])[0]
    embedding = ours.embed(audio)
    assert embedding.shape == (TINY.enc_dim,)
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01, "weights so small that any two embeddings are equal"


def test_embedding_tells_speakers_apart():
    ours, _ = pair(TINY)
    first, second = ours.embed(speech_like(24_000)), ours.embed(speech_like(24_000).flip(0) * 0.1)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.slow
def test_embedding_equals_official_at_the_true_shape():
    ours, theirs = pair(TRUE)
    audio = speech_like(3 * 24_000)
    with torch.no_grad():
        expected = theirs(official_mel(audio)[None])[0]
    torch.testing.assert_close(ours.embed(audio), expected, rtol=1e-4, atol=1e-4)


def test_shortest_input():
    """One frame more than the widest reflection. A second is far longer."""
    encoder = SpeakerEncoder(TINY)
    assert encoder.min_samples == SpeakerEncoder(TRUE).min_samples == 1280
    assert encoder.embed(speech_like(1280)).isfinite().all()
    with pytest.raises(ValueError, match=r"\[1279\].*1280"):
        encoder.embed(speech_like(1279))
    with pytest.raises(ValueError, match=r"\[1, 24000\], allowed"):
        encoder.embed(speech_like(24_000)[None])
    with pytest.raises(RuntimeError):  # `min_samples` prevents this
        encoder(torch.zeros(1, 4, NUM_MELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enc_kernel_sizes": (5, 3, 3, 3)}, "differ in length"),
        ({"enc_channels": (16, 16, 16, 16, 47)}, "the sum"),
        ({"enc_res2net_scale": 3}, "multiple of enc_res2net_scale"),
        ({"mel_dim": 80}, "mel_dim is 80"),
    ],
)
def test_impossible_geometry_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SpeakerEncoder(replace(TINY, **change))
