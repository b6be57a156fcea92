"""Pipecat's own Deepgram services speak through this server. Only URL, key and voice are changed."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("pipecat.services.deepgram.tts", reason="needs pipecat-ai")

from conversation import pcm, play
from foreign_service import check_rate, speak_interrupt_speak
from live_server import DEMO_TOKEN
from pipecat.frames.frames import TTSSpeakFrame
from pipecat.services.deepgram.tts import DeepgramHttpTTSService, DeepgramTTSService


def make_service(server, **options):
    return DeepgramTTSService(
        api_key=DEMO_TOKEN,
        base_url=server.url,
        settings=DeepgramTTSService.Settings(voice="slt"),
        **options,
    )


def test_it_speaks_is_interrupted_and_speaks_again(demo_server):
    speak_interrupt_speak(demo_server, lambda: make_service(demo_server))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_other_rates(demo_server, rate):
    check_rate(demo_server, make_service(demo_server, sample_rate=rate), rate)


def test_the_http_service_speaks(demo_server):
    async def scenario():
        async with aiohttp.ClientSession() as session:
            service = DeepgramHttpTTSService(
                api_key=DEMO_TOKEN,
                base_url=f"http://127.0.0.1:{demo_server.port}",
                aiohttp_session=session,
                settings=DeepgramHttpTTSService.Settings(voice="slt"),
            )
            return await play(service, [TTSSpeakFrame("Good morning.")])

    down, errors = asyncio.run(scenario())
    assert errors == []
    assert len(pcm(down)) > 24_000
