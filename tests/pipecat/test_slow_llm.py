"""An LLM that pauses while it writes: its reply is spoken whole, once, and sentence by sentence."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import LONG_SETTINGS, make_service, only, pcm, play, spoken, turn, until
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.services.tts_service import TextAggregationMode
from pipecat.tests.utils import SleepFrame
from wire_tap import WireTap, num_chunks, num_segments

from pipecat_client import megakernel_tts
from qwen_megakernel.serving.native_messages import Cancel, Done, Flush, Progress

SENTENCE, TOKEN = TextAggregationMode.SENTENCE, TextAggregationMode.TOKEN
EXACT = {"seed": 11, "temperature": 2.0}


def tokens(text):
    return [LLMTextFrame(text[i : i + 4]) for i in range(0, len(text), 4)]


def num_waits(tap):
    """How often the server has reported that it waits for text."""
    progress = tap.line.received(Progress) if tap.lines else []
    return sum(message.state == "waiting_for_text" for message in progress)


def converse(server, script, **options):
    async def scenario():
        async with WireTap(server.port) as tap:
            down, errors = await play(make_service(tap.url, **EXACT | options), script(tap))
            assert errors == []
            return tap, down

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        pytest.param(SENTENCE, "One is the first. Two comes ", "after it.", id="sentence"),
        pytest.param(TOKEN, "One is the first. Two comes ", "after it.", id="token-in-a-sentence"),
        pytest.param(TOKEN, "One is the first.", " Two comes after it.", id="token-after-a-sentence"),
    ],
)
def test_pause_is_not_the_end_of_the_reply(live_server, mode, before, after):
    """The pause is longer than Pipecat waits for audio (`stop_frame_timeout_s`)."""

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens(before)
        yield from until(lambda: num_waits(tap) == 3)
        yield from tokens(after)
        yield LLMFullResponseEndFrame()

    tap, down = converse(live_server, script, text_aggregation_mode=mode, stop_frame_timeout_s=1.8)
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert spoken(down) == before + after
    assert tap.line.sent(Cancel) == []
    assert [done.finish_reason for done in tap.line.received(Done)] == ["stop"]
    assert pcm(down) == tap.line.pcm() != b""


@pytest.mark.slow
def test_sentence_is_spoken_to_its_end_without_the_next(live_server):
    """Its words are in the conversation if the user interrupts then."""

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens("One is the first.")
        yield from until(lambda: tap.lines and num_segments(tap.line) == 1)
        yield SleepFrame(sleep=0.1)
        yield InterruptionFrame()

    tap, down = converse(live_server, script, text_aggregation_mode=TOKEN, **LONG_SETTINGS)
    assert spoken(down) == "One is the first."
    assert pcm(down) == tap.line.pcm() != b""


@pytest.mark.slow
def test_each_sentence_is_a_segment_with_or_without_pauses(live_server):
    """The same seed gives the same speech, however the LLM writes."""
    first, second = "One is the first. ", "Two comes after it. "

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens(first.rstrip())
        yield from until(lambda: tap.lines and tap.line.sent(Flush))
        yield from tokens(" " + second)
        yield LLMFullResponseEndFrame()

    # With other settings the tiny checkpoint may end a sentence before the pause reveals its end.
    tap, down = converse(live_server, script, text_aggregation_mode=TOKEN, **LONG_SETTINGS)
    assert num_segments(tap.line) == 2
    at_once, down_at_once = converse(
        live_server, lambda tap: turn(first + second), text_aggregation_mode=TOKEN, **LONG_SETTINGS
    )
    assert num_segments(at_once.line) == 2
    sentences, down_sentences = converse(live_server, lambda tap: turn(first, second), **LONG_SETTINGS)
    assert num_segments(sentences.line) == 2
    assert pcm(down) == pcm(down_at_once) == pcm(down_sentences) != b""


def test_pause_after_an_abbreviation_ends_no_sentence(live_server):
    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens("I saw Dr.")
        yield SleepFrame(sleep=2 * megakernel_tts.SENTENCE_PAUSE_S)
        yield from tokens(" Smith.")
        yield LLMFullResponseEndFrame()

    tap, down = converse(live_server, script, text_aggregation_mode=TOKEN)
    assert num_segments(tap.line) == 1
    assert spoken(down) == "I saw Dr. Smith."


def test_very_long_pause_ends_the_segment_before_the_server_gives_it_up(live_server, monkeypatch):
    monkeypatch.setattr(megakernel_tts, "MAX_PAUSE_S", 1.5)

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens("One is the ")
        yield from until(lambda: tap.lines and tap.line.sent(Flush))
        yield InterruptionFrame()

    tap, _ = converse(live_server, script, text_aggregation_mode=TOKEN, **LONG_SETTINGS)
    assert tap.line.outline() == "sssfc"
    assert num_waits(tap) >= 1


def test_words_held_back_come_before_those_that_are_queued(live_server):
    """Pipecat holds a sentence's words back until it knows where the sentence ends."""
    text = "One is the first of very many words"

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield from tokens(text)
        yield from until(lambda: tap.lines and num_chunks(tap.line) == 2)
        yield LLMFullResponseEndFrame()

    _, down = converse(live_server, script, text_aggregation_mode=TOKEN)
    assert spoken(down) == text
