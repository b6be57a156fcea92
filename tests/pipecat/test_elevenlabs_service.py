"""Pipecat's own ElevenLabs services speak through this server. Only URL, key and voice are changed."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("pipecat.services.elevenlabs.tts", reason="needs pipecat-ai")

from conversation import ENDLESS, TURN, names, only, pcm, play, spoken, turn, until
from foreign_service import check_rate, speak_interrupt_speak
from live_server import DEMO_TOKEN, SOON
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSTextFrame,
)
from pipecat.services.elevenlabs.tts import ElevenLabsHttpTTSService, ElevenLabsTTSService


def make_service(server, **options):
    return ElevenLabsTTSService(
        api_key=DEMO_TOKEN,
        url=server.url,
        settings=ElevenLabsTTSService.Settings(voice="slt"),
        **options,
    )


def test_it_speaks_is_interrupted_and_speaks_again(demo_server):
    rest = speak_interrupt_speak(demo_server, lambda: make_service(demo_server))
    assert spoken(rest).split() == "".join(TURN).split()


def test_an_interruption_stops_a_reply_whose_text_still_comes(demo_server):
    after = len(demo_server.err)

    def is_active():
        return demo_server.ready(DEMO_TOKEN)["active"]

    def script():
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame(f"{ENDLESS} And more ")
        yield from until(is_active)
        yield InterruptionFrame()
        yield from until(lambda: not is_active())

    _, errors = asyncio.run(play(make_service(demo_server), script()))
    assert errors == []
    assert demo_server.frames_of_cancelled_turn(after) < SOON


@pytest.mark.slow
def test_words_come_between_the_audio_they_are_heard_in(demo_server):
    down, errors = asyncio.run(play(make_service(demo_server), turn(*TURN)))
    assert errors == []
    words = only(down, TTSTextFrame)
    assert [word.pts for word in words] == sorted(word.pts for word in words)
    seconds = len(pcm(down)) / 48_000
    assert 0.5 * seconds < (words[-1].pts - words[0].pts) / 1e9 < seconds
    assert names(only(down, TTSAudioRawFrame)) == ["TTSAudioRawFrame"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates(demo_server, rate):
    check_rate(demo_server, make_service(demo_server, sample_rate=rate), rate)


def test_the_http_service_speaks_with_words(demo_server):
    async def scenario():
        async with aiohttp.ClientSession() as session:
            service = ElevenLabsHttpTTSService(
                api_key=DEMO_TOKEN,
                base_url=f"http://127.0.0.1:{demo_server.port}",
                aiohttp_session=session,
                settings=ElevenLabsHttpTTSService.Settings(voice="slt"),
            )
            return await play(service, [TTSSpeakFrame("Good morning, my friend.")])

    down, errors = asyncio.run(scenario())
    assert errors == []
    assert len(pcm(down)) > 24_000
    assert spoken(down) == "Good morning, my friend."
