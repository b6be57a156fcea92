"""Draws a code from its logits: Gumbel-max over the same truncated set as Hugging Face, counted draws.

The order is that of Hugging Face `generate`: repetition penalty, suppression (with EOS before the
minimum length), temperature, top-k (ties kept), top-p. The draw adds Gumbel noise and takes the maximum.
This samples the same distribution as softmax and multinomial. The noise of code `index` of `codebook` in
`frame` is a pure function of (seed, frame, codebook, index), so a turn's codes do not depend on slot,
batch or backend. The function is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qwen_megakernel.config import NUM_CODEBOOKS, SamplingParams

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_UNIFORM_BITS = 23
"""Bits of a draw. (k + 0.5) / 2**23 is exact in fp32 for every k, and never 0 or 1."""


def _mul_hi(a: Tensor, b: int) -> Tensor:
    """High 32 bits of a 32 x 32 bit product. No step leaves the positive range of int64."""
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
        frames: int64 [n], the number of each stream's frame.
        codebooks: int64 [c], 0..15.
        vocab_size: indices of each codebook.

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


class Draws:
    """The noise of one stream, made for several frames at a time.

    To make it takes about a hundred small operations, for one frame as for several.
    """

    AT_A_TIME = 8

    def __init__(self, seed: int, talker_vocab: int, predictor_vocab: int, device: torch.device) -> None:
        words = torch.tensor([split_seed(seed)], dtype=torch.int64, device=device)
        self._seeds = words.expand(self.AT_A_TIME, -1)
        self._sizes, self._device = (talker_vocab, predictor_vocab), device
        self._first = -self.AT_A_TIME
        self._noise: tuple[Tensor, Tensor] | None = None

    def of(self, frame: int) -> tuple[Tensor, Tensor]:
        """fp32 [1, talker vocabulary] for code 0, and [1, 15, predictor vocabulary] for the others."""
        if not 0 <= frame - self._first < self.AT_A_TIME:
            self._first = frame
            frames = torch.arange(frame, frame + self.AT_A_TIME, device=self._device)
            codebooks = torch.arange(NUM_CODEBOOKS, device=self._device)
            self._noise = tuple(
                gumbel_noise(self._seeds, frames, part, size)
                for part, size in zip(codebooks.split((1, NUM_CODEBOOKS - 1)), self._sizes, strict=True)
            )
        assert self._noise is not None  # made above by the first call
        here = slice(frame - self._first, frame - self._first + 1)
        return self._noise[0][here, 0], self._noise[1][here]


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit words of a 64-bit seed."""
    return seed & _MASK32, seed >> 32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of n streams. Every tensor is [n, 1]."""

    temperature: Tensor
    """fp32. 0 is greedy."""
    divisor: Tensor
    """fp32, the number by which logits are divided: the temperature, or 1 if that is 0."""
    kth: Tensor
    """int64, the index of the last code that is kept among the `max_top_k` best."""
    keeps_all: Tensor | None
    """bool, the streams that truncate nothing. None if there are none."""
    tail_mass: Tensor
    """fp32, 1 - top_p, rounded once as in Hugging Face."""
    repetition_penalty: Tensor
    """fp32."""
    max_top_k: int
    """The largest top-k, or 0 if no stream truncates."""
    uses_top_p: bool
    uses_penalty: bool

    @classmethod
    def gather(
        cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device
    ) -> SamplingBatch:
        """Stack the parameters of streams. A top-k of 0 or beyond the vocabulary keeps all codes."""
        top_k = [min(p.top_k, vocab_size) or vocab_size for p in params]
        most = 0 if min(top_k) == vocab_size else max(top_k)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            temperature=column([p.temperature for p in params]),
            divisor=column([p.temperature or 1.0 for p in params]),
            kth=column([k - 1 for k in top_k], torch.int64),
            keeps_all=column([k == vocab_size for k in top_k], torch.bool)
            if vocab_size in top_k
            else None,
            tail_mass=column([1.0 - p.top_p for p in params]),
            repetition_penalty=column([p.repetition_penalty for p in params]),
            max_top_k=most,
            uses_top_p=any(p.top_p < 1.0 for p in params),
            uses_penalty=any(p.repetition_penalty != 1.0 for p in params),
        )


@lru_cache(maxsize=64)
def gather_sampling(
    params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device
) -> SamplingBatch:
    """`SamplingBatch.gather`, cached for successive frames of the same streams."""
    return SamplingBatch.gather(params, vocab_size, device)


def process_logits(
    logits: Tensor, batch: SamplingBatch, seen: Tensor | None = None, suppress: Tensor | None = None
) -> Tensor:
    """The truncated and scaled logits from which a code is drawn.

    Args:
        logits: fp32 [n, vocabulary].
        batch: parameters of the n streams.
        seen: bool [n, vocabulary], codes that the stream has produced, for the repetition penalty.
        suppress: bool [n or 1, vocabulary], codes that must not be drawn.

    Returns:
        fp32 [n, vocabulary], minus infinity for excluded codes.
    """
    scores = logits
    if seen is not None and batch.uses_penalty:
        penalty = batch.repetition_penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    if suppress is not None:
        scores = scores.masked_fill(suppress, -torch.inf)
    scores = scores / batch.divisor
    if batch.max_top_k:
        best = torch.topk(scores, batch.max_top_k, dim=-1).values
        out = scores < best.gather(-1, batch.kth)
        if batch.keeps_all is not None:
            out &= ~batch.keeps_all
        scores = scores.masked_fill(out, -torch.inf)
    if batch.uses_top_p:
        scores = scores.masked_fill(_beyond_top_p(scores, batch.tail_mass), -torch.inf)
    return scores


def _beyond_top_p(scores: Tensor, tail_mass: Tensor) -> Tensor:
    """The codes that make up the least likely `tail_mass`, as Hugging Face's TopPLogitsWarper removes
    them."""
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= tail_mass
    removed[:, -1].fill_(False)  # the most likely code always stays
    removed &= tail_mass > 0
    return torch.zeros_like(removed).scatter(-1, order, removed)


def draw(scores: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """Draw codes int64 [n]: the arg-max of scores plus noise, or of scores alone if the temperature is
    0.

    Args:
        scores: fp32 [n, vocabulary] from `process_logits`.
        temperature: fp32 [n, 1].
        noise: fp32 [n, vocabulary], Gumbel.
    """
    return torch.where(temperature > 0, scores + noise, scores).argmax(dim=-1)
