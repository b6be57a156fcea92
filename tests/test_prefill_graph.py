"""Prefill of long prompts gives the same keys and values as row by row."""

from __future__ import annotations

import pytest
import torch
from cached_rows import fill_with_nan, load_rows

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kv_cache import KvCache, Layout, plain, swizzled
from qwen_megakernel.decoding.prefill_graph import ROWS, TalkerPrefill
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

POSITIONS = 3 * ROWS


@pytest.fixture(scope="module", params=["tiny", "tiny-1.7b"])
def config(request):
    return shape_config(request.param)


def make_cache(config, device: str, dtype: torch.dtype, layout: Layout = plain) -> KvCache:
    """A cache without a written row: all rows are NaN."""
    cache = KvCache(config.talker, 3, POSITIONS, dtype=dtype, device=torch.device(device), layout=layout)
    fill_with_nan(cache)
    return cache


def make(config, device: str, dtype: torch.dtype):
    """The reference backend with its cache, and the prefill with a cache of its own."""
    talker = random_talker(config, device)
    for parameter in talker.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
    backend = TorchBackend(talker, config.talker, config.predictor, num_slots=3, max_positions=POSITIONS)
    cache = make_cache(config, device, dtype)
    return backend, cache, TalkerPrefill(talker, config.talker, cache)


def truth(backend, config, slot: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [layers, kv_heads, n, head_dim] of rows, from the reference backend."""
    backend.prefill(slot, torch.cat([rows, rows[:1]]), GenerationParams())
    backend.release(slot)
    return load_rows(backend.kv_cache, config.talker, slot, len(rows))


@pytest.mark.parametrize(
    "parts",
    [(1,), (40,), (ROWS,), (9, 60), (ROWS, ROWS), (200 - ROWS, ROWS, 50), (ROWS, ROWS, 30)],
)  # the last one's last rows are beyond the shorter reach
def test_keys_and_values_are_the_specification_s(config, parts):
    backend, cache, prefill = make(config, "cpu", torch.float32)
    rows = torch.randn(sum(parts), config.talker.hidden_size)
    begin = 0
    for part in rows.split(parts):
        assert prefill.fits(begin)
        prefill.run(1, part, begin)
        begin += len(part)
    slots = [load_rows(cache, config.talker, slot, POSITIONS) for slot in range(3)]
    for ours, expected in zip(slots[1], truth(backend, config, 2, rows), strict=True):
        torch.testing.assert_close(ours[:, :, :begin], expected, rtol=1e-4, atol=1e-4)
        assert ours[:, :, begin:].isnan().all(), "more was written than the rows given"
    for other in (*slots[0], *slots[2]):
        assert other.isnan().all(), "another slot was touched"


def test_keys_and_values_are_the_same_in_the_kernel_s_layout(config):
    talker, rows = random_talker(config, "cpu").float(), torch.randn(100, config.talker.hidden_size)
    found = []
    for layout in (plain, swizzled):
        cache = make_cache(config, "cpu", torch.float32, layout)
        prefill = TalkerPrefill(talker, config.talker, cache)
        prefill.run(1, rows[:37], 0)
        prefill.run(1, rows[37:], 37)  # attends to the stored rows of the first run
        found.append(load_rows(cache, config.talker, 1, 100))
    for in_order, in_layout in zip(*found, strict=True):
        assert torch.equal(in_layout, in_order)


def test_what_an_earlier_run_left_is_not_seen(config):
    _, cache, prefill = make(config, "cpu", torch.float32)
    rows = torch.randn(30, config.talker.hidden_size)
    prefill.run(0, rows, 0)
    prefill.run(1, torch.randn(ROWS, config.talker.hidden_size) * 5, 0)
    prefill.run(2, rows, 0)
    first, again = (load_rows(cache, config.talker, slot, 30) for slot in (0, 2))
    assert torch.equal(torch.stack(again), torch.stack(first))


def test_only_so_far_back(config):
    _, _, prefill = make(config, "cpu", torch.float32)
    assert prefill.num_keys == POSITIONS
    assert prefill.fits(POSITIONS - ROWS)
    assert not prefill.fits(POSITIONS - ROWS + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["tiny", "0.6b"])
def test_graph_is_as_close_to_fp32_as_bf16_pytorch(shape):
    config = shape_config(shape)
    backend, cache, prefill = make(config, "cuda", torch.bfloat16)
    exact, _, _ = make(config, "cuda", torch.float32)
    parts = (29, 121, ROWS)  # by both graphs: the last part needs more positions than the short one has
    rows = torch.randn(sum(parts), config.talker.hidden_size, device="cuda").bfloat16()
    for begin, part in zip((0, 29, 150), rows.split(parts), strict=True):
        prefill.run(1, part, begin)
    for ours, theirs, true in zip(
        load_rows(cache, config.talker, 1, len(rows)),
        truth(backend, config, 2, rows),
        truth(exact, config, 2, rows.float()),
        strict=True,
    ):
        assert (ours.float() - true).norm() <= 1.1 * (theirs.float() - true).norm()
