"""Pipecat's own OpenAI service speaks through this server. Only its base URL is changed."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.openai.tts", reason="needs pipecat-ai and openai")

from conversation import ENDLESS, TURN, only, pcm, play, turn, until
from live_server import SOON, LiveServer
from pipecat.frames.frames import InterruptionFrame, TTSAudioRawFrame
from pipecat.services.openai.tts import OpenAITTSService


@pytest.fixture(scope="module")
def server():
    server = LiveServer("--model", "demo_voice", "--voices", "demo_voice/voices")
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def test_it_speaks_is_interrupted_and_speaks_again(server):
    async def scenario():
        service = OpenAITTSService(
            api_key="none",
            base_url=f"http://127.0.0.1:{server.port}/v1",
            settings=OpenAITTSService.Settings(voice="nova"),
        )

        def script():
            yield from turn(ENDLESS)
            yield from until(lambda: server.ready()["active"])
            yield InterruptionFrame()
            yield from turn(*TURN)

        return await play(service, script())

    down, errors = asyncio.run(scenario())
    assert errors == []
    assert server.frames_of_cancelled_turn(0) < SOON
    interruption = next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))
    audio = only(down[interruption:], TTSAudioRawFrame)
    cut_short = {frame.context_id for frame in only(down[:interruption], TTSAudioRawFrame)}
    assert not cut_short & {frame.context_id for frame in audio}
    num_frames = sum(
        int(server.wait_for_line(rf"turn {number}-1: stop, .*frames (\d+)")[1]) for number in (2, 3, 4)
    )
    assert len(pcm(audio)) == num_frames * 1920 * 2
    server.wait_until_idle()
