"""The talker's keys and values: how they are stored, and every copy of them in and out.

No other module knows their shape in memory. Callers name a slot, a layer and positions, and pass rows
with their dims in the usual order; a layout decides in which order a row's dims are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qwen_megakernel.config import TransformerConfig

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
    """Of the same shape."""


class CachedRows:
    """Keys and values of some streams, layer by layer, as attention takes them."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], layout: Layout = plain) -> None:
        """layers: keys and values of each, [n, kv_heads, positions, head_dim], written in place."""
        self._layers, self._layout = layers, layout

    def extend(self, layer: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store rows at `position` and after; the keys and values of all positions up to them.

        Args:
            layer: of the model.
            position: of the first row; those before it are stored.
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


class BatchRows:
    """Rows of several slots, found by tensors: a CUDA graph of it serves any slots and positions."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        positions: Tensor,
        reach: int,
    ) -> None:
        """See `KvCache.batch`. keys, values: [layers, slots, kv_heads, positions, head_dim]."""
        self._stored = keys.flatten(1, 2), values.flatten(1, 2)
        self._kv_heads, self._reach = keys.shape[2], reach
        heads = torch.arange(self._kv_heads, device=keys.device)
        # The heads of all slots stand in one dimension: a copy of a head is then a copy of one long row.
        self._heads = (slots[:, None] * self._kv_heads + heads).flatten()
        self._positions = positions[:, None].expand(-1, self._kv_heads).flatten()

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the slots' next rows; their keys and values at the first `reach` positions.

        Args:
            layer: of the model.
            keys, values: [n, 1, kv_heads, head_dim].

        Returns:
            Copies [n, kv_heads, reach, head_dim]. Rows after a slot's own position are arbitrary.
        """
        copies = []
        for stored, rows in zip(self._stored, (keys, values), strict=True):
            of_layer = stored[layer]
            of_layer.index_put_((self._heads, self._positions), rows.flatten(0, 2))
            head_rows = of_layer.narrow(1, 0, self._reach).flatten(1)
            copy = head_rows.index_select(0, self._heads)
            copies.append(copy.view(-1, self._kv_heads, self._reach, rows.shape[-1]))
        return copies[0], copies[1]


class KvCache:
    """Keys and values of `num_slots` streams, up to `max_positions` rows each."""

    def __init__(
        self,
        config: TransformerConfig,
        num_slots: int,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = plain,
    ) -> None:
        """Allocate all of it.

        Args:
            config: the talker's.
            num_slots: streams.
            max_positions: rows of a stream.
            dtype, device: of the tensors.
            layout: `plain`, or `swizzled` for the frame kernel.
        """
        self.max_positions, self.dtype, self.device = max_positions, dtype, device
        self._layout = layout
        shape = _shape(config, num_slots, max_positions)
        # On a CPU, memory is only taken as rows are written. On a GPU it is taken at once, and zeros
        # replace NaNs that other work may have left there.
        allocate = torch.empty if device.type == "cpu" else torch.zeros
        self._keys = allocate(shape, dtype=dtype, device=device)
        self._values = allocate(shape, dtype=dtype, device=device)

    @staticmethod
    def num_bytes(
        config: TransformerConfig, num_slots: int, max_positions: int, dtype: torch.dtype
    ) -> int:
        """Bytes that a cache of these sizes takes."""
        return 2 * _shape(config, num_slots, max_positions).numel() * dtype.itemsize

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, contiguous, under the frame kernel's names (FrameParams in csrc/params.h)."""
        return {"k_cache": self._keys, "v_cache": self._values}

    def slot(self, slot: int) -> CachedRows:
        """A slot's rows for attention; n is 1. It stays valid as long as the cache."""
        keys, values = (stored[:, slot : slot + 1].unbind(0) for stored in (self._keys, self._values))
        return CachedRows(list(zip(keys, values, strict=True)), self._layout)

    def batch(self, slots: Tensor, positions: Tensor, reach: int) -> BatchRows:
        """Rows of some slots for a frame's attention, in the layout `plain`.

        Args:
            slots: int64 [n], on the cache's device. A slot that repeats must get the same rows again.
            positions: int64 [n], of each slot's next row, below `reach`.
            reach: positions that attention reads, at most `max_positions`.
        """
        return BatchRows(self._keys, self._values, slots, positions, reach)

    def load(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Copy a slot's first rows out.

        Args:
            slot: of the cache.
            keys, values: [layers, kv_heads, n, head_dim], overwritten with the rows at positions
                0 to n - 1.
        """
        for rows, stored in ((keys, self._keys), (values, self._values)):
            rows.copy_(self._layout(stored[:, slot, :, : rows.shape[2]], 0))

    def store(self, slot: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Copy rows in.

        Args:
            slot: of the cache.
            begin: the first row's position.
            keys, values: [layers, kv_heads, n, head_dim].
        """
        for rows, stored in ((keys, self._keys), (values, self._values)):
            stored[:, slot, :, begin : begin + rows.shape[2]] = self._layout(rows, begin)

    def keep(self, slot: int, count: int) -> KeptRows:
        """A copy of a slot's first `count` rows, which outlives the slot's stream."""
        keys, values = (stored[:, slot, :, :count].clone() for stored in (self._keys, self._values))
        return KeptRows(keys, values)

    def restore(self, slot: int, kept: KeptRows) -> None:
        """Write kept rows into a slot's first positions."""
        for rows, stored in ((kept.keys, self._keys), (kept.values, self._values)):
            stored[:, slot, :, : rows.shape[2]] = rows


def _shape(config: TransformerConfig, num_slots: int, max_positions: int) -> torch.Size:
    """Of the keys; the values have the same."""
    return torch.Size(
        (config.num_layers, num_slots, config.num_kv_heads, max_positions, config.head_dim)
    )


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
