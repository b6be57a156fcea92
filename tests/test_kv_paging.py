"""Pages of keys and values: streams join, grow, leave, and no stream reads another's rows."""

from __future__ import annotations

import pytest
import torch
from cached_rows import fill_with_nan, load_rows
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from slow_cases import slow_after

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding import kv_cache, pages
from qwen_megakernel.decoding.graph_backend import GraphBackend
from qwen_megakernel.decoding.kv_cache import KvCache, plain, swizzled
from qwen_megakernel.decoding.pages import OutOfPages, PageTable, runs_of
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

CONFIG = shape_config("tiny").talker
CPU = torch.device("cpu")
PAGE, SLOTS, MOST = 4, 4, 14
NUM_PAGES = 9
"""Pages: fewer than the 16 that all slots together could need."""


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    """Make pages of a few rows, so that short streams have several."""
    for module in (pages, kv_cache):
        monkeypatch.setattr(module, "PAGE_POSITIONS", PAGE)


# ---------------------------------------------------------------------------- the accounting


def test_pages_follow_each_other_where_they_can():
    table = PageTable(8)
    assert table.reserve(0, 2 * PAGE) == [0, 1]
    assert table.reserve(1, PAGE) == [2]
    assert table.reserve(2, PAGE + 1) == [3, 4]
    table.free(1)
    assert table.reserve(3, 2 * PAGE) == [5, 6]  # 2 is free, but 3 is not
    assert table.num_free == 2
    assert table.reserve(1, 2 * PAGE) == [2, 7]  # no two follow each other
    with pytest.raises(OutOfPages, match="1 positions need 1 pages, and 0 are free"):
        table.reserve(4, 1)


def test_what_is_not_needed_is_given_back():
    table = PageTable(4)
    table.reserve(0, 4 * PAGE)
    table.shrink(0, PAGE + 1)
    assert (table.of(0), table.num_free) == ([0, 1], 2)
    table.shrink(0, 4 * PAGE)  # never more
    assert table.of(0) == [0, 1]
    table.free(0)
    table.free(0)
    assert table.num_free == 4
    with pytest.raises(ValueError, match="slot 1 has pages already"):
        [table.reserve(1, 1) for _ in range(2)]


def test_runs_are_as_long_as_they_can_be():
    assert runs_of([]) == []
    assert runs_of([3]) == [(3, 1)]
    assert runs_of([3, 4, 5, 1, 2, 9]) == [(3, 3), (1, 2), (9, 1)]


