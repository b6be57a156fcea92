"""One code from its logits: Gumbel-max over the HF-exact truncated set, with counted draws.

The order is that of Hugging Face `generate`: repetition penalty, suppression (and EOS before
the minimum length), temperature, top-k (ties kept), top-p. The draw adds Gumbel noise and takes
the maximum, which samples the same distribution as softmax + multinomial. The noise of code
`index` of `codebook` in `frame` is a pure function of (seed, frame, codebook, index) through
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), so a turn's
codes do not depend on slot, batch or backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_megakernel.config import SamplingParams

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_UNIFORM_BITS = 23
"""Bits of a draw: k + 0.5 over 2**23 is exact in fp32 for every k, and never 0 or 1."""


def _mul_hi(a: Tensor, b: int) -> Tensor:
    """High 32 bits of a 32 x 32 bit product, without leaving int64's positive range."""
    return (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors holding unsigned 32-bit words, broadcastable.
        key: two such tensors.

    Returns:
        Four int64 tensors of unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi(c0, _M0), (c0 * _M0) & _MASK32
        hi1, lo1 = _mul_hi(c2, _M1), (c2 * _M1) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, frames: Tensor, codebooks: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise for every vocabulary index.

    Args:
        seeds: int64 [n, 2], low and high word of each stream's seed.
        frames: int64 [n], the frame each stream is at.
        codebooks: int64 [c], 0..15.
        vocab_size: indices per codebook.

    Returns:
        fp32 [n, c, vocab_size]. Index v is lane v % 4 of counter (v // 4, codebook, frame, 0).
    """
    blocks = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    counter = (
        blocks[None, None, :],
        codebooks[None, :, None],
        frames[:, None, None],
        torch.zeros((), dtype=torch.int64, device=seeds.device),
    )
    key = (seeds[:, 0, None, None], seeds[:, 1, None, None])
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)
    bits = words.flatten(-2)[..., :vocab_size] >> (32 - _UNIFORM_BITS)
    uniform = (bits.float() + 0.5) * 2.0**-_UNIFORM_BITS
    return -torch.log(-torch.log(uniform))


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit words of a 64-bit seed."""
    return seed & _MASK32, seed >> 32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of n streams side by side; every tensor is [n, 1]."""

    temperature: Tensor
    """fp32; 0 is greedy."""
    top_k: Tensor
    """int64; the vocabulary size where all are kept."""
    tail_mass: Tensor
    """fp32, 1 - top_p, rounded once as Hugging Face rounds it."""
    repetition_penalty: Tensor
    """fp32."""
    max_top_k: int
    """Largest of `top_k`, 0 when no stream truncates."""
    uses_top_p: bool
    uses_penalty: bool

    @classmethod
    def gather(
        cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device
    ) -> SamplingBatch:
        """Stack per-stream parameters; a top-k of 0 or beyond the vocabulary keeps all."""
        top_k = [min(p.top_k, vocab_size) or vocab_size for p in params]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column(top_k, torch.int64),
            tail_mass=column([1.0 - p.top_p for p in params], torch.float32),
            repetition_penalty=column([p.repetition_penalty for p in params], torch.float32),
            max_top_k=0 if min(top_k) == vocab_size else max(top_k),
            uses_top_p=any(p.top_p < 1.0 for p in params),
            uses_penalty=any(p.repetition_penalty != 1.0 for p in params),
        )


def process_logits(
    logits: Tensor, batch: SamplingBatch, seen: Tensor | None = None, suppress: Tensor | None = None
) -> Tensor:
    """The truncated, scaled logits that a draw is made from.

    Args:
        logits: fp32 [n, vocabulary].
        batch: parameters of the n streams.
        seen: bool [n, vocabulary], codes the stream has produced (for the repetition penalty).
        suppress: bool [n or 1, vocabulary], codes that may not be drawn.

    Returns:
        fp32 [n, vocabulary]; minus infinity where a code is out.
    """
    scores = logits
    if seen is not None and batch.uses_penalty:
        penalty = batch.repetition_penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    if suppress is not None:
        scores = scores.masked_fill(suppress, -torch.inf)
    scores = scores / torch.where(batch.temperature > 0, batch.temperature, 1.0)
    if batch.max_top_k:
        best = torch.topk(scores, batch.max_top_k, dim=-1).values
        kth = best.gather(-1, (batch.top_k - 1).clamp(max=batch.max_top_k - 1))
        keeps_all = batch.top_k == scores.shape[-1]
        scores = scores.masked_fill((scores < kth) & ~keeps_all, -torch.inf)
    if batch.uses_top_p:
        scores = scores.masked_fill(_beyond_top_p(scores, batch.tail_mass), -torch.inf)
    return scores


def _beyond_top_p(scores: Tensor, tail_mass: Tensor) -> Tensor:
    """Codes of the least likely `tail_mass`, as HF's TopPLogitsWarper removes them."""
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= tail_mass
    removed[:, -1] = False  # the most likely code always stays
    removed &= tail_mass > 0
    return torch.zeros_like(removed).scatter(-1, order, removed)


def draw(scores: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """Codes int64 [n]: the arg-max of scores plus noise; without noise where temperature is 0.

    Args:
        scores: fp32 [n, vocabulary] from `process_logits`.
        temperature: fp32 [n, 1].
        noise: fp32 [n, vocabulary], Gumbel.
    """
    return torch.where(temperature > 0, scores + noise, scores).argmax(dim=-1)
