"""The PyTorch codec as CUDA graphs, for GPUs on which the codec's kernels cannot run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.codec.cuda_stream import batch_sizes
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream, check_slots, rope_table
from qwen_megakernel.codec.interface import LaunchedAudio
from qwen_megakernel.config import HOP, NUM_CODEBOOKS
from qwen_megakernel.model.cuda_graphs import capture


class GraphCodecStream(CodecStream):
    """`CodecStream` whose `launch` replays a CUDA graph, one for each of `batch_sizes`.

    Without a GPU it runs the same work without graphs. Rows without a stream decode into a scratch slot.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: CodecDecoder,
        num_slots: int,
        *,
        max_streams: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Allocate the states and, on a GPU, capture the graphs.

        Args:
            decoder: its weights must be loaded and must not change.
            num_slots: how many streams have state.
            max_streams: the most slots that one launch will name. None is `num_slots`.
            progress: told what is being done.

        Raises:
            ValueError: `num_slots` or `max_streams` is below 1.
            RuntimeError: CUDA cannot capture an operation.
        """
        self.max_streams = num_slots if max_streams is None else min(max_streams, num_slots)
        if self.max_streams < 1:
            raise ValueError(
                f"num_slots is {num_slots} and max_streams is {max_streams}, allowed: at least 1"
            )
        super().__init__(decoder, num_slots + 1)
        self.num_slots = num_slots
        sizes = batch_sizes(self.max_streams)
        started, tell = time.monotonic(), progress or (lambda line: None)
        tell("capturing the codec's CUDA graphs")
        most, device = sizes[-1], self._device
        self._slots = torch.full((most,), num_slots, dtype=torch.int64, device=device)
        self._codes = torch.zeros(most, 1, NUM_CODEBOOKS, dtype=torch.int64, device=device)
        self._pcm = torch.zeros(most, HOP, device=device)
        # The graphs read this table. `rope_table` keeps only the latest tables.
        self._rope = rope_table(decoder.config, decoder.config.sliding_window, device)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._runs: dict[int, Callable[[], None]] = {}
        """By number of rows, in rising order."""
        for size in sizes:
            run = partial(self._run, size)
            self._runs[size] = capture(run, device, pool).replay if pool else run
        tell(f"captured {len(sizes)} CUDA graphs of the codec in {time.monotonic() - started:.1f} s")

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
        size, run = next((size, run) for size, run in self._runs.items() if size >= streams)
        rows = torch.tensor([*slots, *[self.num_slots] * (size - streams)])
        on_gpu = self._device.type == "cuda"
        self._slots[:size].copy_(rows.pin_memory() if on_gpu else rows, non_blocking=True)
        self._codes[:streams, 0].copy_(codes, non_blocking=True)
        run()
        if not on_gpu:
            pcm = self._pcm[:streams].clone()
            return LaunchedAudio(ready=lambda: True, samples=pcm.numpy)
        host = torch.empty(streams, HOP, pin_memory=True)
        host.copy_(self._pcm[:streams], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))

        def samples() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return LaunchedAudio(ready=copied.query, samples=samples)

    def _run(self, size: int) -> None:
        """Decode the next frame of the first `size` rows."""
        codes = self._codes[:size].clamp(0, self._decoder.config.codebook_size - 1)
        self._pcm[:size].copy_(self._step(self._slots[:size], codes))
