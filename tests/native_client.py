"""A client of the native protocol for tests. It keeps all messages and fails on forbidden ones."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from jsonschema import Draft202012Validator
from live_server import LONG, ROOT, LiveServer, RawClient

from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    AudioFormat,
    ClientMessage,
    Done,
    End,
    Error,
    Hello,
    Ready,
    Segment,
    ServerMessage,
    Speak,
    Started,
    encode,
    parse_server_message,
)

DTYPES = {"pcm_s16le": "<i2", "pcm_f32le": "<f4"}
SENTENCES = ("Hello there.", "How are you?", "I am fine, thank you.")
LONG_TEXT = LONG["text"]
WILD = {"temperature": 10.0, "top_k": 0, "seed": 0}
"""Options for speech that only a cancel ends, with the tests' checkpoint (see `live_server.LONG`)."""


@cache
def schema() -> dict:
    return json.loads((ROOT / "docs" / "protocol.schema.json").read_text(encoding="utf-8"))


@cache
def validator(side: str) -> Draft202012Validator:
    """`client` or `server`: any message of that side."""
    return Draft202012Validator({**schema(), "$ref": f"#/$defs/{side}_message"})


def check_schema(side: str, text: str) -> None:
    """Check that the schema has the message and all its fields."""
    message = json.loads(text)
    validator(side).validate(message)
    extra = message.keys() - schema()["$defs"][message["type"]]["properties"].keys()
    assert not extra, extra


@dataclass
class Heard:
    """The messages for one context, in order."""

    messages: list[ServerMessage] = field(default_factory=list)
    samples: list[bytes] = field(default_factory=list)
    stream: int | None = None

    def of(self, cls: type) -> list:
        return [message for message in self.messages if isinstance(message, cls)]

    @property
    def done(self) -> Done | None:
        return next(iter(self.of(Done)), None)

    @property
    def audio(self) -> bytes:
        return b"".join(self.samples)


