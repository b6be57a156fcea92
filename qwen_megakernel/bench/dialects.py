"""The bench's comparison of dialects: text sent to first audio received, one turn at a time.

The dialects alternate, so that all of them meet the same state of the machine. A turn is cancelled at
its first audio, and the next one begins when the server is idle again.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from websockets.sync.client import ClientConnection, connect

from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    Done,
    End,
    Error,
    Hello,
    Speak,
    encode,
    parse_server_message,
)

TURN_S = 120.0
_WAV_HEADER = 44


class Talker(Protocol):
    """A client of one dialect."""

    def hear(self, text: str) -> float:
        """Seconds until the first audio of a text. The turn is then cancelled. Raises `RuntimeError`."""

    def close(self) -> None:
        """Hang up."""


class _Socket:
    """A WebSocket that stays open."""

    def __init__(self, port: int, path: str) -> None:
        self.socket: ClientConnection = connect(
            f"ws://127.0.0.1:{port}{path}", compression=None, max_size=None, proxy=None
        )

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def say(self, **fields: Any) -> None:
        """Send a JSON object."""
        self.socket.send(json.dumps(fields))

    def receive(self) -> str | bytes:
        """The next message."""
        return self.socket.recv(timeout=TURN_S)

    def receive_json(self, what: str) -> dict[str, Any]:
        """The next message of a type. Audio before it is skipped."""
        while True:
            message = self.receive()
            if isinstance(message, bytes):
                continue
            fields: dict[str, Any] = json.loads(message)
            if fields["type"].lower() == "error":
                raise RuntimeError(f"the server refused a turn: {message}")
            if fields["type"] == what:
                return fields


class NativeTalker(_Socket):
    """The native protocol."""

    def __init__(self, port: int) -> None:
        super().__init__(port, "/")
        self._num_turns = 0
        self.socket.send(encode(Hello(client="bench")))
        self.receive()

    def hear(self, text: str) -> float:
        """See `Talker`."""
        self._num_turns += 1
        context = f"turn-{self._num_turns}"
        start = time.perf_counter()
        self.socket.send(encode(Speak(context, text)))
        self.socket.send(encode(End(context)))
        self._until(AudioChunk)
        seconds = time.perf_counter() - start
        self.socket.send(encode(Cancel(context)))
        self._until(Done)
        return seconds

    def _until(self, kind: type) -> None:
        while True:
            message = parse_server_message(self.receive())
            if isinstance(message, Error):
                raise RuntimeError(f"the server refused a turn: {message.message}")
            if isinstance(message, kind):
                return


class CartesiaTalker(_Socket):
    """Cartesia's WebSocket."""

    def __init__(self, port: int) -> None:
        super().__init__(port, "/tts/websocket")

    def hear(self, text: str) -> float:
        """See `Talker`."""
        start = time.perf_counter()
        self.say(context_id="turn", transcript=text, add_timestamps=True)
        self.receive_json("chunk")
        seconds = time.perf_counter() - start
        self.say(context_id="turn", cancel=True)
        self.receive_json("done")
        return seconds


class DeepgramTalker(_Socket):
    """Deepgram's WebSocket."""

    def __init__(self, port: int) -> None:
        super().__init__(port, "/v1/speak")
        self.receive_json("Metadata")

    def hear(self, text: str) -> float:
        """See `Talker`."""
        start = time.perf_counter()
        self.say(type="Speak", text=text)
        self.say(type="Flush")
        while not isinstance(self.receive(), bytes):
            pass
        seconds = time.perf_counter() - start
        self.say(type="Clear")
        self.receive_json("Cleared")
        return seconds


class ElevenLabsTalker(_Socket):
    """ElevenLabs' WebSocket with contexts."""

    def __init__(self, port: int) -> None:
        super().__init__(port, "/v1/text-to-speech/default/multi-stream-input?output_format=pcm_24000")

    def hear(self, text: str) -> float:
        """See `Talker`."""
        start = time.perf_counter()
        self.say(context_id="turn", text=text, flush=True)
        self._until("audio")
        seconds = time.perf_counter() - start
        for _ in range(2):  # the first close lets it speak what was flushed
            self.say(context_id="turn", close_context=True)
        self._until("isFinal")
        return seconds

    def _until(self, what: str) -> None:
        while not (fields := json.loads(self.receive())).get(what):
            if "error" in fields:
                raise RuntimeError(f"the server refused a turn: {fields['message']}")


class VllmOmniTalker:
    """vLLM-Omni's WebSocket. It has no cancel, so each turn has a connection, which is open before."""

    def __init__(self, port: int) -> None:
        self._port = port

    def hear(self, text: str) -> float:
        """See `Talker`."""
        socket = _Socket(self._port, "/v1/audio/speech/stream")
        try:
            socket.say(type="session.config", response_format="pcm", stream_audio=True)
            start = time.perf_counter()
            socket.say(type="input.text", text=text)
            socket.say(type="input.done")
            while not isinstance(message := socket.receive(), bytes):
                if json.loads(message)["type"] == "error":
                    raise RuntimeError(f"the server refused a turn: {message}")
            return time.perf_counter() - start
        finally:
            socket.close()

    def close(self) -> None:
        """Do nothing: no connection is open."""


class OpenAITalker:
    """OpenAI's speech API. The time includes a new connection, which a client needs after it has hung
    up."""

    def __init__(self, port: int, response_format: str) -> None:
        self._port, self._format = port, response_format

    def hear(self, text: str) -> float:
        """See `Talker`."""
        body = json.dumps({"input": text, "model": "tts-1", "response_format": self._format})
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TURN_S)
        try:
            connection.request("POST", "/v1/audio/speech", body)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"the server refused a turn: {response.read()!r}")
            response.read(_WAV_HEADER + 1 if self._format == "wav" else 1)
            return time.perf_counter() - start
        finally:
            connection.close()

    def close(self) -> None:
        """Do nothing: no connection is open."""


TALKERS: dict[str, Callable[[int], Talker]] = {
    "native": NativeTalker,
    "OpenAI, pcm": lambda port: OpenAITalker(port, "pcm"),
    "OpenAI, wav": lambda port: OpenAITalker(port, "wav"),
    "Cartesia": CartesiaTalker,
    "Deepgram": DeepgramTalker,
    "ElevenLabs": ElevenLabsTalker,
    "vLLM-Omni": VllmOmniTalker,
}


def first_audio_s(port: int, text: str, turns: int) -> dict[str, list[float]]:
    """Seconds to the first audio of `turns` turns, by the name of the dialect.

    Raises:
        RuntimeError: the server refused a turn, or did not stop one.
    """
    with ExitStack() as stack:
        talkers = {name: make(port) for name, make in TALKERS.items()}
        for talker in talkers.values():
            stack.callback(talker.close)
        found: dict[str, list[float]] = {name: [] for name in talkers}
        for _ in range(turns):
            for name, talker in talkers.items():
                found[name].append(talker.hear(text))
                _wait_until_idle(port)
    return found


def _wait_until_idle(port: int) -> None:
    deadline = time.monotonic() + TURN_S
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TURN_S)
    try:
        while time.monotonic() < deadline:
            connection.request("GET", "/ready")
            if not json.loads(connection.getresponse().read())["active"]:
                return
            time.sleep(0.002)
    finally:
        connection.close()
    raise RuntimeError("a turn did not stop after its cancel")
