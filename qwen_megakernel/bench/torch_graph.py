"""The bench's PyTorch rival: a whole frame, sampling included, as one CUDA graph.

It is no backend: its keys and values are as long as the position it is captured for, so a server would
need a graph for every length. That makes it faster than a backend could be, and so does its noise, which
is not counted for each stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig, SamplingParams, TransformerConfig
from qwen_megakernel.cuda_graphs import capture
from qwen_megakernel.model.sampling import SamplingBatch, draw, process_logits
from qwen_megakernel.model.talker import Attend, Talker, causal_attention, mrope_tables, rope_tables


class TorchFrame:
    """One frame of `streams` streams that are all at `position`, on tensors that stay where they are.

    A call decodes the frame after that of `rows`, and leaves the next one's there.
    """

    def __init__(self, talker: Talker, config: ModelConfig, streams: int, position: int) -> None:
        weight = talker.codec_head.weight
        self._talker, self._config, self._position = talker, config, position
        self._device, self._dtype = weight.device, weight.dtype
        self.rows = torch.zeros(streams, config.talker.hidden_size, device=self._device)
        """fp32 [streams, hidden], what is fed."""
        self.codes = torch.zeros(streams, NUM_CODEBOOKS, dtype=torch.int64, device=self._device)
        """int64 [streams, 16], out."""
        self._caches = self._cache(config.talker, streams, position + 1)
        self._predictor_caches = self._cache(config.predictor, streams, NUM_CODEBOOKS)
        here = torch.full((3, 1), position, device=self._device)
        self._rope = mrope_tables(config.talker, here)
        steps = torch.arange(NUM_CODEBOOKS, device=self._device)
        self._predictor_rope = rope_tables(config.predictor, steps)
        self._sampling = SamplingBatch.gather(
            [SamplingParams()] * streams, config.talker.vocab_size, self._device
        )

    def _cache(self, config: TransformerConfig, streams: int, length: int) -> tuple[Tensor, Tensor]:
        shape = (config.num_layers, streams, config.num_kv_heads, length, config.head_dim)
        return tuple(torch.randn(shape, device=self._device).to(self._dtype) for _ in range(2))

    @torch.inference_mode()
    def __call__(self) -> None:
        """Decode."""
        cos, sin = (table[None] for table in self._rope)
        attend = _attend(self._caches, self._position)
        hidden = self._talker(self.rows[:, None].to(self._dtype), cos, sin, attend)[:, 0]
        self.codes[:, 0] = self._draw(self._talker.codec_head(hidden))
        predictor, position = self._talker.code_predictor, 0
        rows = torch.stack([hidden, self._talker.model.codec_embedding(self.codes[:, 0])], dim=1)
        for codebook in range(1, NUM_CODEBOOKS):
            end = position + rows.shape[1]
            cos, sin = (table[None, position:end] for table in self._predictor_rope)
            x = predictor(rows, cos, sin, _attend(self._predictor_caches, position))
            self.codes[:, codebook] = self._draw(predictor.lm_head[codebook - 1](x[:, -1]))
            rows = predictor.model.codec_embedding[codebook - 1](self.codes[:, codebook])[:, None]
            position = end
        self.rows.copy_(self._talker.code_rows(self.codes))

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of one call, on a GPU; it works on this object's tensors and must not outlive it."""
        return capture(self, self._device)

    def _draw(self, logits: Tensor) -> Tensor:
        """Codes int64 [streams] from logits [streams, vocabulary], within the predictor's tables."""
        scores = process_logits(logits[:, : self._config.predictor.vocab_size].float(), self._sampling)
        return draw(scores, self._sampling.temperature, -torch.empty_like(scores).exponential_().log())


def _attend(caches: tuple[Tensor, Tensor], position: int) -> Attend:
    """Keys and values go to `position`; what is there and before is attended to."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = position + q.shape[1]
        for cache, new in zip(caches, (k, v), strict=True):
            cache[layer, :, :, position:end] = new.transpose(1, 2)
        k_cache, v_cache = (cache[layer, :, :, :end] for cache in caches)
        return causal_attention(q, k_cache, v_cache)

    return attend
