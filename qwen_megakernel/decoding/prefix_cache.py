"""Keys and values of prompt beginnings that many turns share: a voice in a language.

A turn then starts with the rows that are its own. The beginning is always prefilled separately,
whether it is kept already or not, so a turn's codes do not depend on the turns before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from qwen_megakernel.decoding.kv_cache import KeptRows, KvCache
from qwen_megakernel.prompt.shared_rows import SharedRows

CAPACITY = 32
"""Beginnings kept; the least recently used is dropped first."""
MAX_ROWS = 4096
"""Rows of all of them, 0.47 GB at the 0.6B shape; one beginning is always kept."""


class PrefixCache:
    """Copies of the first rows of slots, by key."""

    def __init__(self, kv_cache: KvCache) -> None:
        self._kv_cache = kv_cache
        self._kept: OrderedDict[SharedRows, KeptRows] = OrderedDict()

    def begin(self, slot: int, shared: SharedRows | None, compute: Callable[[int], None]) -> int:
        """Put a slot's shared rows into its first positions; returns how many there are.

        Args:
            slot: of the cache.
            shared: None where nothing is shared.
            compute: prefills that many of the prompt's rows; called if they are not kept yet.
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
        self._kv_cache.restore(slot, kept)
        self._kept.move_to_end(shared)
        return True

    def keep(self, slot: int, shared: SharedRows) -> None:
        """Copy a slot's first rows."""
        self._kept[shared] = self._kv_cache.keep(slot, shared.count)
        while len(self._kept) > 1 and (len(self._kept) > CAPACITY or self._num_rows > MAX_ROWS):
            self._kept.popitem(last=False)

    @property
    def _num_rows(self) -> int:
        return sum(shared.count for shared in self._kept)
