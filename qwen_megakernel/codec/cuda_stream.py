"""The codec on the GPU: each frame is one CUDA graph of hand-written kernels, for any slots.

`CudaCodecStream` takes the place of `CodecStream`. The kernels are in csrc/codec_*; `CodecPlan` lists
their launches, `Launcher` makes them. This module captures the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.codec.cuda_launcher import Launcher
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.decoder import CodecDecoder, check_slots
from qwen_megakernel.codec.interface import CodecState, LaunchedAudio
from qwen_megakernel.config import HOP
from qwen_megakernel.model.copy_events import CopyEvents

__all__ = ["CudaCodecStream", "batch_sizes"]


def batch_sizes(max_streams: int) -> list[int]:
    """The numbers of streams that get a graph: powers of two, up to the first that is at least
    `max_streams`."""
    sizes = [1]
    while sizes[-1] < max_streams:
        sizes.append(2 * sizes[-1])
    return sizes


class _HostBuffers:
    """Host memory that a launch owns until the second next launch. It is pinned, so that no copy
    waits."""

    def __init__(self, streams: int) -> None:
        self.slots = torch.zeros(streams, dtype=torch.int32, pin_memory=True)
        self.pcm = torch.zeros(streams, HOP, pin_memory=True)
        self.copied = CopyEvents()

    def take(self, streams: int) -> np.ndarray:
        """Wait for the samples, and return a copy of them."""
        self.copied.choose(streams).synchronize()
        return self.pcm[:streams].numpy().copy()


class CudaCodecStream:
    """Decodes the codes of many slots as they come. Each slot continues where it stopped.

    It computes what `CodecStream` computes in bf16. Each layer fixes the order of its sums, so a slot's
    samples are the same, bit for bit, however its frames are split over calls and whichever slots share
    them. The constructor allocates all state and buffers. Launches must come from one CUDA stream at a
    time.
    """

    @torch.no_grad()
    def __init__(
        self, decoder: CodecDecoder, num_slots: int, library: Path, *, max_streams: int | None = None
    ) -> None:
        """Pack the weights, and run and capture a graph for each of `batch_sizes`.

        Args:
            decoder: on CUDA with its weights loaded, of any dtype. It is not needed afterwards.
            num_slots: how many streams have state.
            library: `codec_library`, built for the decoder's GPU.
            max_streams: the most slots that one launch will name. None is `num_slots`.

        Raises:
            ValueError: `num_slots` or `max_streams` is below 1.
            RuntimeError: the library was built from other sources, or CUDA refuses a launch.
        """
        self.max_streams = num_slots if max_streams is None else min(max_streams, num_slots)
        if self.max_streams < 1:
            raise ValueError(
                f"num_slots is {num_slots} and max_streams is {max_streams}, allowed: at least 1"
            )
        self.num_slots = num_slots
        self._sizes = batch_sizes(self.max_streams)
        self._plan = CodecPlan(decoder, num_slots, max_streams=self._sizes[-1])
        self._device = self._plan.state.device
        self._launcher = Launcher(self._plan, library)
        self._launcher.input[:, 0] = num_slots
        self._slots: list[int] | None = None
        """The slots that the first column of `input` names. None if it must be written again."""
        with torch.cuda.device(self._device):
            self._graphs = {size: self._capture(size) for size in self._sizes}
            self._hosts = tuple(_HostBuffers(self._sizes[-1]) for _ in range(2))

    def reset(self, slot: int) -> None:
        """Reset `slot` to the state of a new one."""
        check_slots([slot], self.num_slots)
        self._plan.state[slot].zero_()
        self._plan.frame_counts[slot] = 0

    @torch.no_grad()
    def state_after(self, codes: Tensor) -> CodecState:
        """See `FrameCodec.state_after`. The frames are decoded in the scratch slot."""
        spare = self.num_slots
        with torch.cuda.device(self._device):
            self._plan.state[spare].zero_()
            self._plan.frame_counts[spare] = 0
            self._launcher.input[0, 0] = spare
            self._slots = None  # so that the next launch writes its own
            for frame in codes.to(self._device):
                self._launcher.input[0, 1:].copy_(frame)
                self._graphs[1].replay()
            return CodecState(self._plan.state[spare].clone(), len(codes))

    @torch.no_grad()
    def restore(self, slot: int, state: CodecState) -> None:
        """See `FrameCodec.restore`. Raises `ValueError` for a slot out of range."""
        check_slots([slot], self.num_slots)
        self._plan.state[slot].copy_(state.values)
        self._plan.frame_counts[slot] = state.num_frames

    @torch.no_grad()
    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedAudio:
        """See `FrameCodec.launch`.

        Raises:
            ValueError: a slot is out of range or repeats, or there are more than `max_streams` slots. No
                slot has changed.
        """
        check_slots(slots, self.num_slots)
        streams = len(slots)
        if streams > self.max_streams:
            raise ValueError(f"{streams} slots in a launch, allowed: 1 to {self.max_streams}")
        size = next(n for n in self._sizes if n >= streams)
        with torch.cuda.device(self._device):
            self._hosts = self._hosts[::-1]
            host = self._hosts[0]
            self._write_slots([*slots, *[self.num_slots] * (size - streams)], host)
            self._launcher.input[:streams, 1:].copy_(codes)
            self._graphs[size].replay()
            host.pcm[:streams].copy_(self._plan.pcm[:streams], non_blocking=True)
            copied = host.copied.choose(streams)
            copied.record()
        return LaunchedAudio(copied.query, lambda: host.take(streams))

    def _write_slots(self, slots: list[int], host: _HostBuffers) -> None:
        if slots != self._slots:
            host.slots[: len(slots)] = torch.tensor(slots)
            column = self._launcher.input[: len(slots), 0]
            column.copy_(host.slots[: len(slots)], non_blocking=True)
            self._slots = slots

    def _launch_all(self, streams: int) -> None:
        for op in self._plan.ops:
            self._launcher.launch(op, streams)

    def _capture(self, streams: int) -> torch.cuda.CUDAGraph:
        self._launch_all(streams)  # loads the kernels, which is not allowed in a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch_all(streams)
        return graph
