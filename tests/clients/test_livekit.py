"""LiveKit's plugins speak through this server. Only base URL, key and voice are changed."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("livekit.plugins.cartesia", reason="make test-clients has it")

from live_server import DEMO_TOKEN
from livekit.plugins import cartesia, deepgram, elevenlabs, openai

TEXT = "Good morning. How are you today?"


def openai_tts(server, http_url, session, model):
    return openai.TTS(base_url=f"{http_url}/v1", api_key=DEMO_TOKEN, voice="slt", model=model)


def cartesia_tts(server, http_url, session):
    return cartesia.TTS(base_url=http_url, api_key=DEMO_TOKEN, voice="slt", http_session=session)


def deepgram_tts(server, http_url, session):
    return deepgram.TTS(
        base_url=f"{http_url}/v1/speak", api_key=DEMO_TOKEN, model="slt", http_session=session
    )


def elevenlabs_tts(server, http_url, session):
    return elevenlabs.TTS(
        base_url=f"{http_url}/v1", api_key=DEMO_TOKEN, voice_id="slt", http_session=session
    )


async def synthesize(tts):
    """Seconds of the audio of a whole text."""
    return sum([event.frame.duration async for event in tts.synthesize(TEXT)])


async def stream(tts):
    """Seconds of the audio of a text that comes in pieces, and its words."""
    seconds, words = 0.0, []
    async with tts.stream() as stream:
        for word in TEXT.split(" "):
            stream.push_text(f"{word} ")
        stream.end_input()
        async for event in stream:
            seconds += event.frame.duration
            words += event.frame.userdata.get("lk.timed_transcripts", [])
    return seconds, words


async def interrupt(server, tts):
    """Leave a stream while it speaks, and wait until nothing speaks."""
    async with tts.stream() as stream:
        stream.push_text("The quick brown fox jumps over the lazy dog, again and again. " * 5)
        stream.end_input()
        async for _ in stream:
            break
    await tts.aclose()
    await asyncio.to_thread(server.wait_until_idle, token=DEMO_TOKEN)


@pytest.mark.parametrize("model", ["tts-1", "gpt-4o-mini-tts"])
def test_openai(demo_server, http_url, model):
    async def scenario():
        tts = openai_tts(demo_server, http_url, None, model)
        try:
            return await synthesize(tts)
        finally:
            await tts.aclose()

    assert asyncio.run(scenario()) > 1.0


@pytest.mark.parametrize("make", [cartesia_tts, deepgram_tts, elevenlabs_tts])
def test_a_plugin_speaks_is_interrupted_and_speaks_again(demo_server, http_url, make):
    async def scenario():
        async with aiohttp.ClientSession() as session:
            tts = make(demo_server, http_url, session)
            whole = await synthesize(tts)
            before = await stream(tts)
            await interrupt(demo_server, tts)
            again = make(demo_server, http_url, session)
            try:
                return whole, before, await stream(again)
            finally:
                await again.aclose()

    whole, before, after = asyncio.run(scenario())
    assert whole > 1.0
    assert before[0] > 1.0
    assert after[0] > 1.0


@pytest.mark.parametrize("make", [cartesia_tts, elevenlabs_tts])
def test_words_are_those_of_the_text(demo_server, http_url, make):
    async def scenario():
        async with aiohttp.ClientSession() as session:
            tts = make(demo_server, http_url, session)
            try:
                return await stream(tts)
            finally:
                await tts.aclose()

    _, words = asyncio.run(scenario())
    assert "".join(words).split() == TEXT.split()
    if make is cartesia_tts:  # the other plugin does not add up the times of messages
        assert [word.start_time for word in words] == sorted(word.start_time for word in words)


def test_voices_of_elevenlabs_are_listed(demo_server, http_url):
    async def scenario():
        async with aiohttp.ClientSession() as session:
            return await elevenlabs_tts(demo_server, http_url, session).list_voices()

    assert {"slt", "rms"} <= {voice.id for voice in asyncio.run(scenario())}
