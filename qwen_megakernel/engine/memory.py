"""Divide a budget of memory into slots, each with its codec state, and pages for keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from qwen_megakernel.codec.cuda_plan import ring_shapes
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.decoding.pages import PAGE_POSITIONS, pages_for

DEFAULT_BYTES = 5_800_000_000
"""Bytes for all caches: 16 turns of the greatest length and their state, at the 0.6B shape in bf16."""
USUAL_POSITIONS = 512
"""Positions assumed for a turn when the number of slots is computed from the memory: 40 s of speech."""
MOST_SLOTS = 256
"""Limit on the number of slots computed from the memory: a small model would get thousands."""
SLOTS_ON_A_CPU = 16
"""Slots on a CPU if neither slots nor memory are given: more turns than it decodes in real time."""


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """The memory that is reserved for turns."""

    num_slots: int
    num_pages: int
    page_bytes: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches together."""
        return self.num_pages * self.page_bytes + self.num_slots * self.slot_bytes

    def __str__(self) -> str:
        return (
            f"{self.num_slots} slots and {self.num_pages} pages of {PAGE_POSITIONS} positions: "
            f"{self.num_bytes / 1e9:.2f} GB ({self.page_bytes / 1e6:.1f} MB a page, "
            f"{self.slot_bytes / 1e6:.1f} MB a slot)"
        )


def choose_sizes(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    max_positions: int,
    num_slots: int | None = None,
    memory: int | None = None,
    on_cpu: bool = False,
) -> CacheSizes:
    """Choose how many slots and pages fit.

    Args:
        config: of the model.
        dtype: of the caches.
        max_positions: the most positions of a turn. There are pages for at least one such turn.
        num_slots: None is as many turns of `USUAL_POSITIONS` as fit, at most `MOST_SLOTS`.
        memory: bytes for everything; None is `DEFAULT_BYTES`.
        on_cpu: whether `SLOTS_ON_A_CPU` applies if `num_slots` and `memory` are None.

    Raises:
        ValueError: it does not fit. The message is one line.
    """
    budget = DEFAULT_BYTES if memory is None else memory
    page_bytes = KvCache.num_bytes(config.talker, PAGE_POSITIONS, dtype)
    slot_bytes = _slot_bytes(config, dtype)
    most = pages_for(max_positions)
    if num_slots is None:
        usual = slot_bytes + pages_for(min(USUAL_POSITIONS, max_positions)) * page_bytes
        fitting = min(MOST_SLOTS, max(1, budget // usual))
        num_slots = SLOTS_ON_A_CPU if on_cpu and memory is None else fitting
    num_pages = min(num_slots * most, (budget - num_slots * slot_bytes) // page_bytes)
    if num_pages < most:
        needed = CacheSizes(num_slots, most, page_bytes, slot_bytes).num_bytes
        raise ValueError(
            f"{num_slots} slots and one turn of {max_positions} positions need {needed / 1e9:.2f} GB, "
            f"and the caches may take {budget / 1e9:.2f} GB: raise --memory, or take fewer --num-slots"
        )
    return CacheSizes(num_slots, num_pages, page_bytes, slot_bytes)


def _slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a slot besides its pages: the codec's state, the next row and its codes so far."""
    codec: int = sum(map(prod, ring_shapes(config.codec).values())) * dtype.itemsize
    return codec + 4 * config.talker.hidden_size + config.talker.vocab_size
