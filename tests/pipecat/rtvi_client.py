"""A client of the demo without a browser: RTVI over Pipecat's WebSocket transport."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
from pipecat.frames.protobufs import frames_pb2
from websockets.asyncio.client import connect

RATE = 24_000
VOICE_RATE = 16_000
_FORMANTS = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480))


def voice(seconds: float) -> bytes:
    """Vowels from a source and three formants, which a voice detector accepts as a voice."""
    time = np.arange(round(seconds * VOICE_RATE)) / VOICE_RATE
    phase = 2 * np.pi * np.cumsum(120 * (1 + 0.1 * np.sin(2 * np.pi * 2.3 * time))) / VOICE_RATE
    source = sum(np.sin(k * phase) / k for k in range(1, 40))
    syllables = []
    for index, part in enumerate(np.array_split(source, round(seconds / 0.14))):
        for formant in _FORMANTS[index % len(_FORMANTS)]:
            part = _resonate(part, formant)
        syllables.append(part * np.sqrt(np.hanning(len(part))))
    return (0.5 * np.concatenate(syllables) * 32_767).astype("<i2").tobytes()


def _resonate(samples: np.ndarray, hertz: float, width: float = 90.0) -> np.ndarray:
    radius = np.exp(-np.pi * width / VOICE_RATE)
    first, second = 2 * radius * np.cos(2 * np.pi * hertz / VOICE_RATE), -radius * radius
    result, before, older = np.zeros_like(samples), 0.0, 0.0
    for index, sample in enumerate(samples):
        older, before = before, sample + first * before + second * older
        result[index] = before
    return result / np.abs(result).max()


class RtviClient:
    """`async with RtviClient(port) as client`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.messages: list[dict[str, Any]] = []
        self.audio = bytearray()
        self._changed = asyncio.Event()
        self._numbers = iter(range(1, 1_000_000))

    async def __aenter__(self) -> RtviClient:
        answer = await asyncio.to_thread(self._start)
        self._socket = await connect(answer["wsUrl"], max_size=None)
        self._reader = asyncio.create_task(self._read())
        await self.say("client-ready", version="1.0.0", about={"library": "tests"})
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reader.cancel()
        await self._socket.close()

    def _start(self) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://localhost:{self.port}/start",
            json.dumps({"transport": "websocket"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    async def say(self, kind: str, **data: Any) -> None:
        message = {"label": "rtvi-ai", "type": kind, "id": str(next(self._numbers)), "data": data}
        frame = frames_pb2.Frame()
        frame.message.data = json.dumps(message)
        await self._socket.send(frame.SerializeToString())

    async def speak(self, pcm: bytes) -> None:
        """Send speech to the microphone, in real time."""
        step = VOICE_RATE // 50 * 2
        for start in range(0, len(pcm), step):
            frame = frames_pb2.Frame()
            frame.audio.audio = pcm[start : start + step]
            frame.audio.sample_rate, frame.audio.num_channels = VOICE_RATE, 1
            await self._socket.send(frame.SerializeToString())
            await asyncio.sleep(0.02)

    async def wait(self, condition: Callable[[], object], limit_s: float = 120.0) -> None:
        async with asyncio.timeout(limit_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def count(self, kind: str) -> int:
        return sum(message["type"] == kind for message in self.messages)

    def words(self, since: int = 0) -> str:
        """The bot's words that were played."""
        texts = [m["data"]["text"] for m in self.messages[since:] if m["type"] == "bot-tts-text"]
        return " ".join(texts)

    async def _read(self) -> None:
        async for data in self._socket:
            frame = frames_pb2.Frame.FromString(data)
            if frame.WhichOneof("frame") == "audio":
                assert frame.audio.sample_rate == RATE
                self.audio += frame.audio.audio
            elif frame.WhichOneof("frame") == "message":
                self.messages.append(json.loads(frame.message.data))
            self._changed.set()
