"""The engine's measured speed: a tick, a row of a prompt, and the voices that it can hold."""

from __future__ import annotations

import time
from threading import Thread

from qwen_megakernel.config import FRAME_S

_WEIGHT = 0.1
"""Weight of the newest measurement in a mean."""
_FULL_WEIGHT = 0.02
"""The same for full frames, once fifty are known. A mean of few frames is now and then too low, and the
turns that it lets in then would make all voices run dry."""
_MOST = 4.0
"""A tick counts as at most this many times the mean, because a pause of the machine says nothing about
speed."""
_FIRST_TICK_S = 0.002
_FIRST_ROW_S = 0.0001
_SHARE = 0.93
"""The share of the measured rate that new turns may rely on."""


class Pace:
    """Moving averages of the times of ticks."""

    def __init__(self, max_batch: int) -> None:
        """`max_batch` is the number of streams in a full frame."""
        self._max_batch = max_batch
        self.tick_s = _FIRST_TICK_S
        """Seconds of a tick that launches a frame and prefills nothing."""
        self._row_s = _FIRST_ROW_S
        self._full_s: float | None = None
        self._num_full = 0
        """Measurements in that mean."""

    def add_tick(self, seconds: float, num_streams: int, num_rows: int) -> None:
        """Add a tick that launched a frame of `num_streams` and prefilled `num_rows`."""
        if num_rows:
            self._row_s = _mean(self._row_s, max(0.0, seconds - self.tick_s) / num_rows)
        else:
            self.tick_s = _mean(self.tick_s, seconds)
        # The time of prompts counts as time of voices. One more stream takes no longer than each one
        # before it. So ticks with few streams, too, bring a mean that a pause has spoilt back to normal.
        at_most_s = seconds * self._max_batch / num_streams
        if num_streams == self._max_batch or (self._full_s is not None and at_most_s < self._full_s):
            self._num_full += 1
            weight = max(_FULL_WEIGHT, 1 / self._num_full)
            self._full_s = _mean(self._full_s or self.tick_s, at_most_s, weight)

    def prompt_s(self, num_rows: int) -> float:
        """Seconds that a prompt of `num_rows` takes."""
        return num_rows * self._row_s

    @property
    def num_voices(self) -> float | None:
        """The voices that full frames can serve in real time; None before the first full frame."""
        return None if self._full_s is None else _SHARE * self._max_batch * FRAME_S / self._full_s


def thread_cpu_s(thread: Thread) -> float:
    """Seconds of CPU time that a thread has taken; 0 where that is not known."""
    ident = thread.ident
    if ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def _mean(mean: float, value: float, weight: float = _WEIGHT) -> float:
    return mean + weight * (min(value, _MOST * mean) - mean)
