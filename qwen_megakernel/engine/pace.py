"""How fast the engine is, as it finds: a tick, a row of a prompt, the voices that it can hold."""

from __future__ import annotations

import time
from threading import Thread

from qwen_megakernel.config import FRAME_S

_WEIGHT = 0.1
"""Of the newest measurement in a mean."""
_MOST = 4.0
"""A tick counts as at most so many times the mean: a pause of the machine is no pace."""
_FIRST_TICK_S = 0.002
_FIRST_ROW_S = 0.0001
_SHARE = 0.95
"""Of the measured rate that is promised."""


class Pace:
    """Means of what ticks have taken."""

    def __init__(self, max_batch: int) -> None:
        """`max_batch`: the streams of a full frame."""
        self._max_batch = max_batch
        self.tick_s = _FIRST_TICK_S
        """Seconds of a tick that launches a frame and prefills nothing."""
        self._row_s = _FIRST_ROW_S
        self._full_s: float | None = None

    def add_tick(self, seconds: float, num_streams: int, num_rows: int) -> None:
        """A tick has launched a frame of so many streams, and prefilled so many rows."""
        if num_rows:
            self._row_s = _mean(self._row_s, max(0.0, seconds - self.tick_s) / num_rows)
        else:
            self.tick_s = _mean(self.tick_s, seconds)
        # Prompts are part of what voices take. A stream more takes no longer than those before it: so a
        # mean that a pause has spoilt is mended also where too few are let in for a full frame.
        at_most_s = seconds * self._max_batch / num_streams
        if num_streams == self._max_batch or (self._full_s is not None and at_most_s < self._full_s):
            self._full_s = _mean(self._full_s or at_most_s, at_most_s)

    def prompt_s(self, num_rows: int) -> float:
        """Seconds that a prompt of so many rows takes."""
        return num_rows * self._row_s

    @property
    def num_voices(self) -> float | None:
        """Voices in real time that full frames can hold; None before any frame was full."""
        return None if self._full_s is None else _SHARE * self._max_batch * FRAME_S / self._full_s


def thread_cpu_s(thread: Thread) -> float:
    """Seconds of CPU time that a thread has taken; 0 where that is not known."""
    ident = thread.ident
    if ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def _mean(mean: float, value: float) -> float:
    return mean + _WEIGHT * (min(value, _MOST * mean) - mean)
