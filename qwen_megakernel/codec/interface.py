"""The codec seam: what the engine asks of a codec, frame by frame.

`CodecStream` (PyTorch) and `CudaCodecStream` (kernels) stand behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LaunchedSound:
    """Samples that the device may still be computing."""

    ready: Callable[[], bool]
    """Whether `samples` would return at once."""
    samples: Callable[[], np.ndarray]
    """Waits for them: float32 [n, 1920] in [-1, 1], the caller's own. To be called before the
    second next launch."""


class FrameCodec(Protocol):
    """Codes to sound for many slots, each going on where it stopped."""

    num_slots: int

    def reset(self, slot: int) -> None:
        """Make `slot` as new, behind all that was launched."""

    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedSound:
        """Begin the next frame of each slot.

        Args:
            slots: n different slots.
            codes: integers [n, 16], on any device; read on the current stream. One that is no code
                of a codebook, as EOS, counts as the nearest: it still makes samples.
        """
