"""Pipecat's own Deepgram services speak through our server: only URL, key and voice are changed."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("pipecat.services.deepgram.tts", reason="needs pipecat-ai")

from conversation import ENDLESS, TURN, only, pcm, play, turn, until
from live_server import DEMO_TOKEN, SOON
from pipecat.frames.frames import InterruptionFrame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.services.deepgram.tts import DeepgramHttpTTSService, DeepgramTTSService


def make_service(server, **options):
    return DeepgramTTSService(
        api_key=DEMO_TOKEN,
        base_url=server.url,
        settings=DeepgramTTSService.Settings(voice="slt"),
        **options,
    )


def test_it_speaks_is_interrupted_and_speaks_again(demo_server):
    async def scenario():
        service = make_service(demo_server)

        def script():
            yield from turn(ENDLESS)
            yield from until(lambda: demo_server.ready(DEMO_TOKEN)["active"])
            yield InterruptionFrame()
            yield from turn(*TURN)

        return await play(service, script())

    after = len(demo_server.err)
    down, errors = asyncio.run(scenario())
    assert errors == []
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    interruption = next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))
    audio = only(down[interruption:], TTSAudioRawFrame)
    cut_short = {frame.context_id for frame in only(down[:interruption], TTSAudioRawFrame)}
    assert not cut_short & {frame.context_id for frame in audio}
    num_frames = int(
        demo_server.wait_for_line(r"turn \S+: stop, .*voice slt, .*frames (\d+)", after=after)[1]
    )
    assert len(pcm(audio)) == num_frames * 1920 * 2
    demo_server.wait_until_idle(token=DEMO_TOKEN)


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_other_rates(demo_server, rate):
    after = len(demo_server.err)
    service = make_service(demo_server, sample_rate=rate)
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Good morning.")]))
    assert errors == []
    num_frames = int(demo_server.wait_for_line(r"turn \S+: stop, .*frames (\d+)", after=after)[1])
    assert len(pcm(down)) == num_frames * rate * 2 * 8 // 100


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
