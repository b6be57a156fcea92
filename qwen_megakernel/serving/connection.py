"""One WebSocket that carries a session: a task that reads, a task that writes, a dialect between them.

The reader does not wait for the writer, because a cancel must get through while audio flows. It waits
only for a client that sends messages too fast, or that does not read the answers. Only the writer
sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from qwen_megakernel.serving.events import ContextEvent, Reply, SessionFailed, SessionOver
from qwen_megakernel.serving.observe import log
from qwen_megakernel.serving.protocols import FLUSH_S, SEND_TIMEOUT_S
from qwen_megakernel.serving.session import Session

CLOSE_CODES = {
    "closed": 1000,
    "going_away": 1001,
    "idle": 1001,
    "protocol_error": 1002,
    "refused": 1008,
    "server_failed": 1011,
}
"""WebSocket close codes, by the reason why a session is over."""


Work = Callable[[], Sequence[str | bytes]]
"""Makes messages by compression, which takes too long for the event loop's thread."""


class Dialect(Protocol):
    """A wire language: turns a client's messages into calls of a session, and events into messages."""

    def receive(self, data: str | bytes) -> None:
        """Act on a message of the client. It raises nothing, whatever the client sends."""

    def translate(self, event: ContextEvent | SessionFailed) -> Sequence[str | bytes | Work]:
        """The messages to send for an event. Events come in the session's order."""


class Transport(Protocol):
    """The methods of a socket that a connection uses. An `asyncio.Transport` has them."""

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken."""

    def is_closing(self) -> bool:
        """Whether nothing more is sent or read."""

    def abort(self) -> None:
        """Close without sending what is left."""


class UnseenTransport:
    """Stands for the socket of a server that hands none over: all but `SocketProtocol`. Such a server
    cuts clients that do not read by its own limits."""

    def get_write_buffer_size(self) -> int:
        """Unknown. `send` waits while it is too much."""
        return 0

    def is_closing(self) -> bool:
        """Unknown. The next message is a disconnect."""
        return False

    def abort(self) -> None:
        """The server closes the socket once the application has returned."""


class Connection:
    """A client's socket; `run` lives as long as it does."""

    def __init__(self, websocket: WebSocket, session: Session, dialect: Dialect) -> None:
        self._websocket, self._session, self._dialect = websocket, session, dialect
        extensions = websocket.scope.get("extensions") or {}
        self._transport: Transport = extensions.get("transport", {}).get("is", UnseenTransport())
        session.bytes_in_carrier = self._transport.get_write_buffer_size

    async def run(self) -> None:
        """Serve the client until one side closes."""
        # A page that sends its token as a protocol (see `access`) expects the scheme in the answer.
        if (offered := self._websocket.scope.get("subprotocols")) and offered[0] in ("token", "bearer"):
            await self._websocket.accept(offered[0])
        else:
            await self._websocket.accept()
        tasks = {asyncio.create_task(self._read()), asyncio.create_task(self._write())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._session.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            self._tell(task)
        await self._close(1011 if any(_failure(task) for task in done) else 1000)

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("text")
            self._dialect.receive(message["bytes"] if data is None else data)
            await self._session.keep_pace()
            if self._transport.is_closing():
                return  # the client has left: its remaining messages are not read
            # A packet may hold thousands of messages. Let other connections run in between.
            await asyncio.sleep(0)

    async def _write(self) -> None:
        while True:
            messages: list[str | bytes | Work] = []
            for event in await self._session.take():
                if isinstance(event, SessionOver):
                    await self._close(CLOSE_CODES[event.reason])
                    return
                if isinstance(event, Reply):
                    messages.append(event.message)
                else:
                    messages += self._dialect.translate(event)
            for message in messages:
                if callable(message):
                    for made in await asyncio.to_thread(message):
                        await self._send(made)
                else:
                    await self._send(message)

    async def _send(self, message: str | bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)

    async def _close(self, code: int) -> None:
        """Send a close frame, and make sure that the socket ends."""
        asyncio.get_running_loop().call_later(FLUSH_S, self._transport.abort)
        if self._websocket.application_state != WebSocketState.CONNECTED:
            return
        try:
            async with asyncio.timeout(0.1):
                await self._websocket.close(code)
        except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            self._transport.abort()  # its buffer is full: the peer would not read a close frame either

    def _tell(self, task: asyncio.Task[None]) -> None:
        error, name = _failure(task), self._session.name
        if error is not None:
            log.error("connection %s failed", name, exc_info=error)
        elif isinstance(task.exception(), TimeoutError):
            log.warning(
                "connection %s cut: it read nothing for %g s", self._session.name, SEND_TIMEOUT_S
            )


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    """The task's error if it is a fault of the server. A client that leaves or does not read is no
    fault of the server."""
    error = task.exception()
    return None if isinstance(error, (WebSocketDisconnect, TimeoutError, OSError)) else error
