"""What to expect of a GPU: which kernels it runs, and how long a frame of the 0.6B shape takes.

For some GPUs the figures are measured. For the others a model gives them from published numbers.
docs/kernel.md has the model, its assumptions and the table of all known GPUs. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HIDDEN_SIZE, NUM_LAYERS = 1024, 28
"""The talker of the 0.6B shape."""
FRAME_GB = {1: 3.21, 8: 3.51}
"""Gigabytes that a frame reads at position 200, by streams."""
CHAIN_US = {1: 564.0, 8: 696.0}
DRAWS_US = {1: 49.0, 8: 60.0}
"""Times of the chain of exchanges and of the draws, at `H200_GHZ`."""
H200_GHZ = 1.98
MEMORY_SHARE = 0.92
"""The part of the published bandwidth that a long read gets."""
OVERLAP = 1.3
"""The exponent with which the times of memory and chain add up."""
PREDICTOR_READS = 14
"""Reads of the predictor's weights in a frame that can find in L2 what the first read left there."""


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """A GPU by its published numbers."""

    name: str
    """Words in the driver's name for it."""
    arch: str
    sms: int
    memory_gb_s: float
    clock_ghz: float
    """Boost clock."""
    l2_mb: float
    measured_ms: dict[int, float] | None = None
    """Time of a frame at position 200, by streams."""

    def frame_ms(self, streams: int, kept_mb: float) -> float:
        """The modelled time of a frame at position 200.

        Args:
            streams: 1 or 8.
            kept_mb: how much of the predictor's weights stays in L2.
        """
        read_gb = FRAME_GB[streams] - PREDICTOR_READS * kept_mb / 1000
        memory_us = 1e6 * read_gb / (MEMORY_SHARE * self.memory_gb_s)
        slower = H200_GHZ / self.clock_ghz
        both = (memory_us**OVERLAP + (CHAIN_US[streams] * slower) ** OVERLAP) ** (1 / OVERLAP)
        return (both + DRAWS_US[streams] * slower) / 1000

    def expectation(self, streams: int) -> str:
        """A text such as `1.8 to 2.2 ms, modelled`: if half of L2 keeps its lines, or none of it."""
        if self.measured_ms is not None:
            return f"{self.measured_ms[streams]:.2f} ms, measured"
        low, high = (self.frame_ms(streams, kept) for kept in (self.l2_mb / 2, 0.0))
        spread = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
        return f"{spread} ms, modelled"


KNOWN_GPUS = (
    KnownGpu("RTX 3090", "86", 82, 936, 1.70, 6),
    KnownGpu("RTX 4090", "89", 128, 1008, 2.52, 72),
    KnownGpu("L40S", "89", 142, 864, 2.52, 96),
    KnownGpu("L4", "89", 58, 300, 2.04, 48),
    KnownGpu("A10G", "86", 80, 600, 1.71, 6),
    KnownGpu("A100", "80", 108, 1935, 1.41, 40),
    KnownGpu("H100", "90a", 132, 3350, 1.98, 50),
    KnownGpu("H200", "90a", 132, 4800, 1.98, 60, {1: 1.12, 8: 1.30}),
    KnownGpu("B200", "100a", 148, 8000, 1.85, 126),
    KnownGpu("RTX 5090", "120a", 170, 1790, 2.40, 96),
    KnownGpu("GB10", "121a", 48, 273, 2.40, 24),
)


def find_gpu(name: str) -> KnownGpu | None:
    """The known GPU with this name of the driver, such as `NVIDIA L4`; None for an unknown one."""
    if "Laptop" in name:  # a smaller chip with the same name
        return None
    return next((gpu for gpu in KNOWN_GPUS if re.search(rf"\b{gpu.name}\b", name)), None)


def expected_frames(name: str) -> str | None:
    """What to expect of the kernel on a GPU, in one line; None if the GPU is not known."""
    gpu = find_gpu(name)
    if gpu is None:
        return None
    return f"a frame takes {gpu.expectation(1)} (8 streams: {gpu.expectation(8)})"
