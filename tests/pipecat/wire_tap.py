"""A recording proxy between the service and a real server. It can cut the connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Request, Response, Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    ClientMessage,
    Done,
    End,
    Error,
    Flush,
    Segment,
    ServerMessage,
    Speak,
    Started,
    encode,
    parse_client_message,
    parse_server_message,
)


@dataclass
class Line:
    """One connection: the messages of each side, and their times."""

    said: list[tuple[float, ClientMessage]] = field(default_factory=list)
    heard: list[tuple[float, ServerMessage]] = field(default_factory=list)

    def sent(self, kind: type) -> list[ClientMessage]:
        return [message for _, message in self.said if isinstance(message, kind)]

    def received(self, kind: type) -> list[ServerMessage]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    def texts(self) -> list[str]:
        return [message.text for message in self.sent(Speak)]

    def outline(self) -> str:
        """`s` speak, `f` flush, `e` end, `c` cancel, in the order in which they were sent."""
        letters = {Speak: "s", Flush: "f", End: "e", Cancel: "c"}
        return "".join(letters.get(type(message), "") for _, message in self.said)

    def pcm(self) -> bytes:
        """All audio. Raises if it is not continuous, or goes on after the end of its context."""
        streams: dict[int, str] = {}
        counts: dict[int, int] = {}
        samples: dict[str, int] = {}
        over: set[str] = set()
        audio = b""
        for _, message in self.heard:
            if isinstance(message, Started):
                assert message.stream not in streams
                streams[message.stream] = message.context_id
            elif isinstance(message, AudioChunk):
                context_id = streams[message.stream]
                assert context_id not in over, "audio after done"
                assert message.sequence == counts.get(message.stream, 0), "a message is missing"
                counts[message.stream] = message.sequence + 1
                samples[context_id] = samples.get(context_id, 0) + len(message.samples) // 2
                audio += message.samples
            elif isinstance(message, Done):
                assert message.context_id not in over
                over.add(message.context_id)
                assert message.samples == samples.get(message.context_id, 0)
        return audio


class WireTap:
    """`async with WireTap(port) as tap: MegakernelTTSService(url=tap.url)`."""

    def __init__(self, server_port: int, headers: dict[str, str] | None = None) -> None:
        """`headers`: for the handshake with the server."""
        self.server_port, self._headers = server_port, headers
        self.lines: list[Line] = []
        self.cut_when: Callable[[Line], bool] | None = None
        """Called after each message of the server: whether to cut the line before passing it on."""
        self.num_more_cuts = 0
        """The number of further connections to drop in the same way."""
        self.delay_s = 0.0
        """Delay before each message of the server."""
        self.mute = False
        """Whether audio is kept from the client."""
        self.num_refused = 0
        self.busy: list[float | None] = []
        """`retry_after_s` for each of the next `speak` messages, which the tap refuses itself."""
        self._server: Server | None = None
        self._upstream: dict[Request, ClientConnection] = {}

    async def __aenter__(self) -> WireTap:
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            0,
            process_request=self._dial,
            max_size=None,
            compression=None,
            ping_interval=None,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def line(self) -> Line:
        """The only connection there was."""
        (line,) = self.lines
        return line

    async def _dial(self, client: ServerConnection, request: Request) -> Response | None:
        try:
            upstream = await connect(
                f"ws://127.0.0.1:{self.server_port}",
                max_size=None,
                compression=None,
                additional_headers=self._headers,
            )
        except Exception:
            self.num_refused += 1
            return client.respond(HTTPStatus.SERVICE_UNAVAILABLE, "the server is down\n")
        client.upstream = upstream
        return None

    async def _serve(self, client: ServerConnection) -> None:
        line = Line()
        self.lines.append(line)
        tasks = {
            asyncio.create_task(self._up(client, line)),
            asyncio.create_task(self._down(client, line)),
        }
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, ConnectionClosed):
                raise result
        await client.upstream.close()
        await client.close()

    async def _up(self, client: ServerConnection, line: Line) -> None:
        async for data in client:
            message = parse_client_message(data)
            line.said.append((time.time(), message))
            if self.busy and isinstance(message, Speak):
                refusal = Error(message.context_id, "overloaded", "no room", self.busy.pop(0))
                line.heard.append((time.time(), refusal))
                await client.send(encode(refusal))
                continue
            await client.upstream.send(data)

    async def _down(self, client: ServerConnection, line: Line) -> None:
        async for data in client.upstream:
            await asyncio.sleep(self.delay_s)
            message = parse_server_message(data)
            if self.cut_when is not None and self.cut_when(line):
                if self.num_more_cuts:
                    self.num_more_cuts -= 1
                else:
                    self.cut_when = None
                client.transport.abort()
                return
            if self.mute and isinstance(message, AudioChunk):
                continue
            line.heard.append((time.time(), message))
            await client.send(data)


def num_segments(line: Line) -> int:
    return len(line.received(Segment))


def num_chunks(line: Line) -> int:
    return len(line.received(AudioChunk))
