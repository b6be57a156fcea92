"""Turns that join, grow, end, are cancelled and wait for pages, in any order, on the real engine.

The decoder and the codec are stand-ins: a frame costs nothing, and every frame is checked against the
pages that are reserved for its slot.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from listener import Listener

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.codec.interface import LaunchedAudio
from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.decoding import kv_cache, pages
from qwen_megakernel.decoding.interface import LaunchedFrame
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.engine.active_turn import TurnRequest
from qwen_megakernel.engine.engine import Engine
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.synth.config import shape_config

CONFIG = shape_config("tiny").talker
EOS, PAGE, SLOTS, MOST = CONFIG.codec_eos_id, 16, 5, 400
NUM_PAGES = 40
"""A text that may grow reserves 25 of them, so two such texts do not fit."""
WORDS = ["the", "train", "to", "the", "coast", "leaves", "at", "nine", "so", "please", "be", "on"]


class PlayedBackend:
    """Counts positions, and gives EOS in one frame of `eos_every`."""

    num_slots, max_positions, max_batch = SLOTS, MOST, 3

    def __init__(self, eos_every: int) -> None:
        self.kv_cache = KvCache(
            CONFIG, SLOTS, MOST, dtype=torch.float32, device=torch.device("cpu"), num_pages=NUM_PAGES
        )
        self._random, self._eos_every = random.Random(eos_every), eos_every
        self.positions: dict[int, int] = {}
        self.most_live = 0

    def prefill(self, slot, rows, params, shared) -> None:
        assert slot not in self.positions
        assert len(rows) < self.kv_cache.room(slot)
        self.positions[slot] = len(rows) - 1
        self.most_live = max(self.most_live, len(self.positions))

    def launch(self, slots: Sequence[int], text_rows) -> LaunchedFrame:
        assert 1 <= len(slots) == len(set(slots)) <= self.max_batch
        for slot in slots:
            assert self.positions[slot] < self.kv_cache.room(slot), "beyond what is reserved"
            self.positions[slot] += 1
        codes = torch.tensor([[self._random.randrange(1000)] * 16 for _ in slots])
        codes[:, 0][torch.tensor([self._random.randrange(self._eos_every) == 0 for _ in slots])] = EOS
        return LaunchedFrame(codes, lambda: codes)

    def release(self, slot: int) -> None:
        del self.positions[slot]


class PlayedCodec:
    num_slots = SLOTS

    def reset(self, slot: int) -> None:
        pass

    def launch(self, slots: Sequence[int], codes) -> LaunchedAudio:
        sound = np.full((len(slots), HOP), 0.5, np.float32)
        return LaunchedAudio(ready=lambda: bool(len(slots) % 2), samples=lambda: sound)


@pytest.fixture(scope="module")
def prompts(tiny_base) -> Iterator[PromptBuilder]:
    with TTSDecoder.load(tiny_base, num_slots=1) as tts:
        yield tts._prompts


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    for module in (pages, kv_cache):
        monkeypatch.setattr(module, "PAGE_POSITIONS", PAGE)


turns = st.fixed_dictionaries(
    {
        "pieces": st.lists(st.integers(1, 12), min_size=1, max_size=5),
        "ends": st.sampled_from(["at once", "later", "cancelled"]),
        "budget": st.booleans(),
        "max_frames": st.sampled_from([None, 1, 40]),
    }
)


@settings(max_examples=25, deadline=None)
@given(plan=st.lists(turns, min_size=1, max_size=12), eos_every=st.integers(2, 300))
def test_every_turn_ends_as_it_should_and_all_pages_come_back(prompts, plan, eos_every):
    backend = PlayedBackend(eos_every)
    engine = Engine(backend, PlayedCodec(), prompts, eos_id=EOS)
    choose, open_turns = random.Random(eos_every), []
    for number, turn in enumerate(plan):
        guards = Guards() if turn["budget"] else Guards(frames_per_token=0)
        params = GenerationParams(seed=number, max_frames=turn["max_frames"], guards=guards)
        texts = [" ".join(choose.choices(WORDS, k=count)) + ". " for count in turn["pieces"]]
        listener, at_once = Listener(), turn["ends"] == "at once"
        request = TurnRequest(voice=Voice.designed(), params=params, max_lead_s=1e9)
        first = "".join(texts) if at_once else texts[0]
        handle = engine.open_turn(request, listener, first, end=at_once)
        open_turns.append((turn, handle, listener, [] if at_once else texts[1:]))
    while any(texts for *_, texts in open_turns):
        _, handle, _, texts = choose.choice([each for each in open_turns if each[3]])
        handle.append(texts.pop(0))
        time.sleep(choose.random() / 1000)
    for turn, handle, _, _ in open_turns:
        if turn["ends"] == "cancelled":
            handle.cancel()
        elif turn["ends"] == "later":
            handle.end()
    for turn, _, listener, _ in open_turns:
        finished = listener.wait()
        allowed = {"stop", "length"} | ({"cancelled"} if turn["ends"] == "cancelled" else set())
        assert finished.reason in allowed, finished
        assert finished.num_samples == len(listener.samples)
        assert turn["max_frames"] is None or finished.num_frames <= turn["max_frames"]
    assert engine.error is None
    engine.close()
    assert backend.kv_cache._pages.num_free == NUM_PAGES
    assert backend.positions == {}
    assert backend.most_live <= SLOTS
