"""Pipecat's own Cartesia services speak through our server: only URL, key and voice are changed."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.cartesia.tts", reason="needs pipecat-ai")

from conversation import ENDLESS, TURN, names, only, pcm, play, spoken, turn, until
from live_server import DEMO_TOKEN, SOON
from pipecat.frames.frames import InterruptionFrame, TTSAudioRawFrame, TTSSpeakFrame, TTSTextFrame
from pipecat.services.cartesia.tts import CartesiaHttpTTSService, CartesiaTTSService


def make_service(server, **options):
    return CartesiaTTSService(
        api_key=DEMO_TOKEN,
        url=f"{server.url}/tts/websocket",
        settings=CartesiaTTSService.Settings(voice="slt"),
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
    assert spoken(down[interruption:]).split() == "".join(TURN).split()
    demo_server.wait_until_idle(token=DEMO_TOKEN)


def test_words_come_between_the_audio_they_are_heard_in(demo_server):
    down, errors = asyncio.run(play(make_service(demo_server), turn(*TURN)))
    assert errors == []
    words = only(down, TTSTextFrame)
    assert [word.pts for word in words] == sorted(word.pts for word in words)
    assert names(only(down, TTSAudioRawFrame)) == ["TTSAudioRawFrame"]


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates(demo_server, rate):
    service = make_service(demo_server, sample_rate=rate)
    after = len(demo_server.err)
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Good morning.")]))
    assert errors == []
    num_frames = int(demo_server.wait_for_line(r"turn \S+: stop, .*frames (\d+)", after=after)[1])
    assert len(pcm(down)) == num_frames * rate * 2 * 8 // 100


def test_the_http_service_speaks(demo_server):
    service = CartesiaHttpTTSService(
        api_key=DEMO_TOKEN,
        base_url=f"http://127.0.0.1:{demo_server.port}",
        settings=CartesiaHttpTTSService.Settings(voice="slt"),
    )
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Good morning.")]))
    assert errors == []
    assert len(pcm(down)) > 24_000
