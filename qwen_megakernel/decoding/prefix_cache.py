"""Keys and values of prompt beginnings that many turns share: a voice in a language.

A turn then prefills only its own rows. The beginning is always prefilled separately, even if it is not
kept yet, so a turn's codes do not depend on earlier turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from qwen_megakernel.decoding.kv_cache import KeptRows, KvCache
from qwen_megakernel.prompt.shared_rows import SharedRows

CAPACITY = 32
"""The number of beginnings that are kept. The least recently used is dropped first."""
MAX_ROWS = 4096
"""The most rows of all beginnings together, 0.47 GB at the 0.6B shape. One beginning is always kept."""


class PrefixCache:
    """Copies of the first rows of slots, by key."""

    def __init__(self, kv_cache: KvCache) -> None:
        self._kv_cache = kv_cache
        self._kept: OrderedDict[SharedRows, KeptRows] = OrderedDict()

    def begin(self, slot: int, shared: SharedRows | None, compute: Callable[[int], None]) -> int:
        """Put a slot's shared rows into its first positions. Returns their number.

        Args:
            slot: of the cache.
            shared: None if the prompt shares no rows.
            compute: prefills so many of the prompt's first rows. Called if they are not kept yet.
        """
        if shared is None:
            return 0
        if not self.restore(slot, shared):
            compute(shared.count)
            self.keep(slot, shared)
        return shared.count

    def restore(self, slot: int, shared: SharedRows) -> bool:
        """Write the kept rows into a slot's first positions. Returns False if none are kept."""
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
