"""Spectrograms for the losses and for the trainer's encoder. All are of 24 kHz audio."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import SAMPLE_RATE

_FLOOR = 1e-2
"""About 50 dB below speech. Anything quieter counts as silence, and all silence is alike."""


@cache
def mel_filters(n_fft: int, mels: int, device: torch.device) -> Tensor:
    """Triangles on the HTK mel scale from 0 to 12 kHz, float32 [mels, n_fft / 2 + 1]."""
    top = 2595 * torch.log10(torch.tensor(1 + SAMPLE_RATE / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, mels + 2) * top / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0).to(device)


@cache
def _window(n_fft: int, device: torch.device) -> Tensor:
    return torch.hann_window(n_fft, device=device)


def stft(audio: Tensor, n_fft: int, hop: int) -> Tensor:
    """Complex [n, n_fft / 2 + 1, samples / hop] of [n, samples]; frame k is centred in hop k."""
    left = (n_fft - hop) // 2
    padded = F.pad(audio[:, None], (left, n_fft - hop - left), mode="reflect")[:, 0]
    window = _window(n_fft, audio.device)
    return torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True)


def log_mel(audio: Tensor, n_fft: int, hop: int, mels: int) -> Tensor:
    """Natural logarithm of mel magnitudes, float32 [n, mels, samples / hop]."""
    magnitude = torch.view_as_real(stft(audio, n_fft, hop)).square().sum(-1).add(1e-9).sqrt()
    return torch.log((mel_filters(n_fft, mels, audio.device) @ magnitude).clamp(min=_FLOOR))


def spectral_distance(made: Tensor, true: Tensor) -> Tensor:
    """Mean absolute difference of log-mels at three resolutions, a scalar.

    The shortest window holds two periods of a low voice. So the exact places of the pulses do not count,
    and the codes need not hold them.
    """
    sizes = ((2048, 480, 128), (1024, 240, 80), (512, 120, 40))
    return sum(F.l1_loss(log_mel(made, *size), log_mel(true, *size)) for size in sizes)
