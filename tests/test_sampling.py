"""Draws: Philox against its published vectors, truncation and distribution against Hugging Face."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from qwen_megakernel.config import SamplingParams
from qwen_megakernel.model.sampling import (
    SamplingBatch,
    draw,
    gumbel_noise,
    philox4x32,
    process_logits,
    split_seed,
)

CPU = torch.device("cpu")
NUM_DRAWS = 30_000


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in words] == expected


def noise_for(seed: int, frames: torch.Tensor, vocab_size: int, codebook: int = 0) -> torch.Tensor:
    seeds = torch.tensor([split_seed(seed)]).expand(len(frames), 2)
    return gumbel_noise(seeds, frames, torch.tensor([codebook]), vocab_size)[:, 0]


@functools.cache
def many_draws() -> torch.Tensor:
    """The noise of `NUM_DRAWS` frames. A smaller vocabulary has its first columns."""
    return noise_for(1234, torch.arange(NUM_DRAWS), 200)


@pytest.fixture(scope="module")
def stats():
    """`scipy.stats`, whose import takes a second: not in each process that reads this file."""
    return pytest.importorskip("scipy.stats")


def test_noise_is_gumbel_and_a_function_of_its_counters_alone(stats):
    noise = noise_for(7, torch.arange(200), 500)
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    assert torch.equal(noise_for(7, torch.tensor([11]), 500)[0], noise[11])
    assert torch.equal(noise_for(7, torch.tensor([11]), 333)[0], noise[11, :333])
    for other in (noise_for(8, torch.tensor([11]), 500), noise_for(7, torch.tensor([11]), 500, 1)):
        assert not torch.equal(other[0], noise[11])


def test_high_word_of_the_seed_matters():
    frames = torch.tensor([0])
    assert not torch.equal(noise_for(1, frames, 8), noise_for(1 + (1 << 32), frames, 8))


def hf_scores(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """The scores from which Hugging Face would sample; logits [vocabulary]."""
    from transformers.generation import logits_process as hf

    ids, scores = torch.tensor([seen], dtype=torch.int64), logits[None].clone()
    if seen and params.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0]


def our_scores(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, seen] = True
    batch = SamplingBatch.gather([params], len(logits), CPU)
    return process_logits(logits[None], batch, mask)[0]


def lively_logits(vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


TIES = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 0.5, -1.0, -1.0])
ONE_LEFT = torch.tensor([9.0, 0.0, -1.0, -torch.inf, -2.0])
CASES = {
    "official defaults": (lively_logits(200, 0), SamplingParams(0.9, 50, 1.0, 1.05), [3, 60]),
    "original defaults": (lively_logits(200, 1), SamplingParams(0.3, 15, 1.0, 1.05), [3]),
    "top-k with ties": (TIES, SamplingParams(1.0, 2, 1.0), []),
    "top-k beyond the vocabulary": (TIES, SamplingParams(1.0, 99, 1.0), []),
    "top-k off": (TIES, SamplingParams(1.0, 0, 1.0), []),
    "top-p": (lively_logits(100, 2), SamplingParams(1.0, 0, 0.8), []),
    "top-p tiny keeps one": (lively_logits(100, 3), SamplingParams(1.0, 0, 1e-6), []),
    "top-p almost all": (lively_logits(100, 4), SamplingParams(1.0, 0, 0.999999), []),
    "top-k and top-p": (lively_logits(100, 5), SamplingParams(0.7, 20, 0.9, 1.3), [1, 2, 3]),
    "cold": (lively_logits(100, 6), SamplingParams(0.01, 50, 1.0), []),
    "hot": (lively_logits(100, 7), SamplingParams(5.0, 0, 1.0), []),
    "one left by top-k": (lively_logits(100, 8), SamplingParams(1.0, 1, 1.0), []),
    "one left by suppression": (ONE_LEFT, SamplingParams(1.0, 0, 0.5), []),
    "penalty below one": (lively_logits(50, 9), SamplingParams(1.0, 0, 1.0, 0.5), [0, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_truncation_is_hugging_face_s(case):
    logits, params, seen = CASES[case]
    torch.testing.assert_close(
        our_scores(logits, params, seen), hf_scores(logits, params, seen), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_hugging_face_s_distribution(stats, case):
    logits, params, seen = CASES[case]
    probabilities = hf_scores(logits, params, seen).double().softmax(-1)
    scores = our_scores(logits, params, seen).expand(NUM_DRAWS, -1)
    noise = many_draws()[:, : len(logits)]
    drawn = draw(scores, torch.full((NUM_DRAWS, 1), params.temperature), noise)
    counts = torch.bincount(drawn, minlength=len(logits)).double()
    assert counts[probabilities == 0].sum() == 0, "a code outside the truncated set was drawn"
    expected = probabilities * NUM_DRAWS
    common = expected >= 5  # the chi-squared test's usual condition; the rest is pooled
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < 5:  # too few to pool: check that they are rare
        assert observed[-1] < 25
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    if len(observed) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_chi_square_notices_a_wrong_temperature(stats):
    logits = lively_logits(50, 3)
    scores = our_scores(logits, SamplingParams(1.05, 0, 1.0), []).expand(NUM_DRAWS, -1)
    drawn = draw(scores, torch.ones(NUM_DRAWS, 1), many_draws()[:, :50])
    expected = logits.double().softmax(-1) * NUM_DRAWS
    keep = expected >= 5
    counts = torch.bincount(drawn, minlength=50).double()[keep]
    expected = expected[keep] * counts.sum() / expected[keep].sum()
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue < 1e-6


def test_zero_temperature_takes_the_most_likely():
    logits, params = lively_logits(300, 1), SamplingParams(0.0, 15, 1.0)
    noise = noise_for(5, torch.arange(64), 300)
    drawn = draw(our_scores(logits, params, []).expand(64, -1), torch.zeros(64, 1), noise)
    assert (drawn == logits.argmax()).all()


def test_streams_with_different_parameters_share_a_batch():
    logits = torch.stack([lively_logits(120, s) for s in range(5)])
    params = [
        SamplingParams(0.3, 15, 1.0, 1.05),
        SamplingParams(0.9, 0, 0.7),
        SamplingParams(0.0, 1, 1.0),
        SamplingParams(1.0, 120, 1.0, 2.0),
        SamplingParams(2.0, 50, 0.95),
    ]
    seen = torch.rand(5, 120, generator=torch.Generator().manual_seed(0)) < 0.2
    suppress = torch.zeros(5, 120, dtype=torch.bool)
    suppress[1, 7] = True
    together = process_logits(logits, SamplingBatch.gather(params, 120, CPU), seen, suppress)
    for i, one in enumerate(params):
        batch = SamplingBatch.gather([one], 120, CPU)
        alone = process_logits(logits[i : i + 1], batch, seen[i : i + 1], suppress[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert together[1, 7] == -torch.inf


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
     {"repetition_penalty": 0.0}],
)  # fmt: skip
def test_parameters_out_of_range_are_named(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*allowed"):
        SamplingParams(**values)
