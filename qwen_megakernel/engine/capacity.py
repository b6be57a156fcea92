"""The engine's load: its slots, the turns that wait for one, and how long a turn keeps one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FIRST_GUESS_S = 3.0
"""Seconds that a turn is assumed to keep its slot, before any has been measured."""
_WINDOW_PER_SLOT = 4
"""The mean covers about so many turns for each slot."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The engine's load at one moment."""

    num_slots: int
    num_free: int
    """Slots that no turn holds."""
    num_queued: int
    """Turns that have text and no slot. Cancelled ones do not count."""
    slot_s: float
    """Mean time in seconds for which a turn keeps its slot."""


class SlotClock:
    """The mean time for which turns keep a slot, over turns that have ended and turns that hold one.

    A turn that holds a slot counts with its time so far. Otherwise turns that never end would look
    like slots that will soon be free.
    """

    def __init__(self, num_slots: int) -> None:
        self._window = float(max(16, _WINDOW_PER_SLOT * num_slots))
        self._count = float(num_slots)
        self._total_s = _FIRST_GUESS_S * num_slots

    def add(self, held_s: float) -> None:
        """Add a turn that has given its slot back after `held_s` seconds."""
        kept = min(1.0, (self._window - 1) / self._count)
        self._count = kept * self._count + 1
        self._total_s = kept * self._total_s + held_s

    def mean_s(self, held_s: Iterable[float]) -> float:
        """Seconds that a turn keeps its slot; `held_s` are those of the turns that hold one now."""
        return (self._total_s + sum(held_s)) / self._count
