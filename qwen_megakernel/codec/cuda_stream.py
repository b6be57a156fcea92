"""The codec on the GPU: each frame is one CUDA graph of hand-written kernels, for any slots.

`CudaCodecStream` replaces `CodecStream`. The kernels are in csrc/codec_*. `CodecPlan` lists their
launches. This module mirrors the kernels' parameters and captures the graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import singledispatchmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.codec.cuda_ops import (
    AttentionOp,
    DepthwiseNormOp,
    EmbedOp,
    GemmOp,
    LastConvOp,
    Op,
    Rows,
)
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.cuda_tiling import (
    choose_tile,
    choose_unit_shape,
    num_tiles,
    partial_floats,
)
from qwen_megakernel.codec.decoder import CodecDecoder, check_slots
from qwen_megakernel.codec.interface import CodecState, LaunchedAudio
from qwen_megakernel.config import HOP, NUM_CODEBOOKS
from qwen_megakernel.model.copy_events import CopyEvents

__all__ = ["CudaCodecStream", "batch_sizes"]


# ---------------------------------------------------------------------------- csrc/codec_params.h


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p), ("stride", c_int64), ("frames", c_int), ("rows", c_int),
        ("channels", c_int), ("by_slot", c_int),
    )  # fmt: skip


class _Embed(ctypes.Structure):
    _fields_ = (
        ("input", c_void_p), ("frame_counts", c_void_p), ("calls", c_void_p), ("table", c_void_p),
        ("codebook_size", c_int), ("out", _Rows),
    )  # fmt: skip


class _Gemm(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p), ("calls", c_void_p), ("source", _Rows), ("history", c_int),
        ("dilation", c_int), ("taps", c_int), ("m", c_int), ("k_blocks", c_int),
        ("columns", c_int), ("segments", c_int), ("mul", c_void_p), ("add", c_void_p),
        ("squares_in", c_void_p), ("square_parts", c_int), ("inverse_dim", c_float),
        ("eps", c_float), ("residual", _Rows), ("raw", _Rows), ("out", _Rows),
        ("residual_fp32", c_int), ("raw_fp32", c_int), ("upsample", c_int),
        ("out_channels", c_int), ("activation", c_int), ("act_a", c_void_p), ("act_b", c_void_p),
        ("middle_add", c_void_p), ("middle_a", c_void_p), ("middle_b", c_void_p),
        ("squares_out", c_void_p),
    )  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = (
        ("calls", c_void_p), ("qkv", c_void_p), ("kv", _Rows), ("rope", c_void_p),
        ("out", c_void_p), ("heads", c_int), ("kv_heads", c_int), ("head_dim", c_int),
        ("window", c_int), ("scale", c_float),
    )  # fmt: skip


class _DepthwiseNorm(ctypes.Structure):
    _fields_ = (
        ("calls", c_void_p), ("source", _Rows), ("taps", c_int), ("real_channels", c_int),
        ("weights", c_void_p), ("bias", c_void_p), ("norm_weight", c_void_p),
        ("norm_bias", c_void_p), ("eps", c_float), ("out", c_void_p),
    )  # fmt: skip


class _LastConv(ctypes.Structure):
    _fields_ = (
        ("calls", c_void_p), ("source", _Rows), ("weights", c_void_p),
        ("bias", c_float), ("pcm", c_void_p),
    )  # fmt: skip


def _rows(rows: Rows | None) -> _Rows:
    if rows is None:
        return _Rows()
    _, length, channels = rows.data.shape
    return _Rows(
        rows.data.data_ptr(), rows.data.stride(0), length // rows.rows, rows.rows, channels, rows.by_slot
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _is_fp32(rows: Rows | None) -> bool:
    return rows is not None and rows.data.dtype == torch.float32


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, params in (
        ("embed", _Embed), ("attention", _Attention), ("depthwise_norm", _DepthwiseNorm),
        ("last_conv", _LastConv),
    ):  # fmt: skip
        getattr(library, f"codec_{name}").argtypes = (POINTER(params), c_int, c_void_p)
    library.codec_gemm.argtypes = (POINTER(_Gemm), c_int, c_void_p, c_void_p, c_void_p)
    library.codec_unit.argtypes = (POINTER(_Gemm), c_int, c_int, c_void_p)
    library.codec_error.argtypes, library.codec_error.restype = (c_int,), c_char_p
    structures = (_Embed, _Gemm, _Attention, _DepthwiseNorm, _LastConv)
    if library.codec_param_bytes() != sum(ctypes.sizeof(params) for params in structures):
        raise RuntimeError(f"{path} was built from other sources than this package's")
    return library


def _exchange_size(op: GemmOp, streams: int) -> tuple[int, int]:
    """The floats of `partial` and the tiles of `arrived` (csrc/codec_segments.cuh) that a product needs
    on a GPU without clusters, for up to `streams` streams and any tile that it chooses."""
    if op.middle or op.segments == 1:
        return 0, 0
    columns = streams * op.source.rows
    return op.segments * partial_floats(op.m, columns), num_tiles(op.m, columns)


class Launcher:
    """Puts the launches of a plan on the current stream."""

    def __init__(self, plan: CodecPlan, library: Path) -> None:
        device = plan.state.device
        self._library = _load(library)
        self._gpu = torch.cuda.get_device_properties(device)
        self._frame_counts = plan.frame_counts
        self.input = torch.zeros(plan.max_streams, 1 + NUM_CODEBOOKS, dtype=torch.int32, device=device)
        """int32 [max_streams, 17]: slot and codes of every stream, read by the first launch."""
        self._calls = torch.zeros(plan.max_streams, 2, dtype=torch.int32, device=device)
        floats, tiles = 0, 0
        if self._library.codec_meets_in_memory():
            sizes = [_exchange_size(op, plan.max_streams) for op in plan.ops if isinstance(op, GemmOp)]
            floats, tiles = map(max, zip(*sizes, strict=True))
        self._partial = torch.zeros(floats, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def launch(self, op: Op, streams: int) -> None:
        """Queue a launch for the first `streams` rows of `input`. Raises `RuntimeError`."""
        error = self._launch(op, streams, torch.cuda.current_stream(self.input.device).cuda_stream)
        if error:
            text = self._library.codec_error(error).decode()
            raise RuntimeError(f"the codec's {type(op).__name__} was not launched: {text}")

    @singledispatchmethod
    def _launch(self, op: Op, streams: int, cuda_stream: int) -> int:
        raise TypeError(type(op).__name__)

    @_launch.register
    def _(self, op: EmbedOp, streams: int, cuda_stream: int) -> int:
        params = _Embed(
            _pointer(self.input), _pointer(self._frame_counts), _pointer(self._calls),
            _pointer(op.table), op.codebook_size, _rows(op.out),
        )  # fmt: skip
        return self._library.codec_embed(byref(params), streams, cuda_stream)

    @_launch.register
    def _(self, op: GemmOp, streams: int, cuda_stream: int) -> int:
        columns = streams * op.source.rows
        params = _Gemm(
            _pointer(op.weights), _pointer(self._calls), _rows(op.source), op.history, op.dilation,
            op.taps, op.m, op.k_blocks, columns, op.segments, _pointer(op.mul), _pointer(op.add),
            _pointer(op.squares_in), 0 if op.squares_in is None else op.squares_in.shape[1],
            1 / op.norm_dim, op.eps, _rows(op.residual), _rows(op.raw), _rows(op.out),
            _is_fp32(op.residual), _is_fp32(op.raw), op.upsample, op.m // op.upsample,
            op.activation, _pointer(op.act_a), _pointer(op.act_b),
            *map(_pointer, op.middle or (None,) * 3), _pointer(op.squares_out),
        )  # fmt: skip
        if op.middle:
            shape = choose_unit_shape(
                op.m, op.source.rows, streams, self._gpu.multi_processor_count,
                self._library.codec_sm_shared_bytes(),
            )  # fmt: skip
            return self._library.codec_unit(byref(params), *shape, cuda_stream)
        tile_n = choose_tile(op.m, columns, op.segments, self._gpu.multi_processor_count)
        return self._library.codec_gemm(
            byref(params), tile_n, _pointer(self._partial), _pointer(self._arrived), cuda_stream
        )

    @_launch.register
    def _(self, op: AttentionOp, streams: int, cuda_stream: int) -> int:
        params = _Attention(
            _pointer(self._calls), _pointer(op.qkv.data), _rows(op.kv), _pointer(op.rope),
            _pointer(op.out.data), op.heads, op.kv_heads, op.head_dim, op.window, op.scale,
        )  # fmt: skip
        return self._library.codec_attention(byref(params), streams, cuda_stream)

    @_launch.register
    def _(self, op: DepthwiseNormOp, streams: int, cuda_stream: int) -> int:
        params = _DepthwiseNorm(
            _pointer(self._calls), _rows(op.source), len(op.weights), op.real_channels,
            _pointer(op.weights), _pointer(op.bias), _pointer(op.norm_weight),
            _pointer(op.norm_bias), op.eps, _pointer(op.out.data),
        )  # fmt: skip
        return self._library.codec_depthwise_norm(byref(params), streams, cuda_stream)

    @_launch.register
    def _(self, op: LastConvOp, streams: int, cuda_stream: int) -> int:
        params = _LastConv(
            _pointer(self._calls), _rows(op.source), _pointer(op.weights), op.bias,
            _pointer(op.pcm),
        )  # fmt: skip
        return self._library.codec_last_conv(byref(params), streams, cuda_stream)


# ---------------------------------------------------------------------------- the stream


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
