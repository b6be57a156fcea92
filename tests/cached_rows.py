"""Read and fill rows of a `KvCache`, for tests that compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_megakernel.config import TransformerConfig
from qwen_megakernel.decoding.kv_cache import KvCache


def load_rows(cache: KvCache, config: TransformerConfig, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """A slot's first keys and values, [layers, kv_heads, count, head_dim] each."""
    shape = (config.num_layers, config.num_kv_heads, count, config.head_dim)
    keys, values = (torch.empty(shape, dtype=cache.dtype, device=cache.device) for _ in range(2))
    cache.load(slot, keys, values)
    return keys, values


def fill_with_nan(cache: KvCache) -> None:
    """Fill all rows with NaN, as if nobody had written them."""
    for tensor in cache.tensors.values():
        tensor.fill_(torch.nan)