class Streams(RuleBasedStateMachine):
    """Slots of one cache, in any order: each always reads the rows that it has written."""

    @initialize(layout=st.sampled_from([plain, swizzled]))
    def begin(self, layout):
        self.cache = KvCache(
            CONFIG, SLOTS, MOST, dtype=torch.float32, device=CPU, layout=layout, num_pages=NUM_PAGES
        )
        fill_with_nan(self.cache)
        self.reserved: dict[int, int] = {}
        self.rows: dict[int, torch.Tensor] = {}
        self.made = 0

    def new_rows(self, count: int) -> torch.Tensor:
        """Rows [layers, kv_heads, n, head_dim] with values that no slot has had."""
        shape = (CONFIG.num_layers, CONFIG.num_kv_heads, count, CONFIG.head_dim)
        self.made += 1
        return torch.full(shape, float(self.made)) + torch.arange(CONFIG.head_dim) / 1000

    def num_free(self) -> int:
        return NUM_PAGES - sum(-(-positions // PAGE) for positions in self.reserved.values())

    @rule(slot=st.integers(0, SLOTS - 1), positions=st.integers(1, MOST))
    def joins(self, slot, positions):
        if slot in self.reserved:
            return
        fits = -(-positions // PAGE) <= self.num_free()
        assert self.cache.can_reserve(positions) is fits
        if not fits:
            with pytest.raises(OutOfPages):
                self.cache.reserve(slot, positions)
            assert self.cache.room(slot) == 0
            return
        self.cache.reserve(slot, positions)
        self.reserved[slot], self.rows[slot] = positions, self.new_rows(0)
        assert self.cache.room(slot) >= positions

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), by_layer=st.booleans())
    def grows(self, data, by_layer):
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        held = self.rows[slot].shape[2]
        if held == self.reserved[slot]:
            return
        new = self.new_rows(data.draw(st.integers(1, self.reserved[slot] - held)))
        if by_layer:
            rows = self.cache.slot(slot)
            for layer in range(CONFIG.num_layers):
                of_layer = new[layer, None].transpose(1, 2)
                keys, values = rows.extend(layer, held, of_layer, -of_layer)
                expected = torch.cat([self.rows[slot], new], dim=2)[layer, None]
                assert torch.equal(keys, expected)
                assert torch.equal(values, -expected)
        else:
            self.cache.store(slot, held, new, -new)
        self.rows[slot] = torch.cat([self.rows[slot], new], dim=2)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def needs_less(self, data):
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        held = max(1, self.rows[slot].shape[2])
        positions = data.draw(st.integers(held, max(held, self.reserved[slot])))
        self.cache.shrink(slot, positions)
        self.reserved[slot] = min(positions, self.reserved[slot])

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def leaves(self, data):
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        self.cache.free(slot)
        del self.reserved[slot], self.rows[slot]

    @precondition(lambda self: len(self.reserved) > 1)
    @rule(data=st.data())
    def begins_as_another(self, data):
        source, slot = data.draw(st.permutations(sorted(self.reserved)))[:2]
        count = min(self.rows[source].shape[2], self.reserved[slot])
        kept = self.cache.keep(source, count)
        assert torch.equal(kept.keys, self.cache.keep(source, count).keys)
        self.cache.restore(slot, kept)
        rows = torch.cat([self.rows[source][:, :, :count], self.rows[slot][:, :, count:]], dim=2)
        self.rows[slot] = rows

    @invariant()
    def everybody_reads_what_it_has_written(self):
        taken = [page for slot in self.reserved for page in self.cache._pages.of(slot)]
        assert len(taken) == len(set(taken)) == NUM_PAGES - self.num_free()
        for slot, rows in self.rows.items():
            keys, values = load_rows(self.cache, CONFIG, slot, rows.shape[2])
            assert torch.equal(keys, rows)
            assert torch.equal(values, -rows)
            own = self.cache._pages.of(slot)
            assert self.cache.page_table[slot, : len(own)].tolist() == own


Streams.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestStreams = Streams.TestCase


# ---------------------------------------------------------------------------- the backends


def scatter(backend: TorchBackend, slot: int, positions: int) -> None:
    """Reserve pages that do not follow each other."""
    cache = backend.kv_cache
    others = [other for other in range(backend.num_slots) if other != slot]
    for other in others:
        cache.reserve(other, PAGE)
    for other in others[::2]:
        cache.free(other)
    cache.reserve(slot, positions)
    assert len(runs_of(cache._pages.of(slot))) > 1
    for other in others[1::2]:
        cache.free(other)


@pytest.mark.parametrize("kind", slow_after(1, [TorchBackend, GraphBackend]))
def test_scattered_pages_give_the_same_codes(kind):
    config = shape_config("tiny")
    talker, rows = random_talker(config, "cpu"), torch.randn(11, config.talker.hidden_size)
    text, codes = torch.zeros(1, config.talker.hidden_size), []
    for scattered in (False, True):
        shapes = talker, config.talker, config.predictor
        num_pages = 8 if scattered else None
        backend = kind(*shapes, num_slots=5, max_positions=24, num_pages=num_pages)
        if scattered:
            scatter(backend, 2, 24)
        backend.prefill(2, rows, GenerationParams(seed=3))
        codes.append(torch.cat([backend.decode([2], text).clone() for _ in range(12)]))
        with pytest.raises(ValueError, match="slot 2 is full: 24 positions"):
            [backend.decode([2], text) for _ in range(9)]
    assert torch.equal(*codes)
    assert len(codes[0].unique()) > 20


def test_a_stream_without_a_reservation_takes_and_gives_back_all_it_can_need():
    config = shape_config("tiny")
    shapes = random_talker(config, "cpu"), config.talker, config.predictor
    backend = TorchBackend(*shapes, num_slots=2, max_positions=10, num_pages=4)
    rows, cache = torch.randn(3, config.talker.hidden_size), backend.kv_cache
    backend.prefill(0, rows, GenerationParams())
    assert (cache.room(0), cache.can_reserve(PAGE), cache.can_reserve(PAGE + 1)) == (10, True, False)
    with pytest.raises(OutOfPages):
        backend.prefill(1, rows, GenerationParams())
    backend.release(0)
    assert cache.can_reserve(4 * PAGE)
    cache.reserve(1, 4)
    backend.prefill(1, rows, GenerationParams())
    backend.release(1)
    assert cache.room(1) == 4, "a reservation outlives the stream"
    with pytest.raises(ValueError, match="has 4 rows, allowed: 1 to 3"):
        backend.prefill(1, torch.randn(4, config.talker.hidden_size), GenerationParams())
