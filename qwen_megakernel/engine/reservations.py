"""Cache pages for turns: a turn reserves all pages that it can come to need before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.active_turn import ActiveTurn


class Reservations:
    """The pages of each turn that holds a slot. A turn never waits for a page later."""

    def __init__(self, backend: DecoderBackend) -> None:
        self._kv_cache, self._max_positions = backend.kv_cache, backend.max_positions

    def fit(self, waiting: Iterable[ActiveTurn]) -> bool:
        """Whether there are enough pages for any of these turns to begin. Any thread may call it.

        There must be enough for the largest turn that has its text. If small turns went first, they
        could keep it waiting for ever.
        """
        if self._kv_cache.can_reserve(self._max_positions):
            return True
        needs = (a.most_positions(self._max_positions) for a in waiting if a.prompt.ready)
        return self._kv_cache.can_reserve(max(needs, default=0))

    def reserve(self, active: ActiveTurn) -> None:
        """Reserve pages for a turn that has just got a slot."""
        active.reserved = active.most_positions(self._max_positions)
        self._kv_cache.reserve(cast("int", active.slot), active.reserved)

    def shrink(self, active: ActiveTurn) -> None:
        """Give back pages that a turn with a complete text can no longer need."""
        positions = active.most_positions(self._max_positions)
        if active.slot is not None and positions < active.reserved:
            self._kv_cache.shrink(active.slot, positions)
            active.reserved = positions

    def free(self, slot: int) -> None:
        """Give back all pages of a slot."""
        self._kv_cache.free(slot)
