"""Packs the codec's weights for the kernels of csrc/codec_*.cu: matrices in mma fragment order.

A layer becomes one matrix [outputs, taps * inputs], with the oldest tap first. Channels are padded with
zeros to whole pieces of 8, so a piece of 16 bytes never mixes two taps or the rows of two layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BLOCK",
    "PIECE",
    "conv_matrix",
    "interleave",
    "pack_fragments",
    "pad_channels",
    "pad_heads",
    "padded",
    "unit_block",
    "upsample_matrix",
]

PIECE = 8
"""The bf16 values in 16 bytes, which is the unit of every copy of activations."""
BLOCK = 64
"""k of one pipeline stage. Equals kBlock of codec_gemm.cuh."""
ROWS = 64
"""Outputs of one tile. Equals kM of Tile there."""


def padded(count: int) -> int:
    """`count` rounded up to whole pieces."""
    return -(-count // PIECE) * PIECE


def pad_channels(x: Tensor, dim: int) -> Tensor:
    """Pad dimension `dim` of `x` with zeros to whole pieces."""
    missing = padded(x.shape[dim]) - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (0, missing)) if missing else x


def conv_matrix(weight: Tensor) -> Tensor:
    """Convolution [outputs, inputs, taps] -> [padded outputs, taps * padded inputs]."""
    return pad_channels(pad_channels(weight.transpose(1, 2), 2), 0).flatten(1)


def upsample_matrix(weight: Tensor, factor: int) -> Tensor:
    """Transposed convolution [inputs, outputs, taps * factor] -> a matrix.

    The matrix is [factor * padded outputs, taps * padded inputs]. An input yields `factor` output steps.
    Step `phase` is row block `phase`, and its tap j reads the input j before.
    """
    taps = weight.shape[2] // factor
    by_tap = weight.unflatten(2, (taps, factor)).flip(2)  # [inputs, outputs, oldest first, phase]
    matrix = by_tap.permute(3, 1, 2, 0)
    return pad_channels(pad_channels(matrix, 3), 1).flatten(2).flatten(0, 1)


def pad_heads(x: Tensor, heads: int) -> Tensor:
    """Pad both halves of every head in dimension 0 of `x`, heads * head_dim, to whole pieces.

    RoPE rotates the two halves against each other, so each begins with a piece of its own.
    """
    return pad_channels(x.unflatten(0, (heads, 2, -1)), 2).flatten(0, 2)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Interleave the rows of two matrices [n, k]. n is padded to whole pieces: [2 * padded n, k]."""
    return torch.stack((pad_channels(gate, 0), pad_channels(up, 0)), 1).flatten(0, 1)


def pack_fragments(matrix: Tensor, rows: int = ROWS, columns: int = BLOCK) -> Tensor:
    """[m, k] -> bf16 [m / rows, k / columns, rows / 16, columns / 16, 32, 8], padded with zeros.

    One bulk copy fetches a tile of rows x columns. In each 16 x 16 tile of it, lane 4 g + q holds 16
    bytes: rows g and g + 8 at columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. This is the A operand of
    mma.m16n8k16.
    """
    m, k = matrix.shape
    full = F.pad(matrix, (0, -k % columns, 0, -m % rows)).to(torch.bfloat16)
    shape = (len(full) // rows, rows // 16, 2, 8, full.shape[1] // columns, columns // 16, 2, 4, 2)
    tiles = full.reshape(shape).permute(0, 4, 1, 5, 3, 7, 6, 2, 8)
    return tiles.reshape(*tiles.shape[:4], 32, 8).contiguous()


def unit_block(channels: int) -> int:
    """k of one stage of a residual unit's weights: a whole tap of 96 channels, or a third of one of
    192."""
    return BLOCK if channels % BLOCK == 0 else channels
