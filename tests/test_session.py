"""Sessions: contexts in order, their ends, and what waits for what. There is no wire here."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_stage import SEGMENT_S, InstantDecoder, Stage, run_at_once

from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextFailed,
    ContextQuiet,
    ContextStarted,
    Reply,
    SegmentDone,
    SessionOver,
)
from qwen_megakernel.serving.message_rate import BURST_S, MessageRate
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.outbox import MAX_MESSAGES
from qwen_megakernel.serving.session import MAX_UNSENT_BYTES
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.turn import RequestError, Started

ONE_TURN = SessionRules(one_turn=True, own_ids=True, max_contexts=3, when_full="full")


def played(test):
    """Runs an async test."""

    def run():
        run_at_once(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# --- contexts and segments -------------------------------------------------------------------------


@played
async def test_a_context_of_two_segments():
    stage = Stage()
    session = stage.session
    session.append("a", "One. ", SpeechOptions(voice="Bob", seed=7, temperature=0.5, chunk_frames=2))
    session.append("a", "Still one.")
    session.flush("a")
    session.append("a", "Two.", SpeechOptions(language="english"))
    session.end("a")
    first = stage.turns[0]
    assert (first.text, first.ended) == ("One. Still one.", True)
    await asyncio.sleep(0.2)
    first.speak()
    first.finish()
    await asyncio.sleep(0)
    second = stage.turns[1]  # opened when the first was generated, not when it was taken
    second.speak(960)
    second.finish("length")
    started, audio, segment, more, last, done = await stage.events()
    assert started == ContextStarted("a")
    assert (len(audio.samples), len(more.samples)) == (1920, 960)
    assert segment == SegmentDone("a", 0, 0.0, 0.08, "stop")
    assert last == SegmentDone("a", 1, 0.08, 0.04, "length")
    assert (done.context_id, done.reason, done.figures.num_samples) == ("a", "length", 2880)
    assert done.figures.generation_s == pytest.approx(0.04)
    assert done.figures.rtf == pytest.approx(0.04 / 0.12)
    assert done.figures.ttfc_s == pytest.approx(0.2, abs=1e-3)
    assert not session.busy
    assert [turn.options["params"].seed for turn in stage.turns] == [7, 8]
    assert [turn.options["language"] for turn in stage.turns] == ["auto", "english"]
    for turn in stage.turns:
        assert (turn.options["voice"], turn.options["chunk_frames"]) == ("bob", 2)
        assert turn.options["params"].talker.temperature == 0.5


@played
async def test_a_context_without_a_word_is_done_at_once():
    stage = Stage()
    stage.session.append("a", " \n")
    stage.session.flush("a")
    assert stage.turns == []
    stage.session.end("a")
    (done,) = await stage.events()
    assert (done.reason, done.figures.ttfc_s, done.figures.rtf) == ("stop", None, None)


@played
async def test_text_after_the_models_end_is_not_spoken_before_the_next_flush():
    stage = Stage()
    stage.session.append("a", "One. ")
    stage.turns[0].finish()
    await asyncio.sleep(0)
    stage.session.append("a", "Lost.")
    stage.session.flush("a")
    stage.session.append("a", "Two.")
    assert [turn.text for turn in stage.turns] == ["One. ", "Two."]


@played
async def test_contexts_wait_for_each_others_generation():
    stage = Stage()
    for name in "ab":
        stage.session.append(name, "Word.", ended=True)
    assert len(stage.turns) == 1
    stage.turns[0].speak()
    stage.turns[0].finish()
    await asyncio.sleep(0)
    stage.turns[1].speak()
    stage.turns[1].finish()
    whole = [ContextStarted, ContextAudio, SegmentDone, ContextDone]
    assert await stage.kinds() == whole + whole
    assert [record.turn for record in stage.records] == ["1-1", "1-2"]


@played
async def test_a_context_that_is_quiet_says_so_once_a_second():
    stage = Stage()
    stage.session.append("a", "Hello")
    stage.session.append("b", "Queued.")
    await asyncio.sleep(1.1)
    assert await stage.events() == [
        ContextQuiet("a", "waiting_for_text", 0),
        ContextQuiet("b", "queued", 1),
    ]
    stage.session.end("a")
    await asyncio.sleep(1.0)
    assert (await stage.events())[0] == ContextQuiet("a", "queued", 0)  # for a slot
    stage.turns[0].sink(Started())
    await asyncio.sleep(1.0)
    assert (await stage.events())[0] == ContextQuiet("a", "speaking", 0)


# --- refusals and failures -------------------------------------------------------------------------


def refusal(function, *args, **options):
    with pytest.raises(RequestError) as refused:
        function(*args, **options)
    return refused.value.code


@played
async def test_refusals_change_nothing():
    stage = Stage(max_text_chars=10)
    session = stage.session
    for function in (session.flush, session.end, session.cancel):
        assert refusal(function, "a") == "unknown_context"
    assert refusal(session.append, "a", "a" * 11) == "text_too_long"
    session.append("a", "a" * 6)
    assert refusal(session.append, "a", "a" * 5) == "text_too_long"
    session.append("a", "a" * 4, ended=True)
    for function in (session.flush, session.end):
        assert refusal(function, "a") == "bad_request"
    assert refusal(session.append, "a", "more") == "bad_request"
    for number in range(7):
        session.append(f"c{number}", "x")
    assert refusal(session.append, "ninth", "x") == "overloaded"
    session.cancel("a")
    assert refusal(session.append, "a", "again") == "bad_request"
    session.append("ninth", "x")
    assert refusal(session.check_room) == "overloaded"
    session.cancel()
    stage.decoder.error = RuntimeError("frame 3 hung")
    assert refusal(session.append, "b", "x") == "internal"
    stage.server.draining = True
    assert refusal(session.append, "b", "x") == "overloaded"


@pytest.mark.parametrize(
    ("choices", "code"),
    [
        (SpeechOptions(voice="carl"), "unknown_voice"),
        (SpeechOptions(language="klingon"), "unknown_language"),
    ],
)
def test_choices_that_cannot_be_served_fail_their_context(choices, code):
    async def fail():
        stage = Stage()
        stage.session.append("a", "Word.", choices)
        (failed,) = await stage.events()
        assert (failed.context_id, failed.code, failed.begun) == ("a", code, False)
        (record,) = stage.records
        assert (record.finish_reason, record.chars, record.error) == ("error", 5, None)

    run_at_once(fail())


@played
async def test_a_turn_that_the_engine_refuses_fails_its_context_and_the_next_goes_on():
    stage = Stage()
    stage.decoder.refusal = RequestError("overloaded", "too many turns", 4.0)
    stage.session.append("a", "Word.")
    stage.decoder.refusal = None
    stage.session.append("b", "Word.")
    (failed,) = await stage.events()
    assert (failed.context_id, failed.code, len(stage.turns)) == ("a", "overloaded", 1)
    assert failed.retry_after_s == 4.0


@played
async def test_a_failure_drops_what_waits():
    stage = Stage()
    stage.session.append("a", "Word.")
    stage.turns[0].speak()
    stage.turns[0].finish("error", "device lost")
    (failed,) = await stage.events()
    assert (failed.code, failed.message, failed.begun) == (
        "internal",
        "1-1 failed: device lost",
        True,
    )
    assert [(r.finish_reason, r.error) for r in stage.records] == [("error", "1-1 failed: device lost")]


# --- cancel, drain, close --------------------------------------------------------------------------


@played
async def test_a_cancel_ends_a_context_at_once_and_drops_what_waits():
    stage = Stage()
    stage.session.append("a", "Word.")
    stage.session.append("b", "Word.")
    stage.turns[0].speak()
    await asyncio.sleep(0)
    assert stage.session.unsent_bytes == 1920 * 4
    stage.session.cancel("a")
    assert stage.session.unsent_bytes == 0
    assert len(stage.turns) == 2  # nobody waits for the engine's answer
    stage.turns[0].speak()
    (done,) = await stage.events()
    assert (done.context_id, done.reason, done.figures.num_samples) == ("a", "cancelled", 0)
    assert stage.records == []
    stage.turns[0].finish("cancelled")
    assert await stage.events() == []
    assert [(r.turn, r.finish_reason, r.frames) for r in stage.records] == [("1-1", "cancelled", 1)]


@played
async def test_a_drain_refuses_what_has_not_begun():
    stage = Stage()
    for name in "abc":
        stage.session.append(name, "Word.")
    stage.session.drain()
    assert [(event.context_id, event.code) for event in await stage.events()] == [
        ("b", "overloaded"),
        ("c", "overloaded"),
    ]
    assert stage.session.busy
    stage.session.cancel()
    stage.session.finish("going_away")
    assert [type(event) for event in await stage.events()] == [ContextDone, SessionOver]


@played
async def test_closing_stops_the_turn_and_accounts_for_all():
    stage = Stage()
    for name in "ab":
        stage.session.append(name, "Word.")
    stage.turns[0].speak()
    await asyncio.sleep(0)
    stage.session.close()
    stage.session.close()
    assert stage.turns[0].cancelled
    assert (stage.session.busy, stage.session.unsent_bytes) == (False, 0)
    assert [record.turn for record in stage.records] == ["1-2"]
    stage.turns[0].finish("cancelled")
    await asyncio.sleep(0)
    assert [record.turn for record in stage.records] == ["1-2", "1-1"]
    assert {record.finish_reason for record in stage.records} == {"cancelled"}


# --- one turn a context ----------------------------------------------------------------------------


@played
async def test_one_turn_is_opened_without_text_and_ends_with_its_turn():
    stage = Stage(ONE_TURN)
    stage.session.append("7", "")
    assert stage.turns[0].text == ""
    assert stage.session.takes_text("7")
    stage.session.append("7", "Word.")
    stage.turns[0].speak()
    stage.turns[0].finish("silence")
    assert not stage.session.takes_text("7")  # before the event has come
    *_, done = await stage.events()
    assert (done.reason, stage.session.busy) == ("silence", False)
    assert [(r.turn, r.chars) for r in stage.records] == [("1-7", 5)]


@played
async def test_one_turn_that_is_cancelled_ends_when_the_engine_has_stopped():
    stage = Stage(ONE_TURN)
    for name in "123":
        stage.session.append(name, "Word.", ended=True)
    assert refusal(stage.session.check_room) == "overloaded"
    stage.turns[0].speak()
    await asyncio.sleep(0)
    stage.session.cancel()
    stage.session.cancel()
    assert [event.context_id for event in await stage.events()] == ["2", "3"]  # never became turns
    assert not stage.session.takes_text("1")
    stage.session.append("4", "Word.")
    assert len(stage.turns) == 1  # the next waits for the engine's answer
    stage.turns[0].speak()
    stage.turns[0].finish("cancelled")
    (done,) = await stage.events()
    assert (done.reason, done.figures.num_samples, len(stage.turns)) == ("cancelled", 0, 2)
    assert [record.turn for record in stage.records] == ["1-1"]


@played
async def test_one_turn_whose_end_waits_can_be_cancelled_and_keeps_its_place():
    stage = Stage(ONE_TURN)
    stage.session.append("1", "Word.", ended=True)
    stage.turns[0].speak()
    stage.turns[0].finish()
    await asyncio.sleep(0)
    stage.session.reply("later")
    stage.session.cancel()
    done, reply = await stage.events()
    assert (done.reason, done.figures.num_samples, reply) == ("cancelled", 0, Reply("later"))


@played
async def test_one_turn_that_fails_is_heard_first():
    stage = Stage(ONE_TURN)
    for name in "12":
        stage.session.append(name, "Word.", ended=True)
    stage.turns[0].speak()
    stage.turns[0].finish("error", "device lost")
    stage.decoder.refusal = RequestError("internal", "the decoder has failed")
    _, audio, failed, other = await stage.events()
    assert isinstance(audio, ContextAudio)
    assert (failed.message, failed.begun, failed.figures.num_samples) == ("device lost", True, 1920)
    assert (other.message, other.begun) == ("the decoder has failed", False)
    assert [(r.turn, r.error) for r in stage.records] == [("1-1", "device lost")]
    assert isinstance(other, ContextFailed)


# --- pace ------------------------------------------------------------------------------------------


@played
async def test_a_carrier_that_takes_nothing_holds_the_turn():
    stage = Stage()
    stage.session.append("a", "Word.")
    turn, chunk = stage.turns[0], 1920 * 4
    num_chunks = -(-MAX_UNSENT_BYTES // chunk)
    for _ in range(num_chunks - 1):
        turn.speak()
    await asyncio.sleep(0)
    assert not turn.held
    turn.speak()
    await asyncio.sleep(0)
    assert turn.held
    while stage.session.unsent_bytes > MAX_UNSENT_BYTES // 2:
        assert turn.held
        await stage.session.take()
    assert not turn.held


@played
async def test_the_next_turn_waits_for_the_carrier():
    stage = Stage()
    for name in "ab":
        stage.session.append(name, "Word.", ended=True)
    stage.turns[0].speak(MAX_UNSENT_BYTES // 4)
    stage.turns[0].finish()
    await asyncio.sleep(0)
    assert len(stage.turns) == 1
    await stage.session.take()
    assert len(stage.turns) == 2


@played
async def test_a_client_that_does_not_read_its_replies_is_not_read():
    stage = Stage()
    for number in range(MAX_MESSAGES + 1):
        stage.session.reply(str(number))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stage.session.keep_pace(), 0.01)
    waiting = asyncio.ensure_future(stage.session.keep_pace())
    await asyncio.sleep(0)
    while not waiting.done():
        await stage.session.take()
        await asyncio.sleep(0)
    assert len(await stage.events()) == MAX_MESSAGES // 2


@played
async def test_a_client_that_sends_too_fast_is_read_more_slowly():
    stage = Stage(max_messages_per_s=200)
    start = time.monotonic()
    for _ in range(400):  # two seconds' worth come at once, and wait for nothing
        with pytest.raises(StopIteration):
            stage.session.keep_pace().send(None)
    for _ in range(100):
        await stage.session.keep_pace()
    assert time.monotonic() - start >= 0.45


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=300), st.integers(1, 1000))
def test_no_more_messages_are_read_than_the_rate_allows(gaps, per_s):
    now, rate = 0.0, MessageRate(per_s, 0.0)
    for number, gap in enumerate(gaps, start=1):
        now += gap
        assert number <= per_s * (BURST_S + now) + 1.001
        now += rate.delay_s(now)


@played
async def test_a_session_in_which_nothing_is_said_is_over():
    stage = Stage(idle_s=0.3)
    for _ in range(4):
        await asyncio.sleep(0.1)
        await stage.session.keep_pace()
    assert await stage.events() == []
    await asyncio.sleep(0.4)
    assert await stage.events() == [SessionOver("idle")]


@played
async def test_a_session_that_speaks_or_has_no_limit_is_not_idle():
    speaking, unlimited = Stage(idle_s=0.3), Stage(idle_s=0)
    speaking.session.append("a", "Word.")
    for _ in range(5):
        speaking.turns[0].speak()
        await asyncio.sleep(0.08)
        assert SessionOver not in await speaking.kinds()
    assert await unlimited.events() == []
    speaking.session.close()
    await asyncio.sleep(0.5)
    assert await speaking.events() == [], "a timer went on after the end"


@played
async def test_audio_counts_although_its_context_fails_while_it_is_taken():
    """Taking audio makes room for the next turn, which the engine refuses."""
    stage = Stage()
    stage.session.append("a", "One.")
    stage.session.flush("a")
    stage.session.append("a", "Two.")
    stage.turns[0].speak(MAX_UNSENT_BYTES // 4)
    stage.turns[0].finish()
    await asyncio.sleep(0)
    stage.decoder.refusal = RequestError("overloaded", "too many turns", 4.0)
    _, audio, failed = await stage.events()
    assert failed.figures.num_samples == len(audio.samples) == MAX_UNSENT_BYTES // 4


# --- lead ------------------------------------------------------------------------------------------

LEAD_S = 1.0


@pytest.fixture(scope="module", params=[{}, {"max_lead_s": LEAD_S}], ids=["dialect", "server"])
def two_contexts(request):
    """The lead is the dialect's, or the server's."""

    async def speak():
        rules = SessionRules(max_lead_s=10.0 if request.param else LEAD_S)
        stage = Stage(rules, InstantDecoder(), **request.param)
        for name in ("a", "b"):
            for _ in range(3):
                stage.session.append(name, "Word.", SpeechOptions(seed=2**64 - 1))
                stage.session.flush(name)
            stage.session.end(name)
            while not isinstance((await stage.session.take())[-1], ContextDone):
                pass
        return stage

    return run_at_once(speak())


def test_lead_is_that_of_a_context_and_its_last_segments_wait(two_contexts):
    for start in (0, 3):  # the next context does not pay for the lead of the one before
        times = [turn.opened_at for turn in two_contexts.turns[start : start + 3]]
        leads = [turn.options["max_lead_s"] for turn in two_contexts.turns[start : start + 3]]
        assert leads[:2] == pytest.approx([LEAD_S, LEAD_S - SEGMENT_S], abs=0.05)
        assert times[1] - times[0] < 0.05
        assert 2 * SEGMENT_S - LEAD_S - 0.05 < times[2] - times[0] < 2 * SEGMENT_S - LEAD_S + 0.1
        assert 0 <= leads[2] < 0.1


def test_seeds_count_on_and_a_context_is_one_record(two_contexts):
    seeds = [turn.options["params"].seed for turn in two_contexts.turns[:3]]
    assert seeds == [2**64 - 1, 0, 1]
    records = two_contexts.records
    assert [(r.turn, r.chars, r.frames, r.finish_reason) for r in records] == [
        ("1-1", 15, 3, "length"),  # the first that is not `stop`
        ("1-2", 15, 3, "length"),
    ]
    assert records[0].rtf == pytest.approx(0.06 / (3 * SEGMENT_S), abs=1e-4)