class DirectSocket:
    """A WebSocket without a thread: it reads only when asked, and loses no time."""

    def __init__(self, server: LiveServer, receive_buffer: int | None = None) -> None:
        self._raw = RawClient(server, receive_buffer)
        self._raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._buffer = b""

    def send(self, text: str) -> None:
        data = text.encode()
        head = b"\x81\xfe" + len(data).to_bytes(2, "big") + bytes(4)  # masked with zeros
        self._raw.socket.settimeout(10)
        self._raw.socket.sendall(head + data)

    def recv(self, timeout: float) -> str | bytes:
        """A whole message. After a timeout, the next call goes on with the part that has come."""
        self._raw.socket.settimeout(timeout)
        kind, length = self._need(2)[:2]
        start = {126: 4, 127: 10}.get(length, 2)
        if start > 2:
            length = int.from_bytes(self._need(start)[2:start], "big")
        data = self._need(start + length)[start : start + length]
        self._buffer = self._buffer[start + length :]
        if kind == 0x89:
            self._raw.socket.sendall(bytes([0x8A, 0x80 | length, 0, 0, 0, 0]) + data)
            return self.recv(timeout)
        assert kind in (0x81, 0x82), kind
        return data.decode() if kind == 0x81 else data

    def _need(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self._raw.socket.recv(65_536)
            assert data, "the server hung up"
            self._buffer += data
        return self._buffer

    def close(self) -> None:
        self._raw.hang_up()


class NativeClient:
    """One connection. Every message is checked by the schema and by the rules of the protocol."""

    def __init__(
        self,
        server: LiveServer,
        encoding: str = "pcm_s16le",
        rate: int = 24_000,
        socket: DirectSocket | None = None,
        checked: bool = True,
    ) -> None:
        """`checked`: validate each message by the schema, which takes one or two milliseconds."""
        self._checked = checked
        self.socket = socket or server.connect().__enter__()
        self.heard: dict[str, Heard] = {}
        self.errors: list[Error] = []
        """Messages that belong to no context."""
        self.order: list[str] = []
        """Contexts in the order of their first audio."""
        self._streams: dict[int, str] = {}
        self.format = AudioFormat(encoding, rate)
        self.send(Hello(audio=self.format, client="tests/1"))
        self.ready = self.receive()
        assert isinstance(self.ready, Ready)

    def __enter__(self) -> NativeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: ClientMessage) -> None:
        text = encode(message)
        if self._checked:
            check_schema("client", text)
        self.socket.send(text)

    def speak(self, context_id: str, text: str, **options) -> None:
        self.send(Speak(context_id, text, **options))

    def receive(self, limit_s: float = 240.0) -> ServerMessage:
        """The next message, checked and kept."""
        data = self.socket.recv(timeout=limit_s)
        if isinstance(data, str) and self._checked:
            check_schema("server", data)
        message = parse_server_message(data)
        self._keep(message)
        return message

    def wait_for(self, cls: type, context_id: str, limit_s: float = 240.0) -> ServerMessage:
        """The next message of a kind for a context."""
        deadline = time.monotonic() + limit_s
        while True:
            message = self.receive(max(0.01, deadline - time.monotonic()))
            if isinstance(message, cls) and self.context_of(message) == context_id:
                return message

    def hear(self, context_id: str, limit_s: float = 240.0) -> Heard:
        """Receive until a context's `done`."""
        deadline = time.monotonic() + limit_s
        while self.heard.get(context_id) is None or self.heard[context_id].done is None:
            self.receive(max(0.01, deadline - time.monotonic()))
        return self.heard[context_id]

    def array(self, heard: Heard) -> np.ndarray:
        return np.frombuffer(heard.audio, DTYPES[self.format.encoding])

    def context_of(self, message: ServerMessage) -> str | None:
        if isinstance(message, AudioChunk):
            return self._streams[message.stream]
        return getattr(message, "context_id", None)

    def _keep(self, message: ServerMessage) -> None:
        if isinstance(message, Started):
            assert message.stream not in self._streams
            self._streams[message.stream] = message.context_id
            self.order.append(message.context_id)
        context_id = self.context_of(message)
        if context_id is None:
            if isinstance(message, Error):
                self.errors.append(message)
            return
        heard = self.heard.setdefault(context_id, Heard())
        if not isinstance(message, Error):  # an error may answer a late message of the client
            assert heard.done is None, f"{type(message).__name__} after done"
        if isinstance(message, AudioChunk):
            self._keep_audio(heard, message)
        elif isinstance(message, Done):
            self._check_done(heard, message)
        heard.messages.append(message)

    def _keep_audio(self, heard: Heard, chunk: AudioChunk) -> None:
        assert chunk.sequence == len(heard.samples)
        assert chunk.samples
        if self.format.encoding != "opus":
            assert len(chunk.samples) % self.format.sample_bytes == 0
        assert not [other for other in self.order[: self.order.index(self.context_of(chunk))]
                    if self.heard[other].done is None], "two contexts speak at a time"  # fmt: skip
        heard.samples.append(chunk.samples)

    def _check_done(self, heard: Heard, done: Done) -> None:
        rate = self.format.sample_rate
        if self.format.encoding != "opus":
            assert done.samples == len(heard.audio) // self.format.sample_bytes
        assert abs(done.duration_s - done.samples / rate) < 1e-3
        assert (done.ttfc_ms is None) == (done.rtf is None) == (done.samples == 0)
        segments = heard.of(Segment)
        assert [segment.index for segment in segments] == list(range(len(segments)))
        ends = [0.0, *(segment.start_s + segment.duration_s for segment in segments)]
        for segment, end in zip(segments, ends, strict=False):
            assert abs(segment.start_s - end) < 2e-4
        if done.finish_reason not in ("cancelled", "error"):
            assert abs(ends[-1] - done.duration_s) < 1e-3
            reasons = [s.finish_reason for s in segments if s.finish_reason != "stop"]
            assert done.finish_reason == (reasons[0] if reasons else "stop")
        else:
            assert ends[-1] <= done.duration_s + 1e-3


def take(server, text, encoding="pcm_f32le", rate=24_000, **options):
    """Speak one context on a connection of its own."""
    with NativeClient(server, encoding, rate) as client:
        client.speak("a", text, **options)
        client.send(End("a"))
        return client.array(client.hear("a"))


def figure(server, name):
    lines = server.get("/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"qwen_megakernel_{name} "))


def wait_for_figure(server, name, condition, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition(figure(server, name)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_healthy(server):
    assert server.get("/health")[0] == 200
    assert not [line for line in server.err if "Traceback" in line]
