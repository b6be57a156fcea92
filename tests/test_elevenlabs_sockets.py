"""ElevenLabs' two WebSockets on a session whose turns a test controls."""

import asyncio
import base64
import io
import json

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_stage import Stage, StagedTalk
from test_elevenlabs_messages import MESSAGES

from qwen_megakernel.serving.elevenlabs_messages import OUTPUT_FORMATS, Query
from qwen_megakernel.serving.elevenlabs_sockets import RULES, MultiDialect, StreamDialect
from qwen_megakernel.serving.events import Reply
from qwen_megakernel.serving.word_timing import Pace

RAW = Query(OUTPUT_FORMATS["pcm_24000"])


class Talk(StagedTalk):
    def __init__(self, kind=MultiDialect, query=RAW, **limits):
        stage = Stage(RULES, max_messages_per_s=500.0, **limits)
        super().__init__(stage, kind(stage.session, query, "anna", Pace()))

    def say(self, text=None, context_id="a", **fields):
        words = {} if text is None else {"text": text}
        self.dialect.receive(json.dumps({"context_id": context_id} | words | fields))


def kinds(lines):
    """What each message is, and of which context."""
    return [
        ("error" if "error" in line else "end" if line["isFinal"] else "audio", line.get("contextId"))
        for line in lines
    ]


def words_of(lines):
    """Words and their beginnings, as a client adds them up, from messages with alignments."""
    found, clock_ms, word = [], 0, ""
    for line in lines:
        alignment = line.get("alignment")
        assert line.get("normalizedAlignment") == alignment
        if not alignment:
            continue
        starts, durations = alignment["charStartTimesMs"], alignment["charDurationsMs"]
        for char, start in zip(alignment["chars"], starts, strict=True):
            if char == " ":
                found[-1] = (word, found[-1][1])
                word = ""
                continue
            if not word:
                found.append(("", clock_ms + start))
            word += char
        clock_ms += starts[-1] + durations[-1]
    return found


def test_a_context_speaks_what_is_flushed_and_ends_when_it_is_closed():
    async def script():
        talk = Talk()
        talk.say(" ", voice_settings={"stability": 0.5})
        assert talk.stage.turns == []
        talk.say("One ")
        talk.say("two. ", flush=True)
        talk.say("Three. ")
        talk.say(flush=True)
        talk.say(close_context=True)
        for turn in talk.stage.turns:  # grows meanwhile
            turn.speak()
            turn.finish()
            await asyncio.sleep(0)
        assert [turn.text for turn in talk.stage.turns] == ["One two. ", "Three. "]
        lines = await talk.heard()
        assert kinds(lines)[0] == ("audio", "a")
        assert kinds(lines)[-1] == ("end", "a")
        assert [word for word, _ in words_of(lines)] == ["One", "two.", "Three."]
        assert all(line["contextId"] == line["context_id"] == "a" for line in lines)

    asyncio.run(script())


def test_a_close_stops_a_context_whose_text_is_not_flushed():
    async def script():
        talk = Talk()
        talk.say("One two three. ", flush=True)
        talk.say("Four ")
        talk.stage.turns[0].speak()
        talk.say(close_context=True)
        talk.stage.turns[0].speak()
        assert talk.stage.turns[0].cancelled
        assert kinds(await talk.heard()) == [("end", "a")]

    asyncio.run(script())


def test_a_second_close_stops_a_context_that_still_speaks():
    async def script():
        talk = Talk()
        talk.say("One two three. ", flush=True)
        talk.say(close_context=True)
        talk.stage.turns[0].speak()
        assert not talk.stage.turns[0].cancelled
        talk.say(close_context=True)
        talk.say(close_context=True)  # nothing is left to stop
        talk.stage.turns[0].speak()
        assert talk.stage.turns[0].cancelled
        assert kinds(await talk.heard()) == [("end", "a")]

    asyncio.run(script())


def test_an_id_may_be_used_again_at_once():
    async def script():
        talk = Talk()
        talk.say("One. ", flush=True)
        talk.say(close_context=True)
        talk.say("Two. ", flush=True)
        talk.say(close_context=True)
        for turn in talk.stage.turns:
            turn.speak()
            turn.finish()
        lines = await talk.heard()
        assert [kind for kind, _ in kinds(lines)].count("end") == 2
        assert [turn.text for turn in talk.stage.turns] == ["One. ", "Two. "]

    asyncio.run(script())


def test_an_empty_text_keeps_alive_and_opens_nothing():
    async def script():
        talk = Talk()
        talk.say("")
        talk.say("", context_id=None)
        talk.say(flush=True)
        talk.say(close_context=True)
        assert not talk.stage.session.busy
        talk.say("One ")
        talk.say("")
        assert talk.stage.session.busy
        assert await talk.heard() == []

    asyncio.run(script())


def test_in_auto_mode_a_sentence_is_complete():
    async def script():
        talk = Talk(query=Query(OUTPUT_FORMATS["pcm_24000"], auto_mode=True))
        talk.say("It is late. ")
        talk.say("It is ", context_id="b")
        assert [turn.ended for turn in talk.stage.turns] == [True, False]
        talk.say(close_context=True)  # its text was not flushed
        assert talk.stage.turns[0].cancelled

    asyncio.run(script())


