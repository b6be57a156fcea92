"""Long prompts through the talker in PyTorch: a CUDA graph for up to 128 rows at a time.

The frame kernel takes eight rows a launch and reads all weights for each launch. From a few dozen rows
on it is faster to read them once. The graph has keys and values of its own, for all positions over
which it attends. A slot's rows are copied in before it runs, and the new rows are copied out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import TalkerConfig
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.model.cuda_graphs import capture
from qwen_megakernel.model.fused_layers import JoinedLayer, joined_rope
from qwen_megakernel.model.talker import Talker, mrope_tables

ROWS = 128
"""Rows of a run. A run with fewer rows takes as long."""
REACHES = (256, 1024)
"""Positions over which each graph attends, its own rows included: one graph for most prompts, and one
for the longest. Fewer keys take less time: 2.6 ms with 256, 3.2 ms with 1024 (H200, 0.6B shape)."""


class TalkerPrefill:
    """Computes the keys and values of prompt rows, into a backend's `KvCache`."""

    @torch.inference_mode()
    def __init__(
        self,
        talker: Talker,
        config: TalkerConfig,
        kv_cache: KvCache,
        layers: Sequence[JoinedLayer] | None = None,
    ) -> None:
        """Join the weights. On a GPU, capture the graphs.

        Args:
            talker: its layers are read, and their weights are kept.
            config: of the talker.
            kv_cache: has the weights' dtype and device.
            layers: the talker's layers, if they are joined already.
        """
        self._config, self._kv_cache = config, kv_cache
        self._layers = layers or [JoinedLayer(layer, config) for layer in talker.model.layers]
        device, dtype = kv_cache.device, kv_cache.dtype
        self.num_keys = min(REACHES[-1], max(kv_cache.max_positions, ROWS))
        """Positions that a run can reach. It needs ROWS positions from its first one on."""
        shape = (config.num_layers, config.num_kv_heads, self.num_keys, config.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._rows = torch.zeros(1, ROWS, config.hidden_size, dtype=dtype, device=device)
        self._begin = torch.zeros(1, dtype=torch.int64, device=device)
        self._axes = torch.arange(self.num_keys, device=device)
        self._cos, self._sin = joined_rope(*mrope_tables(config, self._axes.expand(3, -1)), dtype)
        self._runs: dict[int, Callable[[], None]] = {}
        """The runs by reach, the shortest first."""
        for reach in sorted({min(reach, self.num_keys) for reach in REACHES}):
            run = partial(self._forward, reach)
            self._runs[reach] = capture(run, device).replay if device.type == "cuda" else run

    def fits(self, begin: int) -> bool:
        """Whether a run can begin at position `begin`."""
        return begin + ROWS <= self.num_keys

    @torch.inference_mode()
    def run(self, slot: int, rows: Tensor, begin: int) -> None:
        """Compute the keys and values of rows and store them.

        Args:
            slot: of the cache. Its positions before `begin` are filled.
            rows: [n, hidden], 1 to ROWS of them.
            begin: the first row's position; see `fits`.
        """
        end = begin + len(rows)
        self._kv_cache.load(slot, self._keys[:, :, :begin], self._values[:, :, :begin])
        self._rows[0, : len(rows)] = rows
        self._begin.fill_(begin)
        next(run for reach, run in self._runs.items() if begin + ROWS <= reach)()
        self._kv_cache.store(slot, begin, self._keys[:, :, begin:end], self._values[:, :, begin:end])

    def _forward(self, reach: int) -> None:
        """Run `_rows`, which begin at `_begin`, through all layers. Unused rows are ignored."""
        positions = self._begin + self._axes[:ROWS]
        rope = self._cos[None, positions], self._sin[None, positions]
        mask = torch.zeros(ROWS, reach, dtype=self._rows.dtype, device=self._rows.device)
        mask.masked_fill_(self._axes[:reach] > positions[:, None], -torch.inf)
        # The query heads of a group share their keys, so attention takes them as additional rows.
        mask = mask.repeat(self._config.num_heads // self._config.num_kv_heads, 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys.index_copy_(1, positions, k[0].transpose(0, 1))
            values.index_copy_(1, positions, v[0].transpose(0, 1))
            # [ROWS, kv_heads * group, dim] -> [kv_heads, group * ROWS, dim] and back.
            grouped = q[0].unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3).flatten(1, 2)
            near_keys, near_values = keys[None, :, :reach], values[None, :, :reach]
            out = F.scaled_dot_product_attention(grouped[None], near_keys, near_values, attn_mask=mask)
            return out.unflatten(2, (-1, ROWS)).permute(0, 3, 1, 2, 4).flatten(2, 3)

        x = self._rows
        for index, layer in enumerate(self._layers):
            x = layer(x, rope, index, attend)
