"""What the engine can take: its slots, the turns that wait for one, and how long a turn keeps one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FIRST_GUESS_S = 3.0
"""Seconds that a turn keeps its slot, before any was seen."""
_WINDOW_PER_SLOT = 4
"""Turns of each slot that the mean remembers."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The engine's load at one moment."""

    num_slots: int
    num_free: int
    """Slots that no turn holds."""
    num_queued: int
    """Turns that have text and no slot; cancelled ones are left out."""
    slot_s: float
    """Seconds that a turn keeps its slot, on average."""


class SlotClock:
    """The mean time that turns keep a slot, of those that gave theirs back and those that hold one.

    Those that hold one count with their time so far. Otherwise a few turns that never end would
    look like slots that are free in a moment.
    """

    def __init__(self, num_slots: int) -> None:
        self._window = float(max(16, _WINDOW_PER_SLOT * num_slots))
        self._count = float(num_slots)
        self._total_s = _FIRST_GUESS_S * num_slots

    def add(self, held_s: float) -> None:
        """A turn has given its slot back after so many seconds."""
        kept = min(1.0, (self._window - 1) / self._count)
        self._count = kept * self._count + 1
        self._total_s = kept * self._total_s + held_s

    def mean_s(self, held_s: Iterable[float]) -> float:
        """Seconds that a turn keeps its slot; `held_s` are those of the turns that hold one now."""
        return (self._total_s + sum(held_s)) / self._count
