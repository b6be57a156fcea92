"""Turns on the real engine and a real (tiny, random) checkpoint: live text, cancel, order, ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from listener import LONG, PARAMS, TEXT, Listener, always_says, speak, wait_idle
from slow_cases import slow_after

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.engine.active_turn import CHUNK_RAMP
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.tts_model import SynthesisError
from qwen_megakernel.turn import MAX_BLOCK, Audio, Finished, RequestError, Started


@pytest.fixture(scope="module")
def tts(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def spoken(tts):
    """A turn by itself, of 30 frames."""
    return speak(tts)


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """A test that fails in the middle must not make later tests fail."""
    yield
    if "tts" in request.fixturenames:
        tts = request.getfixturevalue("tts")
        for active in [*tts._engine._waiting, *tts._engine._speaking]:
            active.turn.cancel()
        wait_idle(tts)


def test_events_come_in_order_and_add_up(spoken):
    listener = spoken
    assert isinstance(listener.events[0], Started)
    finished = listener.events[-1]
    assert [isinstance(e, Audio) for e in listener.events[1:-1]] == [True] * (len(listener.events) - 2)
    assert finished.reason == "length"
    assert finished.num_frames == 30
    assert finished.num_samples == len(listener.samples) == 30 * HOP
    assert finished.duration_s == pytest.approx(30 * 0.08)
    assert finished.generation_s > 0
    assert finished.rtf == pytest.approx(finished.generation_s / 2.4)
    assert np.abs(listener.samples).max() <= 1.0
    assert listener.samples.std() > 1e-3, "silence would make every comparison below true"


def test_chunks_begin_small(tts, spoken):
    sizes = [len(e.samples) // HOP for e in spoken.events if isinstance(e, Audio)]
    assert tuple(sizes[: len(CHUNK_RAMP)]) == CHUNK_RAMP
    assert sum(sizes) == 30
    fixed = [len(e.samples) // HOP for e in speak(tts, chunk_frames=7).events if isinstance(e, Audio)]
    assert fixed == [7, 7, 7, 7, 2]


def test_same_seed_same_sound_and_another_seed_another(tts, spoken):
    first = spoken.samples
    assert np.array_equal(speak(tts).samples, first)
    other = speak(tts, params=GenerationParams(seed=12, max_frames=30)).samples
    assert not np.array_equal(other, first)


def test_sound_does_not_depend_on_chunks_or_company(tts, spoken):
    alone = spoken.samples
    listeners = [Listener() for _ in range(6)]  # more than slots
    for i, listener in enumerate(listeners):
        params = GenerationParams(seed=11 if i in (0, 5) else i, max_frames=30)
        tts.open_turn(TEXT, sink=listener, ended=True, params=params, chunk_frames=1 + i)
    for listener in listeners:
        assert listener.wait().reason == "length"
    for i in (0, 5):
        np.testing.assert_allclose(listeners[i].samples, alone, atol=1e-5)
    assert np.abs(listeners[1].samples - alone).max() > 1e-2


@pytest.mark.slow
def test_stream_joined_is_synthesize(tts):
    chunks = list(tts.stream(TEXT, params=PARAMS))
    assert len(chunks) > 3
    assert np.array_equal(np.concatenate(chunks), tts.synthesize(TEXT, params=PARAMS))


@pytest.mark.parametrize(
    "pieces", slow_after(1, [TEXT.split(" "), list(TEXT)]), ids=["words", "characters"]
)
def test_live_text_speaks_as_the_whole_text(tts, spoken, pieces):
    if len(pieces) < 20:
        pieces = [piece + " " for piece in pieces]
    whole, listener = spoken.samples, Listener()
    turn = tts.open_turn(sink=listener, params=PARAMS)
    for piece in pieces:
        turn.append(piece)
        time.sleep(0.003)
    turn.end()
    assert listener.wait().reason == "length"
    np.testing.assert_allclose(listener.samples, whole, atol=1e-5)


def test_late_text_stalls_its_turn_and_nothing_else(tts, spoken):
    whole, late = spoken.samples, Listener()
    turn = tts.open_turn(TEXT[:30], sink=late, params=PARAMS)
    late.wait_for_audio()
    while not tts._engine._speaking[0].text_late:  # a slow machine may be still for a while before
        time.sleep(0.01)
    stalled_at = late.wait_until_still()
    assert stalled_at < len(whole), "frames were decoded without text"
    other = speak(tts, params=GenerationParams(seed=5, max_frames=10))
    assert other.events[-1].num_frames == 10
    assert len(late.samples) == stalled_at, "the stalled turn went on without text"
    turn.append(TEXT[30:])
    turn.end()
    finished = late.wait()
    np.testing.assert_allclose(late.samples, whole, atol=1e-5)
    waited_s = 0.9  # `wait_until_still` took at least that long
    assert finished.generation_s < late.times[-1] - late.times[0] - waited_s, "waiting is not generation"


def test_what_is_decoded_is_not_held_back_while_text_is_late(tts):
    listener = Listener()
    turn = tts.open_turn(TEXT[:40], sink=listener, params=PARAMS, chunk_frames=64)
    listener.wait_for_audio()
    turn.cancel()
    listener.wait()


def test_turns_without_text_hold_no_slot(tts):
    silent = [tts.open_turn(sink=Listener(), params=PARAMS) for _ in range(8)]
    assert speak(tts, params=GenerationParams(max_frames=3)).events[-1].num_frames == 3
    assert tts.num_active == 0
    for turn in silent:
        turn.cancel()
    wait_idle(tts)


def test_text_that_ends_empty_finishes_with_nothing(tts):
    listener = Listener()
    turn = tts.open_turn(sink=listener)
    turn.append("   ")
    turn.end()
    finished = listener.wait()
    assert (finished.reason, finished.num_frames, finished.rtf) == ("stop", 0, None)


def test_flush_speaks_the_word_that_may_still_grow(tts):
    listener = Listener()
    turn = tts.open_turn("Hello", sink=listener, params=PARAMS)
    time.sleep(0.3)
    assert not listener.events, "an unstable word must wait"
    turn.flush()
    listener.wait_for_audio()
    turn.cancel()
    assert listener.wait().reason == "cancelled"


def test_cancel_stops_within_a_frame_and_nothing_is_heard_after(tts):
    backend = tts._engine._backend
    frames: list[float] = []
    original = backend.launch

    def counting(slots, text_rows, noise=None):
        frames.append(time.monotonic())
        return original(slots, text_rows, noise)

    backend.launch = counting
    try:
        for _ in range(5):
            frames.clear()
            listener = Listener()
            turn = tts.open_turn(TEXT, sink=listener, ended=True, params=LONG)
            listener.wait_for_audio()
            turn.cancel()
            cancelled_at = time.monotonic()
            assert listener.wait().reason == "cancelled"
            finished_at = listener.times[-1]
            assert sum(t > cancelled_at for t in frames) <= 1
            time.sleep(0.1)
            assert isinstance(listener.events[-1], Finished)
            assert listener.times[-1] == finished_at
    finally:
        backend.launch = original
    wait_idle(tts)


@pytest.mark.slow
def test_a_turn_after_a_cancel_is_in_the_next_frame(tts, monkeypatch):
    backend, launched = tts._engine._backend, []
    original = backend.launch

    def counting(slots, text_rows, noise=None):
        launched.append(len(slots))
        return original(slots, text_rows, noise)

    monkeypatch.setattr(backend, "launch", counting)
    for _ in range(5):
        first, second = Listener(), Listener()
        turn = tts.open_turn(TEXT, sink=first, ended=True, params=LONG)
        first.wait_for_audio()
        turn.cancel()
        launched.clear()
        tts.open_turn(TEXT, sink=second, ended=True, params=GenerationParams(max_frames=12))
        assert second.wait().num_frames == 12
        assert len(launched) <= 12 + 2  # and the two that were being made when the cancel came
        assert set(launched) == {1}
    wait_idle(tts)


def test_closing_the_iterator_cancels(tts):
    stream = tts.stream(TEXT, params=LONG)
    next(stream)
    stream.close()
    wait_idle(tts)


def test_a_second_turn_is_heard_while_the_first_speaks(tts):
    first, second = Listener(), Listener()
    turn = tts.open_turn(TEXT, sink=first, ended=True, params=LONG)
    first.wait_for_audio()
    tts.open_turn(TEXT, sink=second, ended=True, params=GenerationParams(max_frames=12))
    assert second.wait().num_frames == 12
    assert not turn.finished
    during = [t for t in first.times if second.times[0] < t < second.times[-1]]
    assert len(during) >= 2, "the first turn stood still for the second"
    turn.cancel()
    first.wait()


@pytest.mark.slow
def test_the_turn_that_runs_out_first_goes_first(tts):
    """With more turns than a frame takes, a turn without audio is not kept waiting by the others."""
    with TTSDecoder.load(tts._checkpoint.folder, num_slots=12) as many:
        crowd = [Listener() for _ in range(10)]
        turns = [many.open_turn(TEXT, sink=one, ended=True, params=LONG) for one in crowd]
        for listener in crowd:
            listener.wait_for_audio()
        deadline = time.monotonic() + 60
        while min(len(one.samples) for one in crowd) < 16 * HOP:
            assert time.monotonic() < deadline, "somebody was left behind"
            time.sleep(0.02)
        now, leads = time.monotonic(), []
        for one in crowd:
            first = next(t for t, e in zip(one.times, one.events, strict=False) if isinstance(e, Audio))
            leads.append(len(one.samples) / 24_000 - (now - first))
        for turn in turns:
            turn.cancel()
        # They are equal except for what is being made: a chunk each, and the turn that started last.
        assert max(leads) - min(leads) <= 3 * max(CHUNK_RAMP) * 0.08, leads


@pytest.mark.slow
def test_a_lead_is_kept(tts):
    listener = Listener()
    started = time.monotonic()
    turn = tts.open_turn(TEXT, sink=listener, ended=True, params=LONG, max_lead_s=0.4)
    listener.wait_for_audio()
    time.sleep(2.0)
    turn.cancel()
    listener.wait()
    elapsed = time.monotonic() - started
    assert len(listener.samples) / 24_000 <= elapsed + 0.4 + 0.08 * max(CHUNK_RAMP)


@pytest.mark.slow
def test_a_turn_on_hold_waits_and_then_is_the_same(tts, spoken):
    whole = spoken.samples
    listener = Listener()
    turn = tts.open_turn(TEXT, sink=listener, ended=True, params=PARAMS)
    listener.wait_for_audio()
    turn.hold(True)
    assert listener.wait_until_still() < len(whole), "the turn went on although it was on hold"
    turn.hold(False)
    finished = listener.wait()
    assert np.array_equal(listener.samples, whole)
    # Its work counts as it happens. The time on hold does not count.
    spent = [event.generation_s for event in listener.events if isinstance(event, Audio)]
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] <= finished.generation_s
    assert finished.generation_s < listener.times[-1] - turn.first_text_at - 0.9


def test_live_text_that_never_comes_ends_as_an_error(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=1) as tts:
        tts._engine._max_text_wait_s = 0.3
        for text in ("", "Hello there, how"):
            listener = Listener()
            tts.open_turn(text, sink=listener, params=PARAMS)
            finished = listener.wait()
            assert (finished.reason, finished.error) == ("error", "no text for 0.3 s")


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("bad_request", {"text": "  "}),
        ("bad_request", {"text": "a", "chunk_frames": 0}),
        ("unknown_voice", {"text": "a", "voice": "../../etc/passwd"}),
        ("unknown_language", {"text": "a", "language": "klingon"}),
        ("unsupported", {"text": "a", "instruct": "happily"}),
    ],
)
def test_bad_requests_raise_at_once(tts, code, options):
    with pytest.raises(RequestError) as caught:
        tts.open_turn(sink=Listener(), ended=True, **options)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_text_after_the_end_is_refused(tts):
    turn = tts.open_turn("Hello there.", sink=Listener(), ended=True, params=PARAMS)
    with pytest.raises(RequestError, match="after the end"):
        turn.append("more")
    turn.end()
    turn.cancel()


def test_a_turn_whose_prompt_is_being_made_is_waiting(tts, monkeypatch):
    began, go_on, make = threading.Event(), threading.Event(), tts._engine._prompts.open

    def slow(*args, **options):
        began.set()
        assert go_on.wait(240)
        return make(*args, **options)

    monkeypatch.setattr(tts._engine._prompts, "open", slow)
    turn = tts.open_turn(sink=Listener())
    try:
        assert began.wait(240)
        assert tts._engine.num_waiting == 1
    finally:
        go_on.set()
        turn.cancel()
    wait_idle(tts)


def test_prompt_beyond_the_slot_is_an_error_not_a_crash(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=1, max_positions=16) as tts:
        listener = Listener()
        tts.open_turn(TEXT, sink=listener, ended=True, streaming=False)
        assert "too long" in listener.wait().error
        listener = Listener()
        tts.open_turn(TEXT, sink=listener, ended=True)
        assert listener.wait().reason == "length"


def test_a_sink_that_raises_loses_its_turn_only(tts):
    def broken(event):
        raise RuntimeError("broken sink")

    tts.open_turn(TEXT, sink=broken, ended=True, params=LONG)
    assert speak(tts, params=GenerationParams(max_frames=5)).events[-1].num_frames == 5
    wait_idle(tts)


def test_a_dead_decoder_tells_every_turn_and_takes_no_more(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=2) as tts:
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            tts.open_turn(TEXT, sink=listener, ended=True, params=LONG)
        listeners[0].wait_for_audio()

        def fail(*_):
            raise RuntimeError("device lost")

        tts._engine._backend.launch = fail
        for listener in listeners:
            finished = listener.wait()
            assert finished.reason == "error"
            assert finished.error == "the decoder has failed; the process must be restarted"
        assert isinstance(tts.error, RuntimeError)
        with pytest.raises(RequestError, match="must be restarted"):
            tts.open_turn(TEXT, sink=Listener(), ended=True)
        with pytest.raises(RequestError):
            list(tts.stream(TEXT))


def test_a_small_model_computes_in_one_thread(tiny_base):
    """On two cores of which one is busy, two threads are a hundred times slower."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with TTSDecoder.load(tiny_base, num_slots=1, device="cpu") as tts:
            done = threading.Event()
            tts.open_turn(
                TEXT,
                sink=lambda event: (
                    seen.append(torch.get_num_threads()),
                    isinstance(event, Finished) and done.set(),
                ),
                ended=True,
                params=GenerationParams(max_frames=1),
            )
            assert done.wait(240)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_after_the_warm_up_a_turn_begins_with_its_own_rows(tiny_base, monkeypatch):
    with TTSDecoder.load(tiny_base, num_slots=2) as tts:
        for name, seed in (("anna", 0), ("ben", 1)):
            embedding = torch.randn(128, generator=torch.Generator().manual_seed(seed))
            tts.add_voice(name, Voice.x_vector(embedding))
        prefilled, told = [], []
        compute = tts._engine._backend._prefill_rows
        monkeypatch.setattr(
            tts._engine._backend,
            "_prefill_rows",
            lambda slot, rows, begin: (prefilled.append(len(rows)), compute(slot, rows, begin)),
        )
        tts.warm_up(told.append)
        assert told == ["warming up: voice anna", "warming up: voice ben"]
        assert sum(prefilled) > 10
        prefilled.clear()
        tts.synthesize(TEXT, "ben", params=GenerationParams(max_frames=2))
        assert sum(prefilled) == 0, "all rows but the one that is decoded were there"


