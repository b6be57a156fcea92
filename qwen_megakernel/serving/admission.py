"""Who is let in: the one place that decides whether a turn may wait for a slot.

The engine says what it can take. A turn that would get a slot within `max_queue_s` is let in, and is
spoken then; any other is refused at once, with the time after which it would be let in. A session has
one turn at a time, and the engine gives slots in the order of arrival: so each connection has at most
one turn before another's, whatever it sends. A turn that is cancelled counts no longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.engine.capacity import Capacity

MIN_RETRY_S = 1.0
"""Sooner than this nobody is asked to come back."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the command line decides about admission."""

    max_queue_s: float = 10.0
    """Seconds that a turn may have to wait for a slot, by prediction."""


class Admission:
    """Decides for all sessions of a server."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()

    def check_turn(self, capacity: Capacity) -> None:
        """Refuse a turn that would wait too long.

        Raises:
            RequestError: `overloaded`, with the time to come back.
        """
        start_s, limit_s = predicted_start_s(capacity), self.limits.max_queue_s
        if start_s > limit_s:
            raise RequestError(
                "overloaded",
                f"a turn would wait {start_s:.1f} s for a slot, and may wait {limit_s:g} s",
                round(max(MIN_RETRY_S, start_s - limit_s), 1),
            )


def predicted_start_s(capacity: Capacity) -> float:
    """Seconds until a turn that is opened now gets a slot, if turns go on as they did."""
    num_before = capacity.num_queued - capacity.num_free
    if num_before < 0:
        return 0.0
    return (num_before + 1) * capacity.slot_s / capacity.num_slots
