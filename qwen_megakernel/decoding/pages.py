"""Who has which pages of a cache: the accounting, without the memory.

A page holds `PAGE_POSITIONS` rows of one stream: what one item of the frame kernel's attention covers.
All pages that a slot may come to need are reserved when its stream starts, so no stream can run out of
them later. What it turns out not to need is given back early.
"""

from __future__ import annotations

from bisect import insort

PAGE_POSITIONS = 256
"""kSplitPositions in csrc/params.h."""


class OutOfPages(RuntimeError):
    """There are fewer free pages than a slot needs."""


def pages_for(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE_POSITIONS)


class PageTable:
    """The pages of each slot, in the order of its positions."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        """In order."""
        self._taken: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that no slot has."""
        return len(self._free)

    def of(self, slot: int) -> list[int]:
        """A slot's pages; none where nothing is reserved."""
        return self._taken.get(slot, [])

    def reserve(self, slot: int, positions: int) -> list[int]:
        """Give a slot that has none the pages for so many positions.

        They follow each other where such pages are free: PyTorch then reads them without a copy.

        Raises:
            ValueError: the slot has pages; OutOfPages: too few are free.
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
        """Where in the free pages the first `count` begin that follow each other; 0 if none do."""
        free = self._free
        for start in range(len(free) - count + 1):
            if free[start + count - 1] - free[start] == count - 1:
                return start
        return 0

    def shrink(self, slot: int, positions: int) -> None:
        """Give back the pages of a slot that are behind so many positions."""
        pages = self._taken[slot]
        self._give_back(pages[pages_for(positions) :])
        del pages[pages_for(positions) :]

    def free(self, slot: int) -> None:
        """Give back all pages of a slot; nothing happens where it has none."""
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
