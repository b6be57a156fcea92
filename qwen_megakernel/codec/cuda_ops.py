"""The launches that make up a codec frame, as data: what each reads, computes and writes.

csrc/codec_params.h has the same structures with pointers in place of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

__all__ = [
    "Activation",
    "AttentionOp",
    "DepthwiseNormOp",
    "EmbedOp",
    "GemmOp",
    "LastConvOp",
    "Op",
    "Rows",
]


class Activation(IntEnum):
    """Mirrors `Activation` of codec_params.h."""

    NONE = 0
    SNAKE = 1
    GELU = 2
    GLU = 3
    NORM_WEIGHT = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of every stream's frame, or a ring of frames in every slot's state."""

    data: Tensor
    """[streams or slots, frames * rows, channels], the last two contiguous."""
    rows: int
    """Time steps of one frame."""
    by_slot: bool = False


@dataclass(frozen=True, slots=True)
class EmbedOp:
    """Turns codes into the sum of their 16 projected vectors, and counts the slots' frames."""

    table: Tensor
    """float32 [16 * codebook_size, channels]."""
    codebook_size: int
    out: Rows


@dataclass(frozen=True, slots=True)
class GemmOp:
    """out = act(norm(W x) * mul + add + residual). See `Gemm` of codec_params.h."""

    weights: Tensor
    source: Rows
    taps: int
    m: int
    segments: int
    dilation: int = 1
    upsample: int = 1
    mul: Tensor | None = None
    add: Tensor | None = None
    squares_in: Tensor | None = None
    norm_dim: int = 1
    eps: float = 0.0
    residual: Rows | None = None
    raw: Rows | None = None
    out: Rows | None = None
    activation: Activation = Activation.NONE
    act_a: Tensor | None = None
    act_b: Tensor | None = None
    squares_out: Tensor | None = None
    middle: tuple[Tensor, Tensor, Tensor] | None = None
    """If set, this is a whole residual unit: the bias and the two vectors of the snake between its two
    products."""

    @property
    def history(self) -> int:
        """How many rows the first tap looks back."""
        return (self.taps - 1) * self.dilation

    @property
    def k_blocks(self) -> int:
        """Blocks of k in the packed weights."""
        return self.weights.shape[1]


@dataclass(frozen=True, slots=True)
class AttentionOp:
    """Attention over the window. Also stores the new key and value in the ring."""

    qkv: Rows
    kv: Rows
    rope: Tensor
    """float32 [window, half, 2]: cosine and sine by distance."""
    out: Rows
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    scale: float


@dataclass(frozen=True, slots=True)
class DepthwiseNormOp:
    """Depthwise convolution and LayerNorm of a ConvNeXt block."""

    source: Rows
    weights: Tensor
    """float32 [taps, channels]."""
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    real_channels: int
    out: Rows


@dataclass(frozen=True, slots=True)
class LastConvOp:
    """The last convolution, to one channel. Clamps the samples."""

    source: Rows
    weights: Tensor
    """float32 [taps, channels]."""
    bias: float
    pcm: Tensor
    """float32 [streams, samples]."""


Op = EmbedOp | GemmOp | AttentionOp | DepthwiseNormOp | LastConvOp