def test_a_turn_that_fails_raises_from_the_stream(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=1, max_positions=16) as tts, pytest.raises(SynthesisError):
        tts.synthesize(TEXT, streaming=False)


@pytest.mark.slow
def test_close_lets_turns_end_and_then_cancels(tiny_base):
    tts = TTSDecoder.load(tiny_base, num_slots=2)
    short, endless = Listener(), Listener()
    tts.open_turn(TEXT, sink=short, ended=True, params=GenerationParams(max_frames=2))
    tts.open_turn(TEXT, sink=endless, ended=True, params=LONG)
    tts.close(drain_s=2.0)
    assert short.wait().reason == "length"
    assert endless.wait().reason == "cancelled"
    with pytest.raises(RequestError, match="shutting down"):
        tts.open_turn(TEXT, sink=Listener(), ended=True)


def test_equal_codes_end_as_repeat(tts):
    greedy = SamplingParams(0.0, 0, 1.0, 1.0)
    params = GenerationParams(talker=greedy, max_frames=400, guards=Guards(repeat_frames=2))
    with always_says(tts, 100):
        finished = speak(tts, params=params).events[-1]
    assert finished.reason == "repeat"
    assert 2 <= finished.num_frames < 200


def test_length_budget_follows_the_text(tts):
    guards = Guards(repeat_frames=0, base_frames=5, frames_per_token=1)
    num_tokens = len(tts._prompts.tokenizer.encode(TEXT))
    finished = speak(tts, params=GenerationParams(guards=guards)).events[-1]
    assert finished.reason == "length"
    assert finished.num_frames == 5 + num_tokens


