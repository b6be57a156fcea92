"""Prompt beginnings that are kept: a later stream starts from them and speaks as the first did."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.decoding.prefix_cache import CAPACITY, MAX_ROWS, PrefixCache
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config


@pytest.fixture
def backend() -> TorchBackend:
    config = shape_config("tiny")
    talker = random_talker(config, "cpu")
    return TorchBackend(talker, config.talker, config.predictor, num_slots=3, max_positions=64)


def speak(
    backend: TorchBackend, slot: int, rows: torch.Tensor, shared: SharedRows | None
) -> torch.Tensor:
    backend.prefill(slot, rows, GenerationParams(seed=4), shared)
    codes = [backend.decode([slot], torch.zeros(1, rows.shape[1])) for _ in range(3)]
    backend.release(slot)
    return torch.cat(codes)


def test_a_kept_beginning_gives_the_same_codes_in_another_slot(backend):
    rows = torch.randn(12, 128)
    shared = SharedRows(key=1, count=9)
    first = speak(backend, 0, rows, shared)
    assert torch.equal(speak(backend, 2, rows, shared), first)


def test_the_kept_rows_are_used_and_only_for_their_key(backend):
    rows, others = torch.randn(12, 128), torch.randn(12, 128)
    first = speak(backend, 0, rows, SharedRows(key=1, count=9))
    others[9:] = rows[9:]
    assert torch.equal(speak(backend, 1, others, SharedRows(key=1, count=9)), first)
    assert not torch.equal(speak(backend, 1, others, SharedRows(key=2, count=9)), first)


def test_the_row_that_is_decoded_cannot_be_shared(backend):
    with pytest.raises(ValueError, match="12 rows are shared, allowed: 0 to 11"):
        backend.prefill(0, torch.randn(12, 128), GenerationParams(), SharedRows(key=1, count=12))


def test_the_least_recently_used_beginning_goes_first():
    config, device = shape_config("tiny").talker, torch.device("cpu")
    cache = PrefixCache(KvCache(config, 1, 4, dtype=torch.bfloat16, device=device))
    for key in range(CAPACITY):
        cache.keep(0, SharedRows(key, 2))
    assert cache.restore(0, SharedRows(0, 2))
    cache.keep(0, SharedRows(CAPACITY, 2))
    assert cache.restore(0, SharedRows(0, 2))
    assert not cache.restore(0, SharedRows(1, 2))


def test_long_beginnings_are_kept_within_a_bound():
    config, device = shape_config("tiny").talker, torch.device("cpu")
    rows = MAX_ROWS // 4
    cache = PrefixCache(KvCache(config, 1, MAX_ROWS + 1, dtype=torch.bfloat16, device=device))
    for key in range(5):
        cache.keep(0, SharedRows(key, rows))
    assert [cache.restore(0, SharedRows(key, rows)) for key in range(5)] == [False, *[True] * 4]
    cache.keep(0, SharedRows(5, MAX_ROWS + 1))
    assert not cache.restore(0, SharedRows(4, rows))
    assert cache.restore(0, SharedRows(5, MAX_ROWS + 1))
