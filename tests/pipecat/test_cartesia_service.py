"""Pipecat's own Cartesia services speak through this server. Only URL, key and voice are changed."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.cartesia.tts", reason="needs pipecat-ai")

from conversation import TURN, names, only, pcm, play, spoken, turn
from foreign_service import check_rate, speak_interrupt_speak
from live_server import DEMO_TOKEN
from pipecat.frames.frames import TTSAudioRawFrame, TTSSpeakFrame, TTSTextFrame
from pipecat.services.cartesia.tts import CartesiaHttpTTSService, CartesiaTTSService


def make_service(server, **options):
    return CartesiaTTSService(
        api_key=DEMO_TOKEN,
        url=f"{server.url}/tts/websocket",
        settings=CartesiaTTSService.Settings(voice="slt"),
        **options,
    )


def test_it_speaks_is_interrupted_and_speaks_again(demo_server):
    rest = speak_interrupt_speak(demo_server, lambda: make_service(demo_server))
    assert spoken(rest).split() == "".join(TURN).split()


@pytest.mark.slow
def test_words_come_between_the_audio_they_are_heard_in(demo_server):
    down, errors = asyncio.run(play(make_service(demo_server), turn(*TURN)))
    assert errors == []
    words = only(down, TTSTextFrame)
    assert [word.pts for word in words] == sorted(word.pts for word in words)
    assert names(only(down, TTSAudioRawFrame)) == ["TTSAudioRawFrame"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates(demo_server, rate):
    check_rate(demo_server, make_service(demo_server, sample_rate=rate), rate)


def test_the_http_service_speaks(demo_server):
    service = CartesiaHttpTTSService(
        api_key=DEMO_TOKEN,
        base_url=f"http://127.0.0.1:{demo_server.port}",
        settings=CartesiaHttpTTSService.Settings(voice="slt"),
    )
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Good morning.")]))
    assert errors == []
    assert len(pcm(down)) > 24_000
