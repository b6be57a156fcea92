"""The speaker encoder: log-mel spectrogram and ECAPA-TDNN (https://arxiv.org/abs/2005.07143).

It turns a reference recording into one vector, which becomes a row of the prompt. It runs once for each
voice, in float32, on the device of its weights.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.config import SAMPLE_RATE, SpeakerEncoderConfig

N_FFT = 1024
MEL_HOP = 256
NUM_MELS = 128
_MEL_PAD = (N_FFT - MEL_HOP) // 2
"""Samples reflected at both ends. With them frame k is centred on samples k * MEL_HOP .. (k + 1) *
MEL_HOP."""


def mel_filters() -> np.ndarray:
    """Triangular filters of unit area from 0 Hz to 12 kHz, `[128, 513]` float32.

    The scale is Slaney's (Auditory Toolbox, 1998): linear up to 1 kHz, with 200/3 Hz for each mel, then
    logarithmic, with a factor of 6.4 in 27 mels. It is the default of `librosa.filters.mel`.
    """
    nyquist = SAMPLE_RATE / 2
    bins = np.linspace(0.0, nyquist, N_FFT // 2 + 1)
    top = 15.0 + 27.0 * np.log(nyquist / 1000.0) / np.log(6.4)
    mels = np.linspace(0.0, top, NUM_MELS + 2)
    edges = np.where(mels < 15.0, mels * (200.0 / 3.0), 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))
    low, centre, high = (edges[i : i + NUM_MELS, None] for i in range(3))
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return (np.maximum(triangles, 0.0) * (2.0 / (high - low))).astype(np.float32)


@cache
def _mel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(mel_filters()).to(device), torch.hann_window(N_FFT, device=device)


def log_mel(audio: Tensor) -> Tensor:
    """Natural logarithm of the mel magnitude spectrogram.

    Args:
        audio: `[samples]` float32 at 24 kHz, full scale 1; more than 384 samples.

    Returns:
        `[frames, 128]` float32, `(samples - 256) // 256 + 1` frames, no value below ln(1e-5).
    """
    filters, window = _mel_constants(audio.device)
    padded = F.pad(audio[None, None], (_MEL_PAD, _MEL_PAD), mode="reflect")[0, 0]
    spectrum = torch.stft(padded, N_FFT, MEL_HOP, window=window, center=False, return_complex=True)
    # The small constant is inside the root, because the model was trained on exactly this.
    magnitude = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-9)
    return torch.log((filters @ magnitude).clamp(min=1e-5)).T


def _conv(in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(
        in_channels, out_channels, kernel_size, dilation=dilation, padding="same", padding_mode="reflect"
    )


class _TimeDelayBlock(nn.Module):
    """Dilated convolution over time and ReLU, `[batch, channels, frames]`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels, kernel_size, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class _Res2NetBlock(nn.Module):
    """A chain of channel groups. Each convolution sees its group plus the previous group's output."""

    def __init__(self, channels: int, scale: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.scale = scale
        width = channels // scale
        self.blocks = nn.ModuleList(
            _TimeDelayBlock(width, width, kernel_size, dilation) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *groups = x.chunk(self.scale, dim=1)
        outputs = [first]  # the first group passes unchanged, and is not added to the second
        for block, group in zip(self.blocks, groups, strict=True):
            outputs.append(block(group if len(outputs) == 1 else group + outputs[-1]))
        return torch.cat(outputs, dim=1)


class _SqueezeExcitation(nn.Module):
    """Scales each channel by a gate. The gate is computed from the means of all channels over time."""

    def __init__(self, channels: int, se_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, se_channels)
        self.conv2 = _conv(se_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.conv1(x.mean(dim=2, keepdim=True)))
        return x * torch.sigmoid(self.conv2(gate))


class _SERes2NetBlock(nn.Module):
    """TDNN, Res2Net, TDNN, squeeze-excitation, and the input added."""

    def __init__(
        self, channels: int, config: SpeakerEncoderConfig, kernel_size: int, dilation: int
    ) -> None:
        super().__init__()
        self.tdnn1 = _TimeDelayBlock(channels, channels)
        self.res2net_block = _Res2NetBlock(channels, config.enc_res2net_scale, kernel_size, dilation)
        self.tdnn2 = _TimeDelayBlock(channels, channels)
        self.se_block = _SqueezeExcitation(channels, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class _AttentiveStatsPooling(nn.Module):
    """Mean and standard deviation over time. Each channel has its own attention weights."""

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.tdnn = _TimeDelayBlock(channels * 3, attention_channels)
        self.conv = _conv(attention_channels, channels)

    @staticmethod
    def _stats(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weights * x).sum(dim=2, keepdim=True)
        variance = (weights * (x - mean).square()).sum(dim=2, keepdim=True)
        return mean, variance.clamp(min=1e-12).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        uniform = torch.full_like(x[:, :1], 1.0 / x.shape[2])
        mean, std = (s.expand_as(x) for s in self._stats(x, uniform))
        scores = self.conv(torch.tanh(self.tdnn(torch.cat((x, mean, std), dim=1))))
        return torch.cat(self._stats(x, scores.softmax(dim=2)), dim=1)


class SpeakerEncoder(nn.Module):
    """The speaker encoder of Base checkpoints. Parameter names are theirs without `speaker_encoder.`.

    It has no buffers, so an instance on the meta device is complete after
    `load_state_dict(assign=True)`.
    """

    def __init__(self, config: SpeakerEncoderConfig) -> None:
        """Raises `ValueError` if the channel counts do not fit together."""
        super().__init__()
        _check_geometry(config)
        channels = config.enc_channels
        layers = list(zip(channels, config.enc_kernel_sizes, config.enc_dilations, strict=True))
        self.config = config
        self.min_samples = MEL_HOP * (1 + _max_padding(config))
        """The shortest input, in samples. A reflection needs more frames than it adds."""
        self.blocks = nn.ModuleList([_TimeDelayBlock(config.mel_dim, *layers[0])])
        for width, kernel_size, dilation in layers[1:-1]:
            self.blocks.append(_SERes2NetBlock(width, config, kernel_size, dilation))
        self.mfa = _TimeDelayBlock(sum(channels[1:-1]), *layers[-1])
        self.asp = _AttentiveStatsPooling(channels[-1], config.enc_attention_channels)
        self.fc = _conv(2 * channels[-1], config.enc_dim)

    def forward(self, mels: Tensor) -> Tensor:
        """`[batch, frames, mel_dim]` to `[batch, enc_dim]`."""
        x = mels.transpose(1, 2)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        x = self.mfa(torch.cat(outputs[1:], dim=1))
        return self.fc(self.asp(x)).squeeze(-1)

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """Compute the speaker embedding of one recording.

        Args:
            audio: `[samples]` float32, mono, 24 kHz, on any device.

        Returns:
            `[enc_dim]`, on the device and in the dtype of the weights.

        Raises:
            ValueError: the audio has more than one channel, or is shorter than `min_samples`.
        """
        if audio.dim() != 1 or len(audio) < self.min_samples:
            raise ValueError(
                f"audio has shape {list(audio.shape)}, allowed: [samples], at least {self.min_samples}"
            )
        weight = self.fc.weight
        return self(log_mel(audio.to(weight.device, torch.float32)).to(weight.dtype)[None])[0]


def _max_padding(config: SpeakerEncoderConfig) -> int:
    layers = zip(config.enc_kernel_sizes, config.enc_dilations, strict=True)
    return max((kernel - 1) * dilation // 2 for kernel, dilation in layers)


def _check_geometry(config: SpeakerEncoderConfig) -> None:
    channels = config.enc_channels
    if not len(channels) == len(config.enc_kernel_sizes) == len(config.enc_dilations) >= 3:
        raise ValueError(
            "speaker_encoder_config: enc_channels, enc_kernel_sizes, enc_dilations differ in length"
        )
    if len(set(channels[:-1])) != 1 or sum(channels[1:-1]) != channels[-1]:
        raise ValueError(
            f"speaker_encoder_config: enc_channels {list(channels)}: all but the last must be equal, "
            "and the last the sum of those after the first"
        )
    if channels[0] % config.enc_res2net_scale:
        raise ValueError("speaker_encoder_config: enc_channels is not a multiple of enc_res2net_scale")
    if config.mel_dim != NUM_MELS:
        raise ValueError(f"speaker_encoder_config: mel_dim is {config.mel_dim}, expected {NUM_MELS}")
