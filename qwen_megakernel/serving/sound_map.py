"""Where a segment's audio has sound: words are said there and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

WINDOW_S = 0.01
"""Seconds of a level."""
PAUSE_S = 0.15
"""Silence of so many seconds is a pause. Within a word, before a `t` for instance, it is shorter."""
_SOFTEST = 10**-3.0
"""What has less than this part of the loudest sound's power, 30 dB, is silence."""
_FLOOR = 10**-6.0
"""Power below which all is silence: -60 dBFS."""
_PAUSE = round(PAUSE_S / WINDOW_S)
_ROUNDING = 1e-3
"""Of windows."""


class SoundMap:
    """The stretches of sound of one segment, which grow as its audio comes.

    Seconds of sound leave out the silence before the first stretch, after the last, and the pauses.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._num_seen = 0
        """Windows that are in the stretches."""
        self._loudest = 0.0
        self._stretches: list[list[int]] = []
        """Begin and end of each, in windows."""

    def add(self, levels: Iterable[float]) -> None:
        """More audio: the power of each window, the mean square of its samples."""
        self._levels.extend(levels)

    def fill(self, duration_s: float) -> None:
        """Count all of so many seconds as sound."""
        self._stretches = [[0, round(duration_s / WINDOW_S)]]
        self._num_seen = len(self._levels)

    @property
    def duration_s(self) -> float:
        """Seconds of audio, silence included."""
        return len(self._levels) * WINDOW_S

    @property
    def sound_s(self) -> float:
        """Seconds of sound."""
        return sum(end - begin for begin, end in self._found()) * WINDOW_S

    @property
    def pauses(self) -> list[tuple[float, float]]:
        """For each pause that is over: the seconds of sound before it, and its own."""
        found, sound = [], 0
        for (begin, end), (following, _) in pairwise(self._found()):
            sound += end - begin
            found.append((sound * WINDOW_S, (following - end) * WINDOW_S))
        return found

    def begins_at(self, sound_s: float) -> float:
        """When that goes on which has lasted so many seconds of sound, in seconds of the segment.

        After a pause, if it has lasted up to the pause.
        """
        return self._at(sound_s, -_ROUNDING)

    def ends_at(self, sound_s: float) -> float:
        """When that ends which lasts so many seconds of sound, in seconds of the segment.

        Before a pause, if it lasts up to the pause.
        """
        return self._at(sound_s, _ROUNDING)

    def _at(self, sound_s: float, slack: float) -> float:
        rest, windows = max(0.0, sound_s / WINDOW_S), 0.0
        for begin, end in self._found():
            windows = begin + min(rest, end - begin)
            if rest < end - begin + slack:
                break
            rest -= end - begin
        return windows * WINDOW_S

    def _found(self) -> list[list[int]]:
        """The stretches, up to date."""
        new = self._levels[self._num_seen :]
        if new and max(new) > self._loudest:  # what was sound may be silence beside it
            self._loudest, self._num_seen = max(new), 0
            self._stretches.clear()
            new = self._levels
        threshold = max(_FLOOR, self._loudest * _SOFTEST)
        for window, level in enumerate(new, self._num_seen):
            if level > threshold:
                self._add_sound(window)
        self._num_seen = len(self._levels)
        return self._stretches

    def _add_sound(self, window: int) -> None:
        if self._stretches and window - self._stretches[-1][1] < _PAUSE:
            self._stretches[-1][1] = window + 1
        else:
            self._stretches.append([window, window + 1])
