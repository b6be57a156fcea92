"""Launches of the codec's kernels, one for each operation of a plan.

A frame's launches are captured in CUDA graphs: what a launch costs the host matters at the start alone.
"""

from __future__ import annotations

import ctypes
from functools import singledispatchmethod
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from qwen_megakernel.codec import cuda_params as params
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
    attention_bytes,
    choose_tile,
    choose_unit_shape,
    num_tiles,
    partial_floats,
)
from qwen_megakernel.config import NUM_CODEBOOKS
from qwen_megakernel.cuda_driver import Launch, load_module


def _rows(rows: Rows | None) -> params.Rows:
    if rows is None:
        return params.Rows()
    _, length, channels = rows.data.shape
    return params.Rows(
        rows.data.data_ptr(), rows.data.stride(0), length // rows.rows, rows.rows, channels, rows.by_slot
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _is_fp32(rows: Rows | None) -> bool:
    return rows is not None and rows.data.dtype == torch.float32


def check_sizes(path: Path, facts: dict[str, int]) -> None:
    """Raise `RuntimeError` unless a built kernel's structures have the sizes of `cuda_params`."""
    gemm = params.Gemm if facts.get("has_clusters") else params.SegmentedGemm
    mirrored: dict[str, type[ctypes.Structure]] = {
        "gemm": gemm, "unit": params.UnitLaunch, "embed": params.Embed,
        "attention": params.Attention, "depthwise_norm": params.DepthwiseNorm,
        "last_conv": params.LastConv,
    }  # fmt: skip
    for name, structure in mirrored.items():
        if facts.get(f"{name}_bytes") != ctypes.sizeof(structure):
            raise RuntimeError(f"{path} was built from other sources than this package's: {name}")


def _exchange_size(op: GemmOp, streams: int) -> tuple[int, int]:
    """(floats, tiles) that a product of at most so many streams exchanges where there are no clusters:
    `partial` and `arrived` of csrc/codec_segments.cuh, for whichever tile it chooses."""
    if op.middle or op.segments == 1:
        return 0, 0
    columns = streams * op.source.rows
    return op.segments * partial_floats(op.m, columns), num_tiles(op.m, columns)


class Launcher:
    """Puts the launches of a plan on the current stream."""

    def __init__(self, plan: CodecPlan, library: Path) -> None:
        device = plan.state.device
        self._module = load_module(library, device)
        self._facts = self._module.facts
        check_sizes(library, self._facts)
        for name in self._module.cubin.functions:  # a build may be for less than the GPU has
            self._module.limit_shared_memory(name, self._facts["sm_shared_bytes"])
        self._gpu = torch.cuda.get_device_properties(device)
        self._frame_counts = plan.frame_counts
        self.input = torch.zeros(plan.max_streams, 1 + NUM_CODEBOOKS, dtype=torch.int32, device=device)
        """int32 [max_streams, 17]: slot and codes of every stream, read by the first launch."""
        self._calls = torch.zeros(plan.max_streams, 2, dtype=torch.int32, device=device)
        floats, tiles = 0, 0
        if not self._facts["has_clusters"]:
            sizes = [_exchange_size(op, plan.max_streams) for op in plan.ops if isinstance(op, GemmOp)]
            floats, tiles = map(max, zip(*sizes, strict=True))
        self._partial = torch.zeros(floats, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def launch(self, op: Op, streams: int) -> None:
        """One launch for the first `streams` rows of `input`; raises RuntimeError."""
        with torch.cuda.device(self.input.device):
            try:
                self._prepare(op, streams)(torch.cuda.current_stream().cuda_stream)
            except RuntimeError as error:
                text = f"the codec's {type(op).__name__} was not launched: {error}"
                raise RuntimeError(text) from error

    def _launch(
        self,
        name: str,
        parameters: ctypes.Structure,
        grid: tuple[int, int],
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> Launch:
        return Launch(
            self._module,
            self._module.kernel(name, shared_bytes),
            [parameters],
            grid=grid,
            threads=self._facts[f"{name}_threads"],
            shared_bytes=shared_bytes,
            early=bool(self._facts["has_clusters"]),
            cluster=cluster if self._facts["has_clusters"] else 1,
        )

    @singledispatchmethod
    def _prepare(self, op: Op, streams: int) -> Launch:
        raise TypeError(type(op).__name__)

    @_prepare.register
    def _(self, op: EmbedOp, streams: int) -> Launch:
        parameters = params.Embed(
            _pointer(self.input), _pointer(self._frame_counts), _pointer(self._calls),
            _pointer(op.table), op.codebook_size, _rows(op.out),
        )  # fmt: skip
        return self._launch("codec_embed", parameters, (streams, 1))

    @_prepare.register
    def _(self, op: GemmOp, streams: int) -> Launch:
        columns = streams * op.source.rows
        fields = (
            _pointer(op.weights), _pointer(self._calls), _rows(op.source), op.history, op.dilation,
            op.taps, op.m, op.k_blocks, columns, op.segments, _pointer(op.mul), _pointer(op.add),
            _pointer(op.squares_in), 0 if op.squares_in is None else op.squares_in.shape[1],
            1 / op.norm_dim, op.eps, _rows(op.residual), _rows(op.raw), _rows(op.out),
            _is_fp32(op.residual), _is_fp32(op.raw), op.upsample, op.m // op.upsample,
            op.activation, _pointer(op.act_a), _pointer(op.act_b),
            *map(_pointer, op.middle or (None,) * 3), _pointer(op.squares_out),
        )  # fmt: skip
        if op.middle:
            return self._prepare_unit(op, params.Gemm(*fields), streams)
        tile = choose_tile(op.m, columns, op.segments, self._gpu.multi_processor_count)
        name = f"codec_gemm_{tile}"
        grid = op.segments * ceil(op.m / self._facts["gemm_rows"]), ceil(columns / tile)
        parameters: ctypes.Structure = params.Gemm(*fields)
        if not self._facts["has_clusters"]:
            parameters = params.SegmentedGemm(*fields, _pointer(self._partial), _pointer(self._arrived))
        shared_bytes = self._facts[f"{name}_shared_bytes"]
        return self._launch(name, parameters, grid, shared_bytes, op.segments)

    def _prepare_unit(self, op: GemmOp, gemm: params.Gemm, streams: int) -> Launch:
        f = self._facts
        tile, stages = choose_unit_shape(
            op.m, op.source.rows, streams, self._gpu.multi_processor_count, f["sm_shared_bytes"]
        )
        name, unit = f"codec_unit_{op.m}_{tile}", f"codec_unit_{op.m}"
        if gemm.source.rows % tile or not 2 <= stages <= f["max_unit_stages"]:
            raise RuntimeError(f"a unit of {gemm.source.rows} rows, {tile} columns and {stages} stages")
        align = f["unit_slab_align"]
        slab = ceil((tile + op.history) * f[f"{unit}_row_bytes"] / align) * align
        shared_bytes = max(slab + stages * f[f"{unit}_stage_bytes"], f[f"{name}_tile_bytes"])
        grid = gemm.columns // tile, 1
        return self._launch(name, params.UnitLaunch(gemm, stages), grid, shared_bytes)

    @_prepare.register
    def _(self, op: AttentionOp, streams: int) -> Launch:
        parameters = params.Attention(
            _pointer(self._calls), _pointer(op.qkv.data), _rows(op.kv), _pointer(op.rope),
            _pointer(op.out.data), op.heads, op.kv_heads, op.head_dim, op.window, op.scale,
        )  # fmt: skip
        threads = self._facts["codec_attention_threads"]
        if op.head_dim > 4 * threads:
            raise RuntimeError(f"heads of {op.head_dim} channels, allowed: at most {4 * threads}")
        shared_bytes = attention_bytes(op.head_dim, op.window, threads)
        return self._launch("codec_attention", parameters, (op.heads, streams), shared_bytes)

    @_prepare.register
    def _(self, op: DepthwiseNormOp, streams: int) -> Launch:
        parameters = params.DepthwiseNorm(
            _pointer(self._calls), _rows(op.source), len(op.weights), op.real_channels,
            _pointer(op.weights), _pointer(op.bias), _pointer(op.norm_weight),
            _pointer(op.norm_bias), op.eps, _pointer(op.out.data),
        )  # fmt: skip
        grid = streams * op.source.rows, 1
        return self._launch("codec_depthwise_norm", parameters, grid, 4 * parameters.source.channels)

    @_prepare.register
    def _(self, op: LastConvOp, streams: int) -> Launch:
        parameters = params.LastConv(
            _pointer(self._calls), _rows(op.source), _pointer(op.weights), op.bias,
            _pointer(op.pcm),
        )  # fmt: skip
        grid = ceil(op.source.rows / self._facts["last_conv_samples"]), streams
        return self._launch("codec_last_conv", parameters, grid)
