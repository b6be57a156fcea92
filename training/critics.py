"""Discriminators of the codec's adversarial training: spectra at three resolutions, and periods."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from training.spectra import stft

Features = list[list[Tensor]]
"""The outputs of the layers of each discriminator. The last one is its verdict."""


class _SpectrumCritic(nn.Module):
    """Convolutions over the complex spectrogram."""

    def __init__(self, n_fft: int, hop: int, width: int = 16) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        layers = [nn.Conv2d(2, width, (9, 3), stride=(2, 1), padding=(4, 1))]
        layers += [nn.Conv2d(width, width, (9, 3), stride=(2, 1), padding=(4, 1)) for _ in range(3)]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)]
        self.layers = nn.ModuleList(map(weight_norm, layers))

    def forward(self, audio: Tensor) -> list[Tensor]:
        with torch.autocast(audio.device.type, enabled=False):
            x = torch.view_as_real(stft(audio, self.n_fft, self.hop)).permute(0, 3, 1, 2)
        return _outputs(self.layers, x)


class _PeriodCritic(nn.Module):
    """Convolutions over samples that are a period apart."""

    def __init__(self, period: int, widths: Iterable[int] = (16, 48, 96, 128)) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *widths]
        layers = [nn.Conv2d(a, b, (5, 1), stride=(3, 1), padding=(2, 0)) for a, b in pairwise(sizes)]
        layers.append(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))
        self.layers = nn.ModuleList(map(weight_norm, layers))

    def forward(self, audio: Tensor) -> list[Tensor]:
        x = F.pad(audio, (0, -audio.shape[1] % self.period))
        return _outputs(self.layers, x.unflatten(1, (-1, self.period))[:, None])


def _outputs(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    outputs = []
    for index, layer in enumerate(layers):
        x = layer(x)
        if index + 1 < len(layers):
            x = F.leaky_relu(x, 0.1)
        outputs.append(x)
    return outputs


class Critics(nn.Module):
    """All discriminators. Audio is [n, samples] at 24 kHz."""

    def __init__(self) -> None:
        super().__init__()
        spectra = [_SpectrumCritic(n, n // 4) for n in (2048, 1024, 512)]
        periods = [_PeriodCritic(period) for period in (2, 3, 5, 7, 11)]
        self.critics = nn.ModuleList([*spectra, *periods])
        self.to(memory_format=torch.channels_last)  # three times as fast with so few channels

    def forward(self, audio: Tensor) -> Features:
        """The features of the audio in each discriminator."""
        return [critic(audio) for critic in self.critics]


def critic_loss(made: Features, true: Features) -> Tensor:
    """Least squares: 1 for true audio, 0 for made audio."""
    return sum(
        (1 - t[-1].float()).square().mean() + m[-1].float().square().mean()
        for m, t in zip(made, true, strict=True)
    )


def generator_losses(made: Features, true: Features) -> tuple[Tensor, Tensor]:
    """How far the made audio is from being taken for true, and from the true audio in the inner
    layers."""
    fooled = sum((1 - m[-1].float()).square().mean() for m in made)
    likeness = sum(
        F.l1_loss(m.float(), t.float().detach()) / t.float().abs().mean().detach().clamp(min=1e-3)
        for one, other in zip(made, true, strict=True)
        for m, t in zip(one[:-1], other[:-1], strict=True)
    )
    return fooled, likeness
