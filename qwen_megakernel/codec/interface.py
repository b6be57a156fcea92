"""The codec seam: what the engine asks of a codec, frame by frame.

`CodecStream` (PyTorch), `GraphCodecStream` (PyTorch as CUDA graphs) and `CudaCodecStream` (kernels)
stand behind it.
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
    """Waits for them: float32 [n, 1920] in [-1, 1], owned by the caller. Call it before the launch after
    the next."""


@dataclass(frozen=True, slots=True)
class CodecState:
    """What a codec remembers of the frames that a slot has decoded; only its maker can read it."""

    values: Tensor
    """All histories of one slot, one row, on the codec's device."""
    num_frames: int
    """How many frames were decoded."""


class FrameCodec(Protocol):
    """Codes to audio for many slots; each slot goes on where it stopped."""

    num_slots: int

    def reset(self, slot: int) -> None:
        """Forget what `slot` has decoded, once all earlier launches are done."""

    def state_after(self, codes: Tensor) -> CodecState:
        """The state of a slot that has decoded these frames and nothing else; no slot moves.

        Decodes the frames, so it takes their time. Call it where `launch` may be called.

        Args:
            codes: integers [1 or more, 16], on any device, clamped as by `launch`.
        """

    def restore(self, slot: int, state: CodecState) -> None:
        """Make `slot` go on from a state of this codec, once all earlier launches are done: a copy."""

    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedAudio:
        """Begin the next frame of each slot.

        Args:
            slots: n different slots.
            codes: integers [n, 16], on any device; read on the current stream. A value outside the
                codebook, such as EOS, is clamped to the nearest code: it still makes samples.
        """
