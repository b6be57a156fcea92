"""How the frame kernel holds keys and values."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def swizzled(rows: Tensor, first: int) -> Tensor:
    """Rows of keys or values in the order in which the kernel's caches hold them, and back.

    Eight dims, 16 bytes, are a word; the word w of the row at a position stands at w ^ s, where s are
    the last three bits of the position, the last one first: what a warp reads at once of several rows
    then lies in different banks of shared memory (csrc/kv_tile.cuh).

    Args:
        rows: [..., n, head_dim], at consecutive positions.
        first: the first one's position.

    Returns:
        The same shape. Applied twice, it changes nothing.
    """
    words = rows.unflatten(-1, (-1, 8))
    begin = first % 8
    end = begin + words.shape[-3]
    order = _word_order(1 << end.bit_length(), words.shape[-2], rows.device)[begin:end]
    return words.gather(-2, order[..., None].expand_as(words)).flatten(-2)


@lru_cache(maxsize=32)  # a few launches, for what all long prompts share; counts are powers of two
def _word_order(count: int, words: int, device: torch.device) -> Tensor:
    """Which word stands where, [count, words], in rows at the first positions."""
    positions = torch.arange(count, device=device)
    swizzle = (positions & 1) << 2 | positions & 2 | positions >> 2 & 1
    return torch.arange(words, device=device) ^ swizzle[:, None]
