"""Long prompts in one go: the same keys and values as row by row."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kv_cache import swizzled
from qwen_megakernel.decoding.prefill_graph import ROWS, TalkerPrefill
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

POSITIONS = 3 * ROWS


@pytest.fixture(scope="module", params=["tiny", "tiny-1.7b"])
def config(request):
    return shape_config(request.param)


def make(config, device: str, dtype: torch.dtype):
    """The specification's backend with its caches, and the prefill with caches of its own."""
    talker = random_talker(config, device)
    for parameter in talker.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
    backend = TorchBackend(talker, config.talker, config.predictor, num_slots=3, max_positions=POSITIONS)
    caches = [torch.full_like(cache, torch.nan) for cache in (backend._k_cache, backend._v_cache)]
    return backend, caches, TalkerPrefill(talker, config.talker, *caches)


def truth(backend, slot: int, rows: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values [layers, kv_heads, n, head_dim] of rows, by the specification."""
    backend.prefill(slot, torch.cat([rows, rows[:1]]), GenerationParams())
    backend.release(slot)
    return [c[:, slot, :, : len(rows)].clone() for c in (backend._k_cache, backend._v_cache)]


@pytest.mark.parametrize(
    "parts",
    [(1,), (40,), (ROWS,), (9, 60), (ROWS, ROWS), (200 - ROWS, ROWS, 50), (ROWS, ROWS, 30)],
)  # the last one's last rows are beyond the shorter reach
def test_keys_and_values_are_the_specification_s(config, parts):
    backend, caches, prefill = make(config, "cpu", torch.float32)
    rows = torch.randn(sum(parts), config.talker.hidden_size)
    begin = 0
    for part in rows.split(parts):
        assert prefill.fits(begin)
        prefill.run(1, part, begin)
        begin += len(part)
    for cache, expected in zip(caches, truth(backend, 2, rows), strict=True):
        torch.testing.assert_close(cache[:, 1, :, :begin], expected, rtol=1e-4, atol=1e-4)
        assert cache[:, 1, :, begin:].isnan().all(), "more was written than the rows given"
        assert cache[:, [0, 2]].isnan().all(), "another slot was touched"


def test_rows_are_kept_in_the_order_asked_for(config):
    _, caches, _ = make(config, "cpu", torch.float32)
    turned = [cache.clone() for cache in caches]
    talker = random_talker(config, "cpu").float()
    prefill = TalkerPrefill(talker, config.talker, *turned, order=swizzled)
    plain = TalkerPrefill(talker, config.talker, *caches)
    rows = torch.randn(100, config.talker.hidden_size)
    for begin, end in ((0, 37), (37, 100)):  # what the second sees of the first is turned back
        prefill.run(1, rows[begin:end], begin)
        plain.run(1, rows[begin:end], begin)
    for ours, expected in zip(turned, caches, strict=True):
        assert not torch.equal(ours[:, 1, :, :100], expected[:, 1, :, :100])
        assert torch.equal(swizzled(ours[:, 1, :, :100], 0), expected[:, 1, :, :100])


def test_what_an_earlier_run_left_is_not_seen(config):
    _, caches, prefill = make(config, "cpu", torch.float32)
    rows = torch.randn(30, config.talker.hidden_size)
    prefill.run(0, rows, 0)
    first = caches[0][:, 0, :, :30].clone()
    prefill.run(1, torch.randn(ROWS, config.talker.hidden_size) * 5, 0)
    prefill.run(2, rows, 0)
    assert torch.equal(caches[0][:, 2, :, :30], first)


def test_only_so_far_back(config):
    _, _, prefill = make(config, "cpu", torch.float32)
    assert prefill.num_keys == POSITIONS
    assert prefill.fits(POSITIONS - ROWS)
    assert not prefill.fits(POSITIONS - ROWS + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["tiny", "0.6b"])
def test_graph_is_as_close_to_fp32_as_bf16_pytorch(shape):
    config = shape_config(shape)
    backend, caches, prefill = make(config, "cuda", torch.bfloat16)
    exact, _, _ = make(config, "cuda", torch.float32)
    parts = (29, 121, ROWS)  # by both graphs: the last looks further back than the first reaches
    rows = torch.randn(sum(parts), config.talker.hidden_size, device="cuda").bfloat16()
    for begin, part in zip((0, 29, 150), rows.split(parts), strict=True):
        prefill.run(1, part, begin)
    for cache, theirs, true in zip(
        caches, truth(backend, 2, rows), truth(exact, 2, rows.float()), strict=True
    ):
        ours = (cache[:, 1, :, : len(rows)].float() - true).norm()
        assert ours <= 1.1 * (theirs.float() - true).norm()
