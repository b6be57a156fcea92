"""Keys and values: every copy comes back unchanged, in both layouts, and other slots stay untouched."""

from __future__ import annotations

import pytest
import torch
from cached_rows import fill_with_nan, load_rows
from torch import Tensor

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kv_cache import KvCache, plain, swizzled
from qwen_megakernel.decoding.pages import PAGE_POSITIONS
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

CONFIG = shape_config("tiny").talker
CPU = torch.device("cpu")
SLOTS, POSITIONS = 3, 40


@pytest.fixture(params=[plain, swizzled], ids=["plain", "swizzled"])
def cache(request) -> KvCache:
    """A cache without a written row: all rows are NaN."""
    made = KvCache(CONFIG, SLOTS, POSITIONS, dtype=torch.bfloat16, device=CPU, layout=request.param)
    fill_with_nan(made)
    return made


def random_rows(count: int) -> tuple[Tensor, Tensor]:
    shape = (CONFIG.num_layers, CONFIG.num_kv_heads, count, CONFIG.head_dim)
    return torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()


def assert_holds(cache: KvCache, slot: int, keys: Tensor, values: Tensor) -> None:
    """Check that the slot's first rows are these, and that no more are written."""
    count = keys.shape[2]
    for found, expected in zip(load_rows(cache, CONFIG, slot, POSITIONS), (keys, values), strict=True):
        assert torch.equal(found[:, :, :count], expected)
        assert found[:, :, count:].isnan().all()


def assert_unwritten(cache: KvCache, *slots: int) -> None:
    for slot in slots:
        assert_holds(cache, slot, *random_rows(0))


def test_stored_rows_are_loaded_as_they_were(cache):
    keys, values = random_rows(29)
    for begin, end in ((0, 11), (11, 12), (12, 29)):
        cache.store(1, begin, keys[:, :, begin:end], values[:, :, begin:end])
    assert_holds(cache, 1, keys, values)
    assert_unwritten(cache, 0, 2)


def test_rows_written_by_attention_are_the_stored_ones(cache):
    """A copy gives the rows that a layer has stored one by one, and the other way round."""
    keys, values = random_rows(21)
    cache.store(2, 0, keys[:, :, :13], values[:, :, :13])
    rows = cache.slot(2)
    for layer in range(CONFIG.num_layers):
        for begin, end in ((13, 20), (20, 21)):
            new = (x[layer, None, :, begin:end].transpose(1, 2) for x in (keys, values))
            so_far = rows.extend(layer, begin, *new)
            for found, expected in zip(so_far, (keys, values), strict=True):
                assert torch.equal(found, expected[layer, None, :, :end])
    assert_holds(cache, 2, keys, values)
    assert_unwritten(cache, 0, 1)


def test_a_batch_writes_and_reads_the_rows_of_several_slots():
    cache = KvCache(CONFIG, SLOTS, POSITIONS, dtype=torch.bfloat16, device=CPU)
    fill_with_nan(cache)
    stored = {2: random_rows(13), 0: random_rows(5)}
    for slot, rows in stored.items():
        cache.store(slot, 0, *(x[:, :, :-1] for x in rows))
    batch = cache.batch(torch.tensor([2, 0, 2]), torch.tensor([12, 4, 12]), reach=16)
    for layer in range(CONFIG.num_layers):
        new = [torch.stack([stored[s][i][layer, :, -1:] for s in (2, 0, 2)]) for i in range(2)]
        copies = batch.extend(layer, *(x.transpose(1, 2) for x in new))
        for i, copy in enumerate(copies):
            assert copy.shape == (3, CONFIG.num_kv_heads, 16, CONFIG.head_dim)
            for found, slot in zip(copy, (2, 0, 2), strict=True):
                assert torch.equal(found[:, : stored[slot][i].shape[2]], stored[slot][i][layer])
    for slot, rows in stored.items():
        assert_holds(cache, slot, *rows)
    assert_unwritten(cache, 1)


