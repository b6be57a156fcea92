"""Turns and pages: a turn begins when all pages that it can need are free, and then never waits."""

from __future__ import annotations

import time

import pytest
from listener import Listener, wait_idle

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.config import Guards
from qwen_megakernel.decoding.pages import PAGE_POSITIONS
from qwen_megakernel.engine.memory import choose_sizes
from qwen_megakernel.synth.config import shape_config

TEXT = "The quick brown fox jumps over the lazy dog."
SHORT = GenerationParams(seed=1, min_frames=60, max_frames=60)
"""Parameters of a turn that needs one page: 60 frames and a short prompt."""
UNBOUNDED = GenerationParams(seed=1)


def memory_for(num_slots: int, num_pages: int) -> int:
    import torch

    sizes = choose_sizes(shape_config("tiny"), torch.float32, max_positions=3072, num_slots=num_slots)
    return num_slots * sizes.slot_bytes + num_pages * sizes.page_bytes


@pytest.fixture(scope="module")
def tts(tiny_base):
    """A decoder with four slots, and pages for one and a half turns of the greatest length."""
    with TTSDecoder.load(tiny_base, num_slots=4, memory=memory_for(4, 18)) as loaded:
        assert loaded._engine._backend.kv_cache.num_pages == 18
        yield loaded


@pytest.fixture(autouse=True)
def _nothing_left_behind(tts):
    yield
    for active in [*tts._engine._waiting, *tts._engine._speaking]:
        active.turn.cancel()
    wait_idle(tts)
    assert tts._engine._backend.kv_cache._pages.num_free == 18


def reserved(tts) -> list[int]:
    """Pages of each turn that speaks."""
    pages = tts._engine._backend.kv_cache._pages
    return [len(pages.of(active.slot)) for active in tts._engine._speaking]


def test_a_turn_reserves_what_its_text_can_come_to_need(tts):
    listener = Listener()
    turn = tts.open_turn(TEXT, sink=listener, ended=True, params=UNBOUNDED)
    listener.wait_for_audio()
    tokens = tts._engine._speaking[0].prompt.num_text_tokens
    positions = tts._engine._speaking[0].prompt.num_rows + Guards().budget(tokens)
    assert reserved(tts) == [-(-positions // PAGE_POSITIONS)]
    turn.cancel()
    listener.wait()


def test_a_text_that_may_grow_reserves_the_longest_utterance_until_it_ends(tts):
    listener = Listener()
    turn = tts.open_turn(TEXT, sink=listener, params=UNBOUNDED)
    listener.wait_for_audio()
    assert reserved(tts) == [9]  # 2048 frames and the prompt
    turn.end()
    while reserved(tts) == [9]:
        time.sleep(0.001)
    assert reserved(tts)[0] < 9
    turn.cancel()
    listener.wait()


@pytest.mark.slow
def test_a_turn_that_finds_no_page_waits_before_it_begins(tts):
    """Two texts that may grow take all pages. Slots are free, and the next turn waits for pages."""
    growing = [Listener() for _ in range(2)]
    turns = [tts.open_turn(TEXT, sink=each, params=UNBOUNDED) for each in growing]
    for listener in growing:
        listener.wait_for_audio()
    assert reserved(tts) == [9, 9]
    waiting = Listener()
    tts.open_turn(TEXT, sink=waiting, ended=True, params=SHORT)
    while tts.capacity().num_free:  # a slot without pages does not count as free
        time.sleep(0.001)
    assert (tts.capacity().num_queued, tts.num_active) == (1, 2)
    turns[0].cancel()
    assert growing[0].wait().reason == "cancelled"
    finished = waiting.wait()
    assert (finished.reason, finished.num_frames) == ("length", 60)
    turns[1].cancel()


def test_a_turn_that_waits_begins_when_its_whole_text_needs_fewer_pages(tts):
    holders = [Listener(), Listener()]
    for listener, most in zip(holders, (None, 800), strict=True):
        holder = tts.open_turn(TEXT, sink=listener, params=GenerationParams(max_frames=most))
        listener.wait_for_audio()
        holder.hold(True)
    assert reserved(tts) == [9, 4]
    listener = Listener()
    turn = tts.open_turn(TEXT, sink=listener, params=UNBOUNDED)
    while tts.capacity().num_free:
        time.sleep(0.001)
    assert tts.num_active == 2, "its text may grow, so it needs nine pages of five"
    turn.end()
    listener.wait_for_audio()


def test_small_turns_do_not_overtake_a_large_one_for_ever(tts):
    first = Listener()
    holder = tts.open_turn(TEXT, sink=first, params=UNBOUNDED)
    first.wait_for_audio()
    second = Listener()
    tts.open_turn(TEXT, sink=second, params=UNBOUNDED)  # 9 of the 9 pages that are left
    second.wait_for_audio()
    large, small = Listener(), Listener()
    tts.open_turn(TEXT, sink=large, params=UNBOUNDED)
    tts.open_turn(TEXT, sink=small, ended=True, params=SHORT)
    while tts.capacity().num_queued != 2:
        time.sleep(0.001)
    holder.cancel()
    large.wait_for_audio()
    assert not small.events, "it came later"


def test_too_little_memory_is_told_in_a_line(tiny_base):
    with pytest.raises(CheckpointError, match=r"need .* GB, .*: raise --memory, or take fewer"):
        TTSDecoder.load(tiny_base, num_slots=4, memory=10**6)
