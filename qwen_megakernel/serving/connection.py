"""One WebSocket: a task that reads, a task that writes, and a dialect between them.

The reader never waits for the writer (a cancel must be heard while audio flows), save when a
client sends nonsense faster than it reads the answers. The writer is the only one that sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from qwen_megakernel.serving.observe import log

SEND_TIMEOUT_S = 10.0
"""A client that does not read for so long is cut."""
FIRST_REQUEST_S = 10.0
"""A peer that connects and sends no request for so long is cut."""
MAX_UNSENT_REPLIES = 64
"""Replies that may wait before the reader does."""
FLUSH_S = 10.0
"""A socket that is closed in good order but cannot be flushed for so long is cut."""


class Dialect(Protocol):
    """A wire language: client messages to turns, events of turns to messages."""

    @property
    def busy(self) -> bool:
        """Whether a turn runs."""

    @property
    def unsent_bytes(self) -> int:
        """Audio that waits for the writer."""

    def receive(self, data: str | bytes) -> None:
        """Follow a message of the client; never raises for what a client can send."""

    async def write(self, item: Any, send: Callable[[str | bytes], Awaitable[None]]) -> None:
        """Put an item that was posted on the wire."""

    def discard(self, item: Any) -> None:
        """Account for a posted item that can no longer be written."""

    def cancel(self) -> None:
        """Stop all turns, as if the client had asked."""

    def drain(self) -> None:
        """Refuse what has not begun."""

    def close(self) -> None:
        """The client is gone."""


class HttpProtocol(H11Protocol):
    """uvicorn's protocol, plus an end for peers that connect and say nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST_S, self._cut_if_silent)

    def _cut_if_silent(self) -> None:
        if self.scope is None:
            self.transport.abort()


class SocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, plus an end for peers that no longer read.

    A graceful close first flushes what is buffered; a peer with a full window would hold the
    socket for as long as it likes.
    """

    def handle_connect(self, event: Any) -> None:
        """Hand the transport to the application."""
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"]["transport"] = {"is": self.transport}

    def keepalive_timeout(self) -> None:
        """No pong came."""
        super().keepalive_timeout()
        self.loop.call_later(FLUSH_S, self.transport.abort)


class _Close(int):
    """A close code in the writer's queue."""


class Connection:
    """A client's socket; `run` lives as long as it does."""

    dialect: Dialect

    def __init__(self, websocket: WebSocket, name: str) -> None:
        self.name = name
        self._websocket = websocket
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._transport: asyncio.Transport = websocket.scope["extensions"]["transport"]["is"]
        self._num_replies = 0
        self._replies_low = asyncio.Event()

    @property
    def unsent_bytes(self) -> int:
        """What this process holds for the client: waiting audio, and what the kernel has not taken."""
        return self.dialect.unsent_bytes + self._transport.get_write_buffer_size()

    def post(self, item: Any) -> None:
        """Queue an item for the writer. Replies are bounded by the reader, audio by the dialect."""
        if isinstance(item, str):
            self._num_replies += 1
        self._outbox.put_nowait(item)

    def finish(self, code: int) -> None:
        """Close the socket once all that is queued was sent."""
        self._outbox.put_nowait(_Close(code))

    async def run(self) -> None:
        """Serve the client until one side closes."""
        await self._websocket.accept()
        tasks = {asyncio.create_task(self._read()), asyncio.create_task(self._write())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.dialect.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while not self._outbox.empty():
                self.dialect.discard(self._outbox.get_nowait())
        for task in done:
            self._tell(task)
        await self._close(1011 if any(_failure(task) for task in done) else 1000)

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("text")
            self.dialect.receive(message["bytes"] if data is None else data)
            if self._num_replies > MAX_UNSENT_REPLIES:
                self._replies_low.clear()
                await self._replies_low.wait()
            # A packet may hold thousands of messages; other connections want their turn.
            await asyncio.sleep(0)

    async def _write(self) -> None:
        while True:
            item = await self._outbox.get()
            if isinstance(item, _Close):
                await self._close(item)
                return
            await self.dialect.write(item, self._send)
            if isinstance(item, str):
                self._num_replies -= 1
                if self._num_replies <= MAX_UNSENT_REPLIES // 2:
                    self._replies_low.set()

    async def _send(self, message: str | bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)

    async def _close(self, code: int) -> None:
        """Say goodbye, and see to it that the socket does end."""
        asyncio.get_running_loop().call_later(FLUSH_S, self._transport.abort)
        if self._websocket.application_state != WebSocketState.CONNECTED:
            return
        try:
            async with asyncio.timeout(0.1):
                await self._websocket.close(code)
        except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            self._transport.abort()  # its buffer is full: it would not read a goodbye either

    def _tell(self, task: asyncio.Task[None]) -> None:
        error = _failure(task)
        if error is not None:
            log.error("connection %s failed", self.name, exc_info=error)
        elif isinstance(task.exception(), TimeoutError):
            log.warning("connection %s cut: it read nothing for %g s", self.name, SEND_TIMEOUT_S)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    """What is our fault in the end of a task; a client that left or does not read is not."""
    error = task.exception()
    return None if isinstance(error, (WebSocketDisconnect, TimeoutError, OSError)) else error
