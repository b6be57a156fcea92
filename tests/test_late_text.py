"""A turn whose text is late keeps its slot only while no turn needs it, and loses no text."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
from listener import Listener, wait_idle

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.engine import active_turn, engine
from qwen_megakernel.engine.active_turn import ActiveTurn, TurnRequest
from qwen_megakernel.engine.reservations import Reservations
from qwen_megakernel.engine.schedule import Schedule
from qwen_megakernel.engine.slot_order import SlotOrder
from qwen_megakernel.prompt.builder import Prompt
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.turn import Audio, Started, Turn

PARAMS = GenerationParams(seed=1, min_frames=8)
"""Parameters with which late text is late before the model may give EOS."""
READY = SimpleNamespace(owner=(), ready=True, scant=False)
"""A turn that waits and has its text."""


@pytest.fixture
def tts(brief_base, recording):
    """A decoder with one slot. Turns end after a few frames once their text is complete."""
    with TTSDecoder.load(brief_base, num_slots=1, device="cpu", backend="torch") as loaded:
        loaded.add_voice("default", loaded.clone_voice(recording.read_bytes()))
        loaded._engine._max_text_wait_s = 3600  # no timeout gives a slot back
        yield loaded


@pytest.fixture
def texts(tts, monkeypatch):
    """The text of every prompt that the engine opens, in order."""
    texts, numbers, make, extend = [], {}, Prompt.__init__, Prompt.extend

    def made(prompt, *args, **options):
        numbers[id(prompt)] = len(texts)
        texts.append("")
        make(prompt, *args, **options)

    def extended(prompt, token_ids):
        texts[numbers[id(prompt)]] += tts._prompts.tokenizer.decode(token_ids)
        extend(prompt, token_ids)

    monkeypatch.setattr(Prompt, "__init__", made)
    monkeypatch.setattr(Prompt, "extend", extended)
    return texts


def stalled(tts, text, **options):
    """A turn that holds the slot and waits for text."""
    listener = Listener()
    turn = tts.open_turn(text, sink=listener, params=PARAMS, **options)
    listener.wait_for_audio()
    deadline = time.monotonic() + 60
    while not tts._engine._speaking[0].text_late:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return turn, listener


def complete(tts, text="Good morning."):
    listener = Listener()
    tts.open_turn(text, sink=listener, ended=True, params=PARAMS)
    return listener


def test_a_slot_without_text_is_given_to_a_turn_that_waits(tts, texts):
    turn, late = stalled(tts, "Hello there, how")
    other = complete(tts)
    assert other.wait().reason == "stop"  # the late turn would hold the slot for a minute
    assert not turn.finished
    turn.append("ever are you?")
    turn.end()
    assert late.wait().reason == "stop"
    assert texts == ["Hello there,", "Good morning.", " however are you?"]
    assert [type(event) for event in late.events].count(Started) == 1
    finished = late.events[-1]
    assert finished.num_samples == len(late.samples) == finished.num_frames * 1920
    wait_idle(tts)


def test_a_slot_without_text_is_kept_while_nobody_needs_it(tts, texts):
    turn, late = stalled(tts, "Hello there, how")
    time.sleep(2 * engine.LATE_TEXT_S)
    turn.append(" are you?")
    turn.end()
    late.wait()
    assert len(texts) == 1


@pytest.mark.slow
def test_a_late_turn_gives_its_slot_back_though_its_client_takes_no_audio(tts, texts):
    """A turn that was cut must not wait for its client while it holds the slot."""
    turn, late = stalled(tts, "Hello there, how")
    turn.hold(True)
    assert complete(tts).wait().reason == "stop"
    turn.hold(False)
    turn.end()
    assert late.wait().reason == "stop"
    assert texts == ["Hello there,", "Good morning.", " how"]


def test_a_late_turn_gives_its_slot_back_though_it_is_far_ahead(tts):
    turn, late = stalled(tts, "Hello there, how", max_lead_s=0.0)
    assert complete(tts).wait().reason == "stop"
    turn.cancel()
    late.wait()


def test_a_late_turn_that_ends_after_it_gave_its_slot_back_is_done(tts, texts):
    turn, late = stalled(tts, "Hello there, ")
    complete(tts).wait()
    turn.end()
    assert late.wait().reason == "stop"
    assert texts[-1].strip() == ""


def test_a_late_turn_can_be_cancelled_after_it_gave_its_slot_back(tts):
    turn, late = stalled(tts, "Hello there, how")
    complete(tts).wait()
    turn.cancel()
    assert late.wait().reason == "cancelled"
    wait_idle(tts)


@pytest.mark.slow
def test_turns_with_late_text_take_turns(tts):
    """Many writers on one slot: each gets its words spoken, even if others are slow."""
    listeners, turns = [Listener() for _ in range(6)], []
    for listener in listeners:
        turns.append(tts.open_turn("One two ", sink=listener, params=PARAMS))
    for listener in listeners:
        listener.wait_for_audio(30)
    for turn in turns:
        turn.append("three. ")
        turn.end()
    for listener in listeners:
        assert listener.wait().reason == "stop"
        assert any(isinstance(event, Audio) for event in listener.events)


def between_parts(tts, monkeypatch, text, **options):
    """A turn that holds the slot, has spoken a part, and has too little text for the next."""
    monkeypatch.setattr(active_turn, "max_part_tokens", lambda *_, **__: 40)
    listener = Listener()
    turn = tts.open_turn(text, sink=listener, params=PARAMS, **options)
    deadline = time.monotonic() + 60
    while not any(a.part and not a.prefilled and a.text_late for a in tts._engine._speaking):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return turn, listener


@pytest.mark.slow
def test_a_turn_between_two_parts_gives_its_slot_back_and_goes_on(tts, texts, monkeypatch):
    """All its words are held back, because they may belong to this part or to the next."""
    word = "ab"
    while len(tts._prompts.tokenizer.encode(word)) <= 20:  # more than half a part
        word += "ab"
    turn, late = between_parts(tts, monkeypatch, f"We go on. {word} {word} ")
    assert complete(tts).wait().reason == "stop"
    assert not turn.finished
    turn.append("is the end.")
    turn.end()
    assert late.wait().reason == "stop"
    spoken = [text for text in texts if text != "Good morning."]
    assert "".join("".join(spoken).split()) == f"Wegoon.{word}{word}istheend."
    assert all(spoken), "a prompt with nothing to say"
    wait_idle(tts)


def test_a_part_that_is_not_begun_is_not_cut_when_its_slot_is_needed(tts, texts, monkeypatch):
    """In the layout of whole texts, a part can be spoken only when it is complete."""
    sentence = "This is a sentence of the story that goes on."
    turn, late = between_parts(tts, monkeypatch, f"{sentence} " * 3 + "And", streaming=False)
    number = len(texts) - 1
    assert complete(tts).wait().reason == "stop"
    turn.append(" so it ends.")
    turn.end()
    assert late.wait().reason == "stop"
    assert texts[number].endswith("And so it ends.")


class Hashable(SimpleNamespace):
    __hash__ = object.__hash__


BACKEND = SimpleNamespace(max_positions=64, kv_cache=SimpleNamespace(can_reserve=lambda positions: True))
"""Pages enough."""


@pytest.mark.parametrize(
    ("free", "queued", "limit_s"), [(1, 1, math.inf), (0, 0, math.inf), (0, 1, 1), (0, 4, 0.25)]
)
def test_the_more_turns_wait_the_sooner_a_slot_is_given_back(free, queued, limit_s):
    idle = object.__new__(engine.Engine)  # no thread
    idle._free_slots, idle._waiting = [0] * free, [READY] * queued
    idle._slot_order = SlotOrder(2)
    idle._reservations, idle._schedule, idle._speaking = Reservations(BACKEND), Schedule(2, 8), []
    assert idle._late_limit_s() == limit_s * engine.LATE_TEXT_S


@pytest.mark.parametrize("has_text", [True, False])
def test_a_turn_whose_text_is_there_and_not_taken_is_not_late(has_text):
    cuts = []
    late = Hashable(
        turn=SimpleNamespace(has_text=has_text),
        late_for_s=lambda now: 60.0,
        prefilled=True,
        gives_back=False,
        end_utterance=lambda: cuts.append("cut"),
    )
    busy = object.__new__(engine.Engine)  # no thread
    busy._free_slots, busy._speaking = [], [late]
    busy._waiting, busy._slot_order = [READY], SlotOrder(1)
    busy._reservations, busy._schedule = Reservations(BACKEND), Schedule(1, 8)
    busy._schedule._late[late] = None
    busy._end_late_utterances()
    assert cuts == ([] if has_text else ["cut"])


def test_words_that_drip_do_not_keep_a_slot():
    """Single words that come in time must not keep the slot for an hour together."""
    prompt = SimpleNamespace(
        ready=True,
        ended=False,
        num_text_tokens=1,
        num_rows=9,
        shared=SharedRows(0, 0),
    )
    active = ActiveTurn(Turn(lambda: None, None), TurnRequest(voice=None), prompt, lambda event: None)
    active.slot, active.prefilled, active.num_fed, active.num_frames = 0, True, 1, 1
    for second in range(10):
        active.mark_late(True, second + 0.1)
        active.mark_late(False, second + 0.5)
        active.mark_late(False, second + 0.9)  # the time of speech does not count
    assert active.late_for_s(10.0) == pytest.approx(10 * 0.4)
    active.wait_again()
    assert active.late_for_s(20.0) == 0


@pytest.mark.parametrize(
    ("scant", "count"), [([0, 0, 0], 3), ([0, 0, 1, 0], 3), ([1, 0, 0], 1), ([], 0)]
)
def test_no_prompt_is_made_in_the_same_tick_after_one_of_a_turn_with_scant_text(scant, count):
    queue = [SimpleNamespace(scant=bool(one)) for one in scant]
    idle = object.__new__(engine.Engine)  # no thread
    idle._schedule, idle._backend = Schedule(8, 8), SimpleNamespace(max_batch=8)
    idle._prefill_next = lambda: queue.pop(0) if queue else None
    assert idle._prefill_waiting() == bool(scant)
    assert len(scant) - len(queue) == count
