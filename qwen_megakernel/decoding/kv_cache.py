"""The talker's keys and values: how they are stored, and every copy of them in and out.

No other module knows their shape in memory: [layers, kv_heads, pages, PAGE_POSITIONS, head_dim]. Callers
name a slot, a layer and positions, and pass rows with their dims in the usual order. A layout decides
in which order a row's dims are stored. `pages.PageTable` says which pages a slot has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qwen_megakernel.config import TransformerConfig
from qwen_megakernel.decoding.pages import PAGE_POSITIONS, PageTable, pages_for, runs_of

Layout = Callable[[Tensor, int], Tensor]
"""(rows [..., n, head_dim] at consecutive positions, the first one's position) -> the rows with their
dims in the stored order, and back: applied twice, it changes nothing."""


def plain(rows: Tensor, first: int) -> Tensor:
    """The layout of PyTorch's attention: a row's dims in order."""
    return rows


@dataclass(frozen=True, slots=True)
class KeptRows:
    """A copy of a slot's first rows, for `KvCache.restore`."""

    keys: Tensor
    """[layers, kv_heads, n, head_dim], as stored."""
    values: Tensor
    """The same shape, as stored."""


class CachedRows:
    """Keys and values of some streams, layer by layer, as attention takes them."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], layout: Layout = plain) -> None:
        """layers: keys and values of each, [n, kv_heads, positions, head_dim], written in place."""
        self._layers, self._layout = layers, layout

    def extend(self, layer: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store rows from `position` on. Return the keys and values of all positions up to their end.

        Args:
            layer: of the model.
            position: of the first row. The rows before it are stored already.
            keys, values: [n, count, kv_heads, head_dim].

        Returns:
            [n, kv_heads, position + count, head_dim] each, to be read before the next `extend`.
        """
        count = keys.shape[1]
        end = position + count
        stored_keys, stored_values = self._layers[layer]
        for stored, rows in ((stored_keys, keys), (stored_values, values)):
            stored.narrow(2, position, count).copy_(self._layout(rows.transpose(1, 2), position))
        return (
            self._layout(stored_keys.narrow(2, 0, end), 0),
            self._layout(stored_values.narrow(2, 0, end), 0),
        )


class ScatteredRows:
    """`CachedRows` of one stream whose pages do not follow each other: attention takes copies."""

    def __init__(self, parts: Sequence[tuple[CachedRows, int]]) -> None:
        """parts: the rows of each run of pages, and how many positions it holds."""
        self._parts = parts

    def extend(self, layer: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `CachedRows.extend`."""
        begin, end, found = 0, position + keys.shape[1], []
        for rows, room in self._parts:
            at, upto = max(position, begin), min(end, begin + room)
            new = (x[:, max(0, at - position) : max(0, upto - position)] for x in (keys, values))
            found.append(rows.extend(layer, min(at, upto) - begin, *new))
            begin += room
            if begin >= end:
                break
        keys_of, values_of = zip(*found, strict=True)
        return torch.cat(keys_of, dim=2), torch.cat(values_of, dim=2)


class BatchRows:
    """Rows of several slots, found by tensors: a CUDA graph of it serves any slots and positions."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        positions: Tensor,
        reach: int,
    ) -> None:
        """See `KvCache.batch`.

        Args:
            keys, values: [layers, kv_heads, pages, PAGE_POSITIONS, head_dim].
            pages: int64 [n, pages of a slot].
            positions, reach: see `KvCache.batch`.
        """
        _, self._kv_heads, num_pages, _, _ = keys.shape
        self._rows = keys.flatten(1, 3), values.flatten(1, 3)
        """[layers, kv_heads * positions of all pages, head_dim]."""
        self._pages = keys.flatten(1, 2).flatten(2), values.flatten(1, 2).flatten(2)
        """[layers, kv_heads * pages, PAGE_POSITIONS * head_dim]: a copy of a page is one long row."""
        self._reach = reach
        first_pages = num_pages * torch.arange(self._kv_heads, device=keys.device)
        page = pages.gather(1, positions[:, None] // PAGE_POSITIONS)
        self._new = (
            (first_pages + page) * PAGE_POSITIONS + positions[:, None] % PAGE_POSITIONS
        ).flatten()
        read = pages[:, : pages_for(reach)]
        self._read = (first_pages[:, None] + read[:, None]).flatten()

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next row of each slot. Return the keys and values of the first `reach` positions.

        Args:
            layer: of the model.
            keys, values: [n, 1, kv_heads, head_dim].

        Returns:
            Copies [n, kv_heads, reach, head_dim]. Rows after a slot's own position are arbitrary.
        """
        copies = []
        for stored, paged, rows in zip(self._rows, self._pages, (keys, values), strict=True):
            stored[layer].index_put_((self._new,), rows.flatten(0, 2))
            copy = paged[layer].index_select(0, self._read)
            copy = copy.view(len(rows), self._kv_heads, -1, rows.shape[-1])
            copies.append(copy[:, :, : self._reach])
        return copies[0], copies[1]


class KvCache:
    """Keys and values of `num_slots` streams in pages, up to `max_positions` rows each."""

    def __init__(
        self,
        config: TransformerConfig,
        num_slots: int,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = plain,
        num_pages: int | None = None,
    ) -> None:
        """Allocate all of it.

        Args:
            config: the talker's.
            num_slots: streams.
            max_positions: the most rows of a stream.
            dtype, device: of the tensors.
            layout: `plain`, or `swizzled` for the frame kernel.
            num_pages: of `PAGE_POSITIONS` rows; None is as many as all slots can need.

        Raises:
            ValueError: too few pages for one stream of `max_positions`.
        """
        self.max_positions, self.dtype, self.device = max_positions, dtype, device
        self._layout = layout
        of_a_slot = pages_for(max_positions)
        self._pages = PageTable(num_slots * of_a_slot if num_pages is None else num_pages)
        if self._pages.num_pages < of_a_slot:
            raise ValueError(f"num_pages is {num_pages}, allowed: at least {of_a_slot}")
        self._unasked: set[int] = set()
        """Slots whose pages nobody has reserved before their stream began."""
        heads = (config.num_layers, config.num_kv_heads)
        shape = (*heads, self._pages.num_pages, PAGE_POSITIONS, config.head_dim)
        # On a CPU, memory is only taken as rows are written. On a GPU it is taken at once, and zeros
        # replace NaNs that other work may have left there.
        allocate = torch.empty if device.type == "cpu" else torch.zeros
        self._keys = allocate(shape, dtype=dtype, device=device)
        self._values = allocate(shape, dtype=dtype, device=device)
        self.page_table = torch.zeros(num_slots, of_a_slot, dtype=torch.int32, device=device)
        """int32 [slots, pages of a slot], for kernels and graphs; it changes in the order of the current
        stream. What stands behind a slot's own pages is arbitrary."""

    @staticmethod
    def num_bytes(config: TransformerConfig, num_rows: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of so many rows."""
        row = config.num_layers * config.num_kv_heads * config.head_dim
        return 2 * num_rows * row * dtype.itemsize

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All keys and values, contiguous, under the kernel's names (FrameParams in csrc/params.h)."""
        return {"k_cache": self._keys, "v_cache": self._values}

    # --- pages ----------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """All there are."""
        return self._pages.num_pages

    def can_reserve(self, positions: int) -> bool:
        """Whether there are free pages for so many positions."""
        return pages_for(positions) <= self._pages.num_free

    def reserve(self, slot: int, positions: int) -> None:
        """Reserve pages for all rows that a slot may come to hold. Raises `OutOfPages`, `ValueError`."""
        pages = torch.tensor(self._pages.reserve(slot, positions), dtype=torch.int32)
        if self.device.type == "cuda":
            pages = pages.pin_memory()  # a copy from other memory would wait for the frame that runs
        self.page_table[slot, : len(pages)].copy_(pages, non_blocking=True)

    def shrink(self, slot: int, positions: int) -> None:
        """The slot will hold no more than so many rows, and no fewer than it holds now."""
        self._pages.shrink(slot, positions)

    def free(self, slot: int) -> None:
        """Give back a slot's pages. Work that is queued already may still use them."""
        self._unasked.discard(slot)
        self._pages.free(slot)

    def begin_stream(self, slot: int) -> None:
        """A stream begins; where nothing is reserved for it, it may grow to `max_positions`."""
        if not self._pages.of(slot):
            self.reserve(slot, self.max_positions)
            self._unasked.add(slot)

    def end_stream(self, slot: int) -> None:
        """A stream has ended; pages that `begin_stream` has reserved are given back."""
        if slot in self._unasked:
            self.free(slot)

    def room(self, slot: int) -> int:
        """The positions for which a slot has pages, at most `max_positions`."""
        return min(self.max_positions, PAGE_POSITIONS * len(self._pages.of(slot)))

    # --- rows -----------------------------------------------------------------------------------

    def slot(self, slot: int) -> CachedRows | ScatteredRows:
        """A slot's rows for attention; n is 1. It stays valid as long as the slot has its pages."""
        parts = [
            (CachedRows(list(zip(*views, strict=True)), self._layout), count)
            for views, count in self._runs(slot)
        ]
        return parts[0][0] if len(parts) == 1 else ScatteredRows(parts)

    def _runs(self, slot: int) -> Iterator[tuple[tuple[Sequence[Tensor], Sequence[Tensor]], int]]:
        """Keys and values of each run of a slot's pages, by layer, [1, kv_heads, n, head_dim]; and n."""
        self.begin_stream(slot)
        stored = self._keys.flatten(2, 3), self._values.flatten(2, 3)
        for page, count in runs_of(self._pages.of(slot)):
            first, size = page * PAGE_POSITIONS, count * PAGE_POSITIONS
            keys, values = (x[:, None, :, first : first + size].unbind(0) for x in stored)
            yield (keys, values), size

    def batch(self, slots: Tensor, positions: Tensor, reach: int) -> BatchRows:
        """Rows of some slots for a frame's attention, in the layout `plain`.

        Args:
            slots: int64 [n], on the cache's device. A slot that repeats must get the same rows again.
            positions: int64 [n], of each slot's next row, below `reach`.
            reach: positions that attention reads, at most `max_positions`.
        """
        pages = self.page_table.index_select(0, slots).long()
        return BatchRows(self._keys, self._values, pages, positions, reach)

    def load(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Copy a slot's first rows out.

        Args:
            slot: of the cache.
            keys, values: [layers, kv_heads, n, head_dim], overwritten with the rows at positions
                0 to n - 1.
        """
        for rows, stored in ((keys, self._keys), (values, self._values)):
            for part, at in self._stored(stored, slot, 0, rows.shape[2]):
                rows[:, :, at : at + part.shape[2]] = self._layout(part, at)

    def store(self, slot: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Copy rows in.

        Args:
            slot: of the cache.
            begin: the first row's position.
            keys, values: [layers, kv_heads, n, head_dim].
        """
        for rows, stored in ((keys, self._keys), (values, self._values)):
            for part, at in self._stored(stored, slot, begin, rows.shape[2]):
                part.copy_(self._layout(rows[:, :, at : at + part.shape[2]], begin + at))

    def keep(self, slot: int, count: int) -> KeptRows:
        """A copy of a slot's first `count` rows, which outlives the slot's stream."""
        layers, kv_heads, _, _, head_dim = self._keys.shape
        keys, values = (self._keys.new_empty(layers, kv_heads, count, head_dim) for _ in range(2))
        for rows, stored in ((keys, self._keys), (values, self._values)):
            for part, at in self._stored(stored, slot, 0, count):
                rows[:, :, at : at + part.shape[2]] = part
        return KeptRows(keys, values)

    def restore(self, slot: int, kept: KeptRows) -> None:
        """Write kept rows into a slot's first positions."""
        for rows, stored in ((kept.keys, self._keys), (kept.values, self._values)):
            for part, at in self._stored(stored, slot, 0, rows.shape[2]):
                part.copy_(rows[:, :, at : at + part.shape[2]])

    def _stored(self, stored: Tensor, slot: int, begin: int, count: int) -> Iterator[tuple[Tensor, int]]:
        """Views [layers, kv_heads, n, head_dim] of a slot's rows from `begin` on, and which of the
        `count` rows each begins with."""
        self.begin_stream(slot)
        rows, at = stored.flatten(2, 3), 0
        for page, num_pages in runs_of(self._pages.of(slot)):
            size = num_pages * PAGE_POSITIONS
            first, end = max(begin, at), min(begin + count, at + size)
            if first < end:
                start = page * PAGE_POSITIONS + first - at
                yield rows[:, :, start : start + end - first], first - begin
            at += size


def swizzled(rows: Tensor, first: int) -> Tensor:
    """The layout that the frame kernel reads (csrc/kv_tile.cuh).

    Eight dims, 16 bytes, are a word. Word w of a row is stored at w ^ s, where s is the last three
    bits of the row's position in reverse order: the words that a warp reads at once from several rows
    then lie in different banks of shared memory.

    Args:
        rows: [..., n, head_dim], at consecutive positions; head_dim is a multiple of 64.
        first: the first one's position.

    Returns:
        The same shape, new memory.
    """
    words = rows.unflatten(-1, (-1, 8))
    begin = first % 8
    end = begin + words.shape[-3]
    order = _word_order(1 << end.bit_length(), words.shape[-2], rows.device)[begin:end]
    return words.gather(-2, order[..., None].expand_as(words)).flatten(-2)


@lru_cache(maxsize=32)  # computing it takes a few launches; counts are powers of two, so few are kept
def _word_order(count: int, words: int, device: torch.device) -> Tensor:
    """Which word is stored where in rows at the first positions: int64 [count, words]."""
    positions = torch.arange(count, device=device)
    swizzle = (positions & 1) << 2 | positions & 2 | positions >> 2 & 1
    return torch.arange(words, device=device) ^ swizzle[:, None]
