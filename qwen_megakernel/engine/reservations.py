"""Cache pages for turns: a turn reserves all pages that it can come to need before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.active_turn import ActiveTurn


class Reservations:
    """The pages of each turn that holds a slot. A turn never waits for a page later."""

    def __init__(self, backend: DecoderBackend | None) -> None:
        self._backend = backend

    def use(self, backend: DecoderBackend | None) -> None:
        """Reserve in this backend's cache from now on. With None there is no cache, and no turn has a
        slot."""
        self._backend = backend

    def fit(self, waiting: Iterable[ActiveTurn]) -> bool:
        """Whether there are enough pages for any of these turns to begin. Any thread may call it.

        There must be enough for the largest turn that has its text. If small turns went first, they
        could keep it waiting for ever.
        """
        backend = self._backend
        if backend is None or backend.kv_cache.can_reserve(backend.max_positions):
            return True
        needs = (a.positions_to_begin(backend.max_positions) for a in waiting if a.ready)
        return backend.kv_cache.can_reserve(max(needs, default=0))

    def reserve(self, active: ActiveTurn) -> None:
        """Reserve pages for a turn that has just got a slot."""
        backend = self._in_use
        active.reserved = active.most_positions(backend.max_positions)
        backend.kv_cache.reserve(cast("int", active.slot), active.reserved)

    def shrink(self, active: ActiveTurn) -> None:
        """Give back pages that a turn with a complete text can no longer need."""
        if active.slot is None:
            return
        positions = active.most_positions(self._in_use.max_positions)
        if positions < active.reserved:
            self._in_use.kv_cache.shrink(active.slot, positions)
            active.reserved = positions

    def free(self, slot: int) -> None:
        """Give back all pages of a slot."""
        self._in_use.kv_cache.free(slot)

    @property
    def _in_use(self) -> DecoderBackend:
        assert self._backend is not None
        return self._backend
