"""Decoder layers as the backends run them: `talker.DecoderLayer` in less than half of its operations.

A frame of a small model is a thousand operations. Each of them takes no longer than its call, on a CPU
and on a GPU. So products of the same input are joined, and so are the norms and RoPE of queries and
keys. The modules' weights become views of the joined ones, so memory holds nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.config import TransformerConfig
from qwen_megakernel.model.batch_invariant import add_by_stream, linear_by_stream
from qwen_megakernel.model.talker import Attend, DecoderLayer

Rope = tuple[Tensor, Tensor]
"""Cosine and signed sine, from `joined_rope`."""


def joined_rope(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Rope:
    """Turn rotary tables [positions, head_dim] into the form of `JoinedLayer`: [positions, 1, head_dim].

    Half of the sines are negated. To rotate a vector, it is then enough to swap its halves.
    """
    sign = torch.ones_like(sin)
    sign[:, : sin.shape[1] // 2] = -1
    return cos.to(dtype)[:, None], (sin * sign).to(dtype)[:, None]


def _join(*products: nn.Linear) -> Tensor:
    """Stack the weights [out, in] of products of the same input along out."""
    joined = torch.cat([product.weight.detach() for product in products])
    for product, part in zip(
        products, joined.split([len(product.weight) for product in products]), strict=True
    ):
        product.weight.data = part
    return joined


class JoinedLayer:
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, layer: DecoderLayer, config: TransformerConfig) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._eps, self._half = config.rms_norm_eps, config.head_dim // 2
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._head_shape = (config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        self._input_norm = layer.input_layernorm.weight.detach()
        self._qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        self._qk_norm = torch.cat(
            [norms[0].expand(config.num_heads, -1), norms[1].expand(config.num_kv_heads, -1)]
        )
        self._o = attention.o_proj.weight.detach()
        self._post_norm = layer.post_attention_layernorm.weight.detach()
        self._gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self._inner = config.intermediate_size
        self._down = mlp.down_proj.weight.detach()

    def __call__(self, x: Tensor, rope: Rope, layer: int, attend: Attend) -> Tensor:
        """x: [n, t, hidden]. The result has the same shape. rope: of the rows, [n or 1, t, 1, head_dim]
        each."""
        qkv = linear_by_stream(rms_norm(x, self._input_norm, self._eps), self._qkv)
        qkv = qkv.view(*x.shape[:2], *self._head_shape)
        rotated, kv_heads = self._heads + self._kv_heads, self._kv_heads
        qk = rms_norm(qkv.narrow(2, 0, rotated), self._qk_norm, self._eps)
        qk = torch.addcmul(qk * rope[0], qk.roll(self._half, -1), rope[1])
        q, k = qk.narrow(2, 0, self._heads), qk.narrow(2, self._heads, kv_heads)
        attention_output = attend(layer, q, k, qkv.narrow(2, rotated, kv_heads))
        x = add_by_stream(x, attention_output.flatten(2), self._o)
        inner = linear_by_stream(rms_norm(x, self._post_norm, self._eps), self._gate_up)
        gate, up = inner.narrow(2, 0, self._inner), inner.narrow(2, self._inner, self._inner)
        return add_by_stream(x, F.silu(gate).mul_(up), self._down)


class JoinedLayers:
    """A stack of `JoinedLayer` and the final norm."""

    def __init__(self, layers: Iterable[DecoderLayer], norm: Tensor, config: TransformerConfig) -> None:
        """norm: the final norm's weight, [hidden]."""
        self.layers = [JoinedLayer(layer, config) for layer in layers]
        self._norm, self._eps = norm.detach(), config.rms_norm_eps

    def __call__(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Input rows [n, t, hidden] -> normed hidden states [n, t, hidden]. rope: as for
        `JoinedLayer`."""
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, index, attend)
        return rms_norm(x, self._norm, self._eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`talker.RMSNorm`. The norm is computed in fp32, and the weight [..., size] is applied in x's
    dtype."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight
