"""Figures of speech that need no recogniser."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile

from qwen_megakernel.config import SAMPLE_RATE

AUDIBLE_DBFS = -50.0
"""A window of 10 ms counts as sound above this."""
_WINDOW = SAMPLE_RATE // 100
_FULL_SCALE = 0.999


@dataclass(frozen=True, slots=True)
class Sound:
    """Figures of one utterance."""

    duration_s: float
    leading_silence_s: float
    trailing_silence_s: float
    loudness_dbfs: float
    """Root mean square of the audible windows; -120 for silence."""
    clipped: float
    """Share of the samples at full scale."""


def window_levels(samples: np.ndarray) -> np.ndarray:
    """Level of each 10 ms of float32 samples [n] at 24 kHz, in dBFS, at least -120."""
    count = len(samples) // _WINDOW
    power = np.square(samples[: count * _WINDOW].astype(np.float64)).reshape(count, _WINDOW).mean(1)
    return 10 * np.log10(np.maximum(power, 1e-12))


def measure(samples: np.ndarray) -> Sound:
    """Figures of float32 samples [n] at 24 kHz."""
    levels = window_levels(samples)
    audible = np.flatnonzero(levels > AUDIBLE_DBFS)
    seconds = len(samples) / SAMPLE_RATE
    if not len(audible):
        return Sound(seconds, seconds, 0.0, -120.0, 0.0)
    power = 10 ** (levels[audible] / 10)
    return Sound(
        duration_s=seconds,
        leading_silence_s=audible[0] * _WINDOW / SAMPLE_RATE,
        trailing_silence_s=seconds - (audible[-1] + 1) * _WINDOW / SAMPLE_RATE,
        loudness_dbfs=float(10 * np.log10(power.mean())),
        clipped=float(np.mean(np.abs(samples) >= _FULL_SCALE)),
    )


def as_mp3(samples: np.ndarray) -> bytes:
    """Compress float32 samples [n] at 24 kHz to MP3, so that a report can hold many clips."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III",
        bitrate_mode="CONSTANT", compression_level=0.9,
    )  # fmt: skip
    return buffer.getvalue()
