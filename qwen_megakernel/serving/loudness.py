"""How loud audio is."""

from __future__ import annotations

import numpy as np

from qwen_megakernel.serving.sound_map import WINDOW_S


class LevelMeter:
    """Measures audio as it comes. The levels do not depend on how it is split into chunks."""

    def __init__(self, sample_rate: int) -> None:
        self._window = round(sample_rate * WINDOW_S)
        self._rest = np.zeros(0, np.float32)

    def add(self, samples: np.ndarray) -> list[float]:
        """The power of each window that a chunk completes: the mean square of its samples.

        `samples`: float32 [n] in [-1, 1], or int16 [n].
        """
        if samples.dtype == np.int16:
            samples = samples.astype(np.float32) / 32_768
        if len(self._rest):
            samples = np.concatenate([self._rest, samples])
        count = len(samples) // self._window
        self._rest = samples[count * self._window :]
        if not count:
            return []
        windows = samples[: count * self._window].reshape(count, self._window)
        power: list[float] = (np.einsum("ij,ij->i", windows, windows) / self._window).tolist()
        return power

    def end_segment(self) -> None:
        """Forget the samples that complete no window: the next chunk is of another segment."""
        self._rest = self._rest[:0]
