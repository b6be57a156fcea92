"""What Pipecat's own services for other servers must do on this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from conversation import ENDLESS, TURN, only, pcm, play, turn, until
from live_server import DEMO_TOKEN, SOON, LiveServer
from pipecat.frames.frames import Frame, InterruptionFrame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.services.tts_service import TTSService


def speak_interrupt_speak(server: LiveServer, make_service: Callable[[], TTSService]) -> list[Frame]:
    """Speak, interrupt, and speak `TURN`. Returns the frames from the interruption on."""

    async def scenario() -> tuple[list[Frame], list[str]]:
        service = make_service()

        def script() -> Iterator[Frame]:
            yield from turn(ENDLESS)
            yield from until(lambda: server.ready(DEMO_TOKEN)["active"])
            yield InterruptionFrame()
            yield from turn(*TURN)

        return await play(service, script())

    after = len(server.err)
    down, errors = asyncio.run(scenario())
    assert errors == []
    assert server.frames_of_cancelled_turn(after) < SOON
    interruption = next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))
    rest = down[interruption:]
    cut_short = {frame.context_id for frame in only(down[:interruption], TTSAudioRawFrame)}
    assert not cut_short & {frame.context_id for frame in only(rest, TTSAudioRawFrame)}
    line = server.wait_for_line(r"turn \S+: stop, .*voice slt, .*frames (\d+)", after=after)
    assert len(pcm(rest)) == int(line[1]) * 1920 * 2
    server.wait_until_idle(token=DEMO_TOKEN)
    return rest


def check_rate(server: LiveServer, service: TTSService, rate: int) -> None:
    """The service's audio has as many samples a second as it asked for."""
    after = len(server.err)
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Good morning.")]))
    assert errors == []
    num_frames = int(server.wait_for_line(r"turn \S+: stop, .*frames (\d+)", after=after)[1])
    assert len(pcm(down)) == num_frames * rate * 2 * 8 // 100