def test_kept_rows_are_restored_into_any_slot(cache):
    keys, values = random_rows(17)
    cache.store(0, 0, keys, values)
    kept = cache.keep(0, 9)
    cache.store(0, 0, *random_rows(17))  # another stream uses the slot
    cache.restore(2, kept)
    assert_holds(cache, 2, keys[:, :, :9], values[:, :, :9])
    assert_unwritten(cache, 1)


def test_slots_do_not_disturb_each_other(cache):
    written = [random_rows(POSITIONS) for _ in range(SLOTS)]
    for slot in (1, 0, 2):
        cache.store(slot, 0, *written[slot])
    for slot, (keys, values) in enumerate(written):
        assert_holds(cache, slot, keys, values)


def test_both_layouts_take_the_bytes_that_are_reported(cache):
    allocated = sum(tensor.nbytes for tensor in cache.tensors.values())
    assert cache.num_pages == SLOTS  # each slot needs one
    assert KvCache.num_bytes(CONFIG, SLOTS * PAGE_POSITIONS, torch.bfloat16) == allocated
    assert all(tensor.is_contiguous() for tensor in cache.tensors.values())
    # Two bytes, keys and values.
    row = 2 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    assert allocated == SLOTS * PAGE_POSITIONS * row


def test_the_kernel_s_layout_is_the_swizzle_of_the_plain_one():
    caches = [
        KvCache(CONFIG, 1, POSITIONS, dtype=torch.bfloat16, device=CPU, layout=layout)
        for layout in (plain, swizzled)
    ]
    keys, values = random_rows(POSITIONS)
    for cache in caches:
        for tensor in cache.tensors.values():
            tensor.zero_()
        cache.store(0, 0, keys[:, :, :5], values[:, :, :5])
        cache.store(0, 5, keys[:, :, 5:], values[:, :, 5:])
    for name, in_order in caches[0].tensors.items():
        held = caches[1].tensors[name]
        assert not torch.equal(held, in_order)
        assert torch.equal(held, swizzled(in_order, 0))


def test_a_stream_is_the_same_in_either_layout():
    config = shape_config("tiny")
    talker, codes = random_talker(config, "cpu"), []
    rows = torch.randn(12, config.talker.hidden_size)
    for layout in (plain, swizzled):
        backend = TorchBackend(talker, config.talker, config.predictor, num_slots=2, max_positions=32)
        backend.kv_cache = KvCache(config.talker, 2, 32, dtype=torch.bfloat16, device=CPU, layout=layout)
        backend.prefill(1, rows, GenerationParams(seed=3))
        text = torch.zeros(1, config.talker.hidden_size)
        codes.append(torch.cat([backend.decode([1], text) for _ in range(5)]))
    assert torch.equal(*codes)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("first", [0, 5, 16])
def test_rows_of_the_caches_are_swizzled_by_their_positions(head_dim, first):
    rows = torch.randn(3, 2, 21, head_dim)
    held = swizzled(rows, first)
    for n in range(21):
        turned = int(f"{(first + n) % 8:03b}"[::-1], 2)
        for word in range(head_dim // 8):
            at = word ^ turned
            assert torch.equal(
                held[:, :, n, 8 * at : 8 * at + 8], rows[:, :, n, 8 * word : 8 * word + 8]
            )
    assert torch.equal(swizzled(held, first), rows)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_the_kernel_reads_at_once_of_a_tile_lies_in_different_banks(head_dim):
    words = head_dim // 8
    dims = torch.arange(words).repeat_interleave(8).expand(16, -1).float()
    held = swizzled(dims, 0)[:, ::8].int()  # [position, place] -> word
    place = torch.stack([held[n].argsort() for n in range(16)])  # [position, word]

    def banks(positions, taken):  # banks of 16 bytes, of which there are eight
        return {int(n * words + place[n, w]) % 8 for n in positions for w in taken}

    for half in (range(8), range(8, 16)):  # a matrix of the transposing loads: eight rows, one word
        assert all(len(banks(half, [w])) == 8 for w in range(words))
    for n in range(0, 16, 2):  # a quarter of a warp's key loads: two rows, four words
        assert all(len(banks((n, n + 1), range(b, b + 4))) == 8 for b in range(0, words, 4))
