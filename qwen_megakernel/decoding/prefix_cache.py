"""Keys and values of prompt beginnings that many turns share: a voice in a language.

A turn then starts with the rows that are its own. The beginning is always prefilled apart, kept
or not, so that a turn's codes do not depend on whether another came before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from qwen_megakernel.prompt.shared_rows import SharedRows

CAPACITY = 32
"""Beginnings kept; the least recently used goes first (0.115 MB a row at the 0.6B shape)."""


class PrefixCache:
    """Copies of the first rows of slots, by key."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """k_cache, v_cache: [layers, slots, kv_heads, positions, head_dim]."""
        self._caches = k_cache, v_cache
        self._kept: OrderedDict[SharedRows, tuple[Tensor, ...]] = OrderedDict()

    def begin(self, slot: int, shared: SharedRows | None, compute: Callable[[int], None]) -> int:
        """Have a slot's shared rows in its first positions; how many there are.

        Args:
            slot: of the caches.
            shared: None where nothing is shared.
            compute: prefills that many of the prompt's rows; called where they are not kept yet.
        """
        if shared is None:
            return 0
        if not self.restore(slot, shared):
            compute(shared.count)
            self.keep(slot, shared)
        return shared.count

    def restore(self, slot: int, shared: SharedRows) -> bool:
        """Write the kept rows into a slot's first positions; False where none are kept."""
        kept = self._kept.get(shared)
        if kept is None:
            return False
        for cache, rows in zip(self._caches, kept, strict=True):
            cache[:, slot, :, : shared.count] = rows
        self._kept.move_to_end(shared)
        return True

    def keep(self, slot: int, shared: SharedRows) -> None:
        """Copy a slot's first rows."""
        self._kept[shared] = tuple(cache[:, slot, :, : shared.count].clone() for cache in self._caches)
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)
