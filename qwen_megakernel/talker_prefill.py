"""Long prompts through the talker in PyTorch: one CUDA graph for up to 128 rows at a time.

The frame kernel takes eight rows a launch, and reads all weights for each. From a few dozen rows
on it is faster to read them once. The graph has its own keys and values, as far as it can look
back; a slot's are copied in before it runs, and the new ones out after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import TalkerConfig
from qwen_megakernel.cuda_graphs import capture
from qwen_megakernel.model import DecoderLayer, Talker, mrope_tables

ROWS = 128
"""Rows of a run; fewer take as long."""
MAX_KEYS = 1024
"""Positions the graph can look back over, its own rows included."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """One layer's, products of one input joined."""

    input_norm: Tensor
    qkv: Tensor
    """[(heads + 2 kv_heads) * head_dim, hidden]."""
    qk_norm: Tensor
    """[heads + kv_heads, head_dim]."""
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    """[2 * intermediate, hidden]."""
    down: Tensor

    @classmethod
    def of(cls, layer: DecoderLayer, config: TalkerConfig) -> _Weights:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm = attention.q_norm.weight.expand(config.num_heads, -1)
        k_norm = attention.k_norm.weight.expand(config.num_kv_heads, -1)
        return cls(
            input_norm=layer.input_layernorm.weight,
            qkv=torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]),
            qk_norm=torch.cat([q_norm, k_norm]),
            o=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
        )


class TalkerPrefill:
    """Keys and values of prompt rows, into the caches of a backend."""

    @torch.inference_mode()
    def __init__(self, talker: Talker, config: TalkerConfig, k_cache: Tensor, v_cache: Tensor) -> None:
        """Join the weights; on a GPU, capture the graph.

        Args:
            talker: its layers are read, and only what is not copied is kept.
            config: the talker's.
            k_cache, v_cache: [layers, slots, kv_heads, positions, head_dim], of the weights' dtype.
        """
        self._config, self._caches = config, (k_cache, v_cache)
        self._layers = [_Weights.of(layer, config) for layer in talker.model.layers]
        device, dtype = k_cache.device, k_cache.dtype
        self.num_keys = min(MAX_KEYS, max(k_cache.shape[3], ROWS))
        """Positions that a run can reach; it needs ROWS of them from its first on."""
        shape = (config.num_layers, config.num_kv_heads, self.num_keys, config.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._rows = torch.zeros(ROWS, config.hidden_size, dtype=dtype, device=device)
        self._begin = torch.zeros(1, dtype=torch.int64, device=device)
        axes = torch.arange(self.num_keys, device=device)
        cos, sin = mrope_tables(config, axes.expand(3, -1))
        sign = torch.ones_like(sin)
        sign[:, : config.head_dim // 2] = -1
        # Of the halves turned round, the first counts negative.
        self._cos, self._sin = cos.to(dtype)[:, None], (sin * sign).to(dtype)[:, None]
        self._axes = axes
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = capture(self._forward, device)

    def fits(self, begin: int) -> bool:
        """Whether rows from position `begin` on can be run."""
        return begin + ROWS <= self.num_keys

    @torch.inference_mode()
    def run(self, slot: int, rows: Tensor, begin: int) -> None:
        """Compute and keep the keys and values of rows.

        Args:
            slot: of the caches; its positions before `begin` are filled.
            rows: [n, hidden], 1 to ROWS of them.
            begin: the first one's position; see `fits`.
        """
        end = begin + len(rows)
        own = (self._keys, self._values)
        for mine, cache in zip(own, self._caches, strict=True):
            mine[:, :, :begin] = cache[:, slot, :, :begin]
        self._rows[: len(rows)] = rows
        self._begin.fill_(begin)
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()
        for mine, cache in zip(own, self._caches, strict=True):
            cache[:, slot, :, begin:end] = mine[:, :, begin:end]

    def _forward(self) -> None:
        """`_rows` at `_begin` and after, through all layers; rows beyond those given do no harm."""
        positions = self._begin + self._axes[:ROWS]
        cos, sin = self._cos[positions], self._sin[positions]
        hidden = torch.zeros(ROWS, self.num_keys, dtype=self._rows.dtype, device=self._rows.device)
        hidden.masked_fill_(self._axes > positions[:, None], -torch.inf)
        # The query heads of a group share their keys: they stand in for more rows.
        mask = hidden.repeat(self._config.num_heads // self._config.num_kv_heads, 1)
        x = self._rows
        for layer, weights in enumerate(self._layers):
            x = self._layer(layer, weights, x, positions, cos, sin, mask)

    def _layer(
        self,
        layer: int,
        w: _Weights,
        x: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """A decoder layer, [ROWS, hidden] -> the same; `DecoderLayer` in fewer launches."""
        c, keys, values = self._config, self._keys[layer], self._values[layer]
        normed = F.rms_norm(x, (c.hidden_size,), None, c.rms_norm_eps) * w.input_norm
        qkv = F.linear(normed, w.qkv).unflatten(-1, (-1, c.head_dim))
        qk, v = qkv.split((c.num_heads + c.num_kv_heads, c.num_kv_heads), dim=1)
        qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps) * w.qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(c.head_dim // 2, -1), sin)
        q, k = qk.split((c.num_heads, c.num_kv_heads), dim=1)
        keys.index_copy_(1, positions, k.transpose(0, 1))
        values.index_copy_(1, positions, v.transpose(0, 1))
        # [ROWS, kv_heads * group, dim] -> [kv_heads, group * ROWS, dim] and back.
        grouped = q.unflatten(1, (c.num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask)
        out = out[0].unflatten(1, (-1, ROWS)).permute(2, 0, 1, 3).flatten(1)
        x = torch.addmm(x, out, w.o.T)
        normed = F.rms_norm(x, (c.hidden_size,), None, c.rms_norm_eps) * w.post_norm
        gate, up = F.linear(normed, w.gate_up).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate) * up, w.down.T)
