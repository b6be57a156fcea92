"""How a budget of memory is shared out: slots with their codec state, and pages for what they say."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from qwen_megakernel.codec.cuda_plan import ring_shapes
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.decoding.pages import PAGE_POSITIONS, pages_for

DEFAULT_BYTES = 5_800_000_000
"""Of all caches. At the 0.6B shape in bf16 it holds 16 turns of the greatest length, and their state."""
USUAL_POSITIONS = 512
"""Of a turn, where the number of slots follows from the memory: 40 s of speech."""
MOST_SLOTS = 256
"""Where the number follows from the memory: small models would have thousands."""
SLOTS_ON_A_CPU = 16
"""Where neither is chosen: more turns than a CPU decodes in real time."""


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """What is reserved for turns."""

    num_slots: int
    num_pages: int
    page_bytes: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """All of it."""
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
    """Slots and pages that fit.

    Args:
        config: the model's.
        dtype: of the caches.
        max_positions: of a turn; there are pages for one of this length at least.
        num_slots: None is as many turns of `USUAL_POSITIONS` as fit, at most `MOST_SLOTS`.
        memory: bytes of all; None is `DEFAULT_BYTES`.
        on_cpu: whether None means `SLOTS_ON_A_CPU` instead.

    Raises:
        ValueError: it does not fit; one line.
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
    """Of a slot whatever it says: the codec's state, the next row, the codes that it has produced."""
    codec: int = sum(map(prod, ring_shapes(config.codec).values())) * dtype.itemsize
    return codec + 4 * config.talker.hidden_size + config.talker.vocab_size
