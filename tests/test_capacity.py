"""The engine reports its load, and cancelled turns cost nothing."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from listener import LONG, TEXT, Listener, wait_idle

from qwen_megakernel import TTSDecoder
from qwen_megakernel.engine.engine import Engine


@pytest.fixture(scope="module")
def tts(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=4) as loaded:
        yield loaded


def test_the_capacity_counts_turns_that_need_a_slot(tts):
    silent = [tts.open_turn(sink=Listener()) for _ in range(80)]
    assert (tts.capacity().num_slots, tts.capacity().num_free, tts.capacity().num_queued) == (4, 4, 0)
    speaking = [Listener() for _ in range(4)]
    turns = [tts.open_turn(TEXT, sink=each, ended=True, params=LONG) for each in speaking]
    for listener in speaking:
        listener.wait_for_audio()
    queued = [tts.open_turn(TEXT, sink=Listener(), ended=True, params=LONG) for _ in range(3)]
    assert (tts.capacity().num_free, tts.capacity().num_queued) == (0, 3)
    queued[0].cancel()
    assert tts.capacity().num_queued == 2
    before = tts.capacity().slot_s
    time.sleep(0.2)
    assert tts.capacity().slot_s > before, "turns that hold their slots count with their time so far"
    for turn in [*silent, *turns, *queued]:
        turn.cancel()
    wait_idle(tts)
    assert (tts.capacity().num_free, tts.capacity().num_queued) == (4, 0)


def test_a_turn_that_is_cancelled_at_once_costs_no_prompt(tts, monkeypatch):
    opened, make, began, go_on = [], tts._engine._prompts.open, threading.Event(), threading.Event()

    def counted(*args, **options):
        opened.append(args)
        began.set()
        assert go_on.wait(60)
        return make(*args, **options)

    monkeypatch.setattr(tts._engine._prompts, "open", counted)
    first, listeners = tts.open_turn(sink=Listener()), [Listener() for _ in range(50)]
    assert began.wait(60)
    for listener in listeners:
        tts.open_turn("Hello.", sink=listener, ended=True).cancel()
    go_on.set()
    assert {listener.wait().reason for listener in listeners} == {"cancelled"}
    assert len(opened) == 1
    first.cancel()
    wait_idle(tts)


def test_a_turn_waits_while_the_voices_that_speak_fill_all_frames(tts):
    """Slots are free, but by the measured times one more voice would make others run dry."""
    pace, first, second = tts._engine._schedule.pace, Listener(), Listener()
    turn = tts.open_turn(TEXT, sink=first, ended=True, params=LONG, max_lead_s=10.0)
    first.wait_for_audio()
    turn.hold(True)
    pace._full_s, pace._num_full = 60.0, 1000  # a hundredth of a voice
    while tts._engine._speaking[0].ready_at < time.monotonic():  # who is held needs no frame
        time.sleep(0.001)
    assert tts.capacity().num_free == 3
    turn.hold(False)
    while tts.capacity().num_free:
        time.sleep(0.001)
    assert tts.capacity().num_slots == 1, "as many as speak"
    waiting = tts.open_turn(TEXT, sink=second, ended=True, params=LONG)
    while tts._engine._opened or not tts.num_waiting:
        time.sleep(0.001)
    assert (tts.num_active, second.events) == (1, [])
    turn.cancel()
    second.wait_for_audio()
    waiting.cancel()
    pace._full_s, pace._num_full = None, 0
    wait_idle(tts)


class Queue(list):
    """Counts how often the engine's thread goes through it."""

    def __init__(self, turns, thread):
        super().__init__(turns)
        self.thread, self.looks = thread, 0

    def __iter__(self):
        self.looks += threading.current_thread() is self.thread
        return super().__iter__()


def test_a_long_queue_costs_a_tick_nothing_while_no_slot_is_free(tts, monkeypatch):
    """Else an overload slows the ticks, which lengthens the queue."""
    engine, ticks, tick = tts._engine, [0], Engine._tick

    def ticked(engine):
        ticks[0] += 1
        return tick(engine)

    turns = fill(tts, 40)
    engine._waiting = queue = Queue(engine._waiting, engine.thread)
    monkeypatch.setattr(Engine, "_tick", ticked)
    while ticks[0] < 10:
        time.sleep(0.01)
    looks, queue.thread = queue.looks, None
    for turn in turns:
        turn.cancel()
    wait_idle(tts)
    assert not looks
    engine._waiting = list(queue)


def test_a_place_in_a_long_queue_costs_few_calls(tts):
    """A turn begins some sixty times a second, and the GPU waits while the engine looks for it."""
    engine, turns, calls = tts._engine, fill(tts, 60), {}

    def begin(waiting):
        engine._schedule.may_begin(waiting, 0)
        assert engine._slot_order.choose(waiting, 1) in waiting

    for length in (20, 60):
        counted = [0]

        def count(frame, event, what, counted=counted):
            counted[0] += event in ("call", "c_call")

        sys.setprofile(count)
        begin(list(engine._waiting)[:length])
        sys.setprofile(None)
        calls[length] = counted[0]
    for turn in turns:
        turn.cancel()
    wait_idle(tts)
    assert calls[60] - calls[20] <= 8 * 40, calls


def fill(tts, num_waiting):
    """Turns that speak in all slots, and so many that wait."""
    speaking = [Listener() for _ in range(tts.num_slots)]
    turns = [tts.open_turn(TEXT, sink=each, ended=True, params=LONG) for each in speaking]
    for listener in speaking:
        listener.wait_for_audio()
    turns += [tts.open_turn(TEXT, sink=Listener(), ended=True, params=LONG) for _ in range(num_waiting)]
    while tts.capacity().num_queued < num_waiting or tts._engine._opened:
        time.sleep(0.01)
    return turns
