"""The codec seam: what the engine asks of a codec, frame by frame.

`CodecStream` (PyTorch), `GraphCodecStream` (PyTorch as CUDA graphs) and `CudaCodecStream` (kernels)
implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LaunchedAudio:
    """Samples that the device may still be computing."""

    ready: Callable[[], bool]
    """Whether `samples` would return at once."""
    samples: Callable[[], np.ndarray]
    """Waits for the samples: float32 [n, 1920] in [-1, 1], owned by the caller. Call it before the
    launch after the next."""


@dataclass(frozen=True, slots=True)
class CodecState:
    """What a codec remembers of the frames that a slot has decoded. Only the codec that made it can read
    it."""

    values: Tensor
    """All histories of one slot, as one row on the codec's device."""
    num_frames: int
    """How many frames the slot has decoded."""


class FrameCodec(Protocol):
    """Codes to audio for many slots. Each slot continues where it stopped."""

    num_slots: int

    def reset(self, slot: int) -> None:
        """Forget what `slot` has decoded. Takes effect after all earlier launches."""

    def state_after(self, codes: Tensor) -> CodecState:
        """The state of a slot that has decoded these frames and nothing else. No slot changes.

        It decodes the frames, which takes time. Call it where `launch` may be called.

        Args:
            codes: integers [1 or more, 16], on any device, clamped as in `launch`.
        """

    def restore(self, slot: int, state: CodecState) -> None:
        """Copy a state of this codec into `slot`, which continues from it. Takes effect after all
        earlier launches."""

    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedAudio:
        """Begin the next frame of each slot.

        Args:
            slots: n different slots.
            codes: integers [n, 16], on any device, read on the current stream. A value outside the
                codebook, such as EOS, is clamped to the nearest code and still makes samples.
        """
