"""Halves of surrogate pairs in the LLM's text: a known fault of some servers' token streams."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import make_service, only, play, spoken, turn, until
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
)
from pipecat.services.tts_service import TextAggregationMode
from wire_tap import WireTap

FIRST, SECOND = "\ud83d", "\ude00"


def converse(server, script, mode):
    """Frames and the recording. The script is made from the tap."""

    async def scenario():
        async with WireTap(server.port) as tap:
            down, errors = await play(make_service(tap.url, text_aggregation_mode=mode), script(tap))
            assert errors == []
            return down, tap

    return asyncio.run(scenario())


@pytest.mark.parametrize("mode", list(TextAggregationMode))
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([f"Glad to hear {FIRST} it."], "Glad to hear \ufffd it."),
        ([f"Glad {FIRST}it. ", "Two comes."], "Glad \ufffdit. Two comes."),
        (
            ["One is. ", f"Glad a{FIRST}", f"{SECOND}b to. ", "Three."],
            "One is. Glad a\U0001f600b to. Three.",
        ),
        (["One is. ", f"Glad so{FIRST}"], "One is. Glad so\ufffd"),
        ([f"One is{SECOND}. ", "Two comes."], "One is\ufffd. Two comes."),
    ],
    ids=["alone", "in-the-first", "in-two-tokens", "at-the-end", "second-half"],
)
def test_halves_are_joined_or_replaced(live_server, mode, pieces, text):
    down, tap = converse(live_server, lambda tap: turn(*pieces), mode)
    assert "".join("".join(tap.line.texts()).split()) == "".join(text.split())
    assert spoken(down).split() == [word for word in text.split() if word != "\ufffd"]
    assert len(only(down, TTSStoppedFrame)) == 1
    assert only(down, TTSAudioRawFrame) != []


def test_other_texts_keep_out_of_it(live_server):
    """A half waits for the LLM's next token. Neither an interjection nor the next turn gets it."""

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame(f"One {FIRST}")
        yield TTSSpeakFrame(f"{SECOND} Wait {FIRST}")
        yield from until(lambda: tap.lines and len(tap.line.texts()) == 2)
        yield InterruptionFrame()
        yield from turn("Two comes.")

    _, tap = converse(live_server, script, TextAggregationMode.TOKEN)
    assert [text.strip() for text in tap.line.texts()] == ["One", "\ufffd Wait \ufffd", "Two comes."]
