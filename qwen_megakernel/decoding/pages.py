"""Which slot has which pages of a cache: the accounting, without the memory.

A page holds `PAGE_POSITIONS` rows of one stream: the rows of one item of the frame kernel's attention.
All pages that a slot may come to need are reserved when its stream starts, so no stream can run out of
them later. Pages that it will not need are given back early.
"""

from __future__ import annotations

from bisect import insort

PAGE_POSITIONS = 256
"""kSplitPositions in csrc/params.h."""


class OutOfPages(RuntimeError):
    """There are fewer free pages than a slot needs."""


def pages_for(positions: int) -> int:
    """The number of pages that hold so many positions."""
    return -(-positions // PAGE_POSITIONS)


class PageTable:
    """The pages of each slot, in the order of its positions."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        """The free pages, in order."""
        self._taken: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """The number of pages that no slot has."""
        return len(self._free)

    def of(self, slot: int) -> list[int]:
        """A slot's pages; empty if it has none."""
        return self._taken.get(slot, [])

    def reserve(self, slot: int, positions: int) -> list[int]:
        """Give a slot that has no pages those for so many positions.

        They follow each other if such pages are free: PyTorch then reads them without a copy.

        Raises:
            ValueError: the slot has pages already.
            OutOfPages: too few pages are free.
        """
        if slot in self._taken:
            raise ValueError(f"slot {slot} has pages already")
        count = pages_for(positions)
        if count > len(self._free):
            raise OutOfPages(f"{positions} positions need {count} pages, and {len(self._free)} are free")
        start = self._find_run(count)
        self._taken[slot] = self._free[start : start + count]
        del self._free[start : start + count]
        return self._taken[slot]

    def _find_run(self, count: int) -> int:
        """The index of the first `count` free pages that follow each other; 0 if there are none."""
        free = self._free
        for start in range(len(free) - count + 1):
            if free[start + count - 1] - free[start] == count - 1:
                return start
        return 0

    def shrink(self, slot: int, positions: int) -> None:
        """Give back the pages of a slot after the first so many positions."""
        pages = self._taken[slot]
        self._give_back(pages[pages_for(positions) :])
        del pages[pages_for(positions) :]

    def free(self, slot: int) -> None:
        """Give back all pages of a slot, if it has any."""
        self._give_back(self._taken.pop(slot, []))

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            insort(self._free, page)


def runs_of(pages: list[int]) -> list[tuple[int, int]]:
    """Pages that follow each other, as (first page, number of them)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
