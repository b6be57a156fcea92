"""A speaker encoder that is not the checkpoint's: an ONNX file, run by onnxruntime.

Published encoders take either 16 kHz samples [1, n] or 80 log-mel features [1, frames, 80]. The file
says which.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soxr

from qwen_megakernel.config import SAMPLE_RATE

_RATE, _WINDOW, _HOP, _FFT, _MELS = 16_000, 400, 160, 512, 80
_LOW_HZ, _PRE_EMPHASIS = 20.0, 0.97


class IndependentEncoder:
    """Speaker embeddings by an ONNX file."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            ValueError: onnxruntime is missing, or the file takes neither samples nor features.
        """
        if find_spec("onnxruntime") is None:
            raise ValueError("an independent encoder needs onnxruntime: pip install onnxruntime")
        session = import_module("onnxruntime").InferenceSession(
            str(path), providers=["CPUExecutionProvider"]
        )
        self._session, (taken, *_) = session, session.get_inputs()
        self._input, self._rank = taken.name, len(taken.shape)
        if self._rank not in (2, 3):
            raise ValueError(f"{path.name} takes {taken.shape}, allowed: [1, n] or [1, frames, 80]")

    def embed(self, samples: np.ndarray) -> np.ndarray:
        """The embedding [size], of length one, of float32 samples [n] at 24 kHz."""
        samples = soxr.resample(samples, SAMPLE_RATE, _RATE).astype(np.float32)
        taken = samples[None] if self._rank == 2 else features(samples)[None]
        made = self._session.run(None, {self._input: taken})[0].reshape(-1)
        unit: np.ndarray = made / np.linalg.norm(made)
        return unit


def features(samples: np.ndarray) -> np.ndarray:
    """Log-mel features float32 [frames, 80] of samples [n] at 16 kHz, their mean taken off.

    As Kaldi makes them: 25 ms Hamming windows every 10 ms, pre-emphasis, mean of each window taken off.
    """
    count = 1 + max(0, len(samples) - _WINDOW) // _HOP
    padded = np.pad(samples * 32_768.0, (0, max(0, _WINDOW - len(samples))))
    windows = np.stack([padded[i * _HOP : i * _HOP + _WINDOW] for i in range(count)])
    windows = windows - windows.mean(1, keepdims=True)
    before = np.concatenate([windows[:, :1], windows[:, :-1]], 1)
    windows = (windows - _PRE_EMPHASIS * before) * np.hamming(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(windows, _FFT)))
    mels = np.log(np.maximum(power @ _filters().T, np.finfo(np.float32).eps))
    return (mels - mels.mean(0)).astype(np.float32)


def _filters() -> np.ndarray:
    """Triangular filters [80, 257], evenly spaced on the mel scale from 20 Hz to 8 kHz."""

    def mel(hz: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = 1127.0 * np.log(1 + hz / 700)
        return scaled

    low, high = mel(np.array([_LOW_HZ, _RATE / 2]))
    edges = np.linspace(low, high, _MELS + 2)
    bins = mel(np.arange(_FFT // 2 + 1) * _RATE / _FFT)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))
