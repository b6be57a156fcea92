"""The parameters of the codec's kernels, as csrc/codec_params.h has them.

tests/test_param_layout.py compares them field by field.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p


class Rows(ctypes.Structure):
    """`Rows`: where the rows of a layer's streams lie."""

    _fields_ = (
        ("data", c_void_p), ("stride", c_int64), ("frames", c_int), ("rows", c_int),
        ("channels", c_int), ("by_slot", c_int),
    )  # fmt: skip


class Embed(ctypes.Structure):
    """`Embed`."""

    _fields_ = (
        ("input", c_void_p), ("frame_counts", c_void_p), ("calls", c_void_p), ("table", c_void_p),
        ("codebook_size", c_int), ("out", Rows),
    )  # fmt: skip


class Gemm(ctypes.Structure):
    """`Gemm`: a dense layer, or a residual unit."""

    _fields_ = (
        ("weights", c_void_p), ("calls", c_void_p), ("source", Rows), ("history", c_int),
        ("dilation", c_int), ("taps", c_int), ("m", c_int), ("k_blocks", c_int),
        ("columns", c_int), ("segments", c_int), ("mul", c_void_p), ("add", c_void_p),
        ("squares_in", c_void_p), ("square_parts", c_int), ("inverse_dim", c_float),
        ("eps", c_float), ("residual", Rows), ("raw", Rows), ("out", Rows),
        ("residual_fp32", c_int), ("raw_fp32", c_int), ("upsample", c_int),
        ("out_channels", c_int), ("activation", c_int), ("act_a", c_void_p), ("act_b", c_void_p),
        ("middle_add", c_void_p), ("middle_a", c_void_p), ("middle_b", c_void_p),
        ("squares_out", c_void_p),
    )  # fmt: skip


class Attention(ctypes.Structure):
    """`Attention`."""

    _fields_ = (
        ("calls", c_void_p), ("qkv", c_void_p), ("kv", Rows), ("rope", c_void_p),
        ("out", c_void_p), ("heads", c_int), ("kv_heads", c_int), ("head_dim", c_int),
        ("window", c_int), ("scale", c_float),
    )  # fmt: skip


class DepthwiseNorm(ctypes.Structure):
    """`DepthwiseNorm`."""

    _fields_ = (
        ("calls", c_void_p), ("source", Rows), ("taps", c_int), ("real_channels", c_int),
        ("weights", c_void_p), ("bias", c_void_p), ("norm_weight", c_void_p),
        ("norm_bias", c_void_p), ("eps", c_float), ("out", c_void_p),
    )  # fmt: skip


class LastConv(ctypes.Structure):
    """`LastConv`."""

    _fields_ = (
        ("calls", c_void_p), ("source", Rows), ("weights", c_void_p),
        ("bias", c_float), ("pcm", c_void_p),
    )  # fmt: skip


class SegmentedGemm(Gemm):
    """`SegmentedGemm`: what a product is where the GPU has no clusters."""

    _fields_ = (("partial", c_void_p), ("arrived", c_void_p))  # type: ignore[assignment]


class UnitLaunch(ctypes.Structure):
    """`UnitLaunch`: a residual unit in one launch."""

    _fields_ = (("gemm", Gemm), ("stages", c_int))