def test_the_socket_closes_behind_what_was_flushed():
    async def script():
        talk = Talk()
        talk.say("One. ", flush=True)
        talk.say("Two ", context_id="b")
        talk.say(close_socket=True)
        assert [turn.cancelled for turn in talk.stage.turns] == [False, True]
        talk.say("Three. ", context_id="c")
        talk.stage.turns[0].speak()
        talk.stage.turns[0].finish()
        lines = await talk.heard()
        assert ("error", "c") in kinds(lines)
        assert kinds(lines)[-1] == ("end", "a")
        assert talk.over == "closed"

    asyncio.run(script())


def test_a_second_close_of_the_socket_does_not_wait():
    async def script():
        talk = Talk()
        talk.say("One. ", flush=True)
        talk.say(close_socket=True)
        talk.say(close_socket=True)
        assert talk.stage.turns[0].cancelled
        assert kinds(await talk.heard()) == [("end", "a")]
        assert talk.over == "closed"

    asyncio.run(script())


def test_settings_are_those_of_the_first_message():
    async def script():
        talk = Talk(query=Query(OUTPUT_FORMATS["pcm_24000"], "english", 7, markup=True))
        talk.say(" ", voice_settings={"speed": 2})
        talk.say("One. ", flush=True)
        options = talk.stage.turns[0].options
        assert (options["voice"], options["language"], options["params"].seed) == ("anna", "english", 7)
        talk.say("Two <break time='1s'/>three. ", flush=True)
        turn = talk.stage.turns[0]
        turn.speak(24_000)
        turn.finish()
        await asyncio.sleep(0)
        audio = sum(len(line["audio"] or "") * 3 // 8 for line in await talk.heard())
        assert audio == pytest.approx(12_000, rel=0.1)
        assert talk.stage.turns[1].text == "Two "

    asyncio.run(script())


def test_one_text_ends_with_an_empty_one_and_the_socket_closes():
    async def script():
        talk = Talk(StreamDialect)
        for text in (" ", "One ", "two. ", ""):
            talk.say(text)
        talk.say("Three. ")
        turn = talk.stage.turns[0]
        assert (turn.text, turn.ended) == ("One two. ", True)
        turn.speak()
        turn.finish()
        lines = await talk.heard()
        assert [kind for kind, _ in kinds(lines)] == ["error", "audio", "audio", "end"]
        assert "contextId" not in lines[-1]
        assert talk.over == "closed"

    asyncio.run(script())


def test_a_text_that_is_empty_ends_at_once():
    async def script():
        talk = Talk(StreamDialect)
        talk.say("")
        assert kinds(await talk.heard()) == [("end", None)]
        assert talk.over == "closed"

    asyncio.run(script())


@pytest.mark.parametrize(("kind", "over"), [(StreamDialect, "refused"), (MultiDialect, None)])
def test_a_text_that_cannot_be_spoken_is_over(kind, over):
    async def script():
        talk = Talk(kind)
        talk.stage.decoder.languages = ()
        talk.say("Hi. ", flush=True)
        lines = await talk.heard()
        context_id = "a" if kind is MultiDialect else None
        assert kinds(lines) == [("error", context_id), ("end", context_id)]
        assert (lines[0]["error"], lines[0]["code"]) == ("unknown_language", 1008)
        assert talk.over == over

    asyncio.run(script())


@pytest.mark.parametrize("kind", [StreamDialect, MultiDialect])
def test_a_text_that_is_too_long_changes_nothing(kind):
    async def script():
        talk = Talk(kind, max_text_chars=20)
        talk.say("Hi. ")
        talk.say("a" * 18)
        talk.dialect.receive(b"\0")
        assert [line["error"] for line in await talk.heard()] == ["text_too_long", "bad_request"]
        talk.say("Ho. ", flush=True)
        assert talk.stage.turns[0].text == "Hi. Ho. "

    asyncio.run(script())


def test_contexts_are_limited():
    async def script():
        talk = Talk()
        for number in range(10):
            talk.say("Hi ", context_id=str(number))
        lines = await talk.heard()
        assert [(line["error"], line["code"], line["contextId"]) for line in lines] == [
            ("overloaded", 1013, "8"), ("overloaded", 1013, "9"),
        ]  # fmt: skip

    asyncio.run(script())


def test_compressed_audio_is_one_file_over_all_messages_of_a_context():
    async def script():
        talk = Talk(query=Query(OUTPUT_FORMATS["mp3_44100_64"]))
        for text in ("One two. ", "Three. "):
            talk.say(text, flush=True)
        talk.say(close_context=True)
        for turn in talk.stage.turns:
            turn.speak(7_200)
            turn.finish()
            await asyncio.sleep(0)
        lines = await talk.heard()
        data = b"".join(base64.b64decode(line["audio"] or "") for line in lines)
        with av.open(io.BytesIO(data)) as file:
            num_samples = sum(frame.samples for frame in file.decode(audio=0))
        assert num_samples == pytest.approx(2 * 13_230, abs=4_410)
        assert [word for word, _ in words_of(lines)] == ["One", "two.", "Three."]

    asyncio.run(script())


@pytest.mark.parametrize("kind", [StreamDialect, MultiDialect])
@given(st.lists(MESSAGES, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_messages_get_answers_with_codes(kind, messages):
    async def script():
        talk = Talk(kind)
        for message in messages:
            talk.dialect.receive(message)
        for turn in talk.stage.turns:
            turn.speak()
            turn.finish()
        for event in list(talk.stage.session._outbox._entries):
            if isinstance(event, Reply):
                line = json.loads(event.message)
                assert line["error"]
                assert line["message"]
                assert line["code"] in (1008, 1011, 1013)
        talk.stage.session.close()

    asyncio.run(script())