def test_eos_ends_as_stop(tts):
    with always_says(tts, tts.config.talker.codec_eos_id):
        finished = speak(tts, params=GenerationParams(seed=1)).events[-1]
    assert finished.reason == "stop"
    assert 2 <= finished.num_frames < 200


@pytest.mark.slow
def test_text_is_tokenised_by_its_caller_and_embedded_as_it_is_needed(tts, monkeypatch):
    """However much text comes at once, a frame costs the engine the same."""
    threads, made = set(), []
    encode, rows = tts._prompts.tokenizer.encode, tts._prompts.each_text_row
    monkeypatch.setattr(
        tts._prompts.tokenizer,
        "encode",
        lambda text: (threads.add(threading.current_thread()), encode(text))[1],
    )
    monkeypatch.setattr(tts._prompts, "each_text_row", lambda ids: (made.append(len(ids)), rows(ids))[1])
    finished = speak(tts, TEXT * 60, params=GenerationParams(max_frames=40)).events[-1]
    assert finished.num_frames == 40
    assert threads == {threading.current_thread()}
    assert made == [64], "rows of 40 frames out of some thousand"


def test_a_text_longer_than_the_engine_takes_at_a_time_is_taken_whole(tts, monkeypatch):
    monkeypatch.setattr("qwen_megakernel.engine.active_turn.max_part_tokens", lambda *_, **__: 10_000)
    num_tokens = len(tts._prompts.tokenizer.encode(TEXT * 60))
    assert num_tokens > 2 * MAX_BLOCK
    for streaming in (True, False):
        guards = Guards(repeat_frames=0, base_frames=5 - num_tokens, frames_per_token=1)
        params = GenerationParams(guards=guards)
        finished = speak(tts, TEXT * 60, params=params, streaming=streaming).events[-1]
        assert (finished.reason, finished.num_frames) == ("length", 5)
