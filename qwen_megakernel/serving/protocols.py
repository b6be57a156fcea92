"""uvicorn's HTTP and WebSocket protocols, with limits on what a peer may hold and what it may send.

A socket waits from its first byte until its request is complete, and again after the answer. A
handshake waits until it is accepted. Each wait has a deadline. When too many sockets are open, the one
that has waited longest is closed. So a peer without a token cannot hold a socket for long, and cannot
keep others out.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from qwen_megakernel.serving.observe import edge_log

SEND_TIMEOUT_S = 10.0
"""A peer that reads nothing for so many seconds is cut."""
FLUSH_S = 10.0
"""A socket that is being closed has so many seconds to flush; then it is cut."""
PING_INTERVAL_S = 3.0
PONG_TIMEOUT_S = 11.0
"""A peer that reads as slowly as it plays answers a ping after the audio before the ping: at most 10 s
in the native protocol. With the interval, a peer that has stopped reading is cut after 14 s at most."""
MESSAGE_TIMEOUT_S = 10.0
"""Seconds from the first byte of a message to its last."""
MAX_FRAGMENTS = 128
"""The most fragments of a message. Even empty ones cost time and memory."""
MAX_CONTROL_FRAMES = 64
"""The most pings and pongs that a peer may send within a second."""
READ_BYTES = 4096
"""Bytes read from a WebSocket at a time. All their frames are parsed before other sockets are served."""


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """The limits on sockets that the command line sets."""

    max_sockets: int
    """Sockets of all kinds that may be open at a time."""
    request_timeout_s: float
    """Time until a request must be complete or a handshake answered, and between two requests."""


class _Deadline:
    """The deadline of a socket that waits. `since` is when its wait began; None while it has none."""

    def __init__(self, transport: asyncio.Transport, limit_s: float, what: str) -> None:
        """`what` tells the log what the socket failed to do in time."""
        self._transport, self._limit_s, self._what = transport, limit_s, what
        self._timer: asyncio.TimerHandle | None = None
        self.since: float | None = None

    def start(self) -> None:
        """Start the clock, or start it anew."""
        self.stop()
        loop = asyncio.get_running_loop()
        self.since = loop.time()
        self._timer = loop.call_later(self._limit_s, self._cut)

    def stop(self) -> None:
        """Stop the clock: the peer was in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.since = None

    def _cut(self) -> None:
        edge_log.info(f"socket cut: {self._what} for {self._limit_s:g} s")
        self._transport.abort()


class HttpProtocol(H11Protocol):
    """HTTP/1.1. A peer has a deadline for each request, and one for reading the answer."""

    def __init__(self, *arguments: Any, limits: SocketLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock, and close another socket if there are too many."""
        super().connection_made(transport)
        self.waiting = _Deadline(transport, self._limits.request_timeout_s, "no complete request")
        self._sending = _Deadline(transport, SEND_TIMEOUT_S, "it read nothing of an answer")
        self.waiting.start()
        if len(self.connections) > self._limits.max_sockets:
            self._make_room()

    def handle_events(self) -> None:
        """Stop the clock once the request is complete."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self.waiting.stop()

    def on_response_complete(self) -> None:
        """Start the clock for the rest of the request, or for another one."""
        self.waiting.start()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the clock: the peer does not read its answer fast enough."""
        super().pause_writing()
        self._sending.start()

    def resume_writing(self) -> None:
        """Stop the clock: the peer has read."""
        super().resume_writing()
        self._sending.stop()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Stop the clocks. `SocketProtocol` has clocks of its own."""
        self.waiting.stop()
        self._sending.stop()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        self.waiting.stop()
        self._sending.stop()

    def _make_room(self) -> None:
        """Close the socket that has waited longest. It may be this one."""
        protocols = cast("set[HttpProtocol | SocketProtocol]", self.connections)
        waiting = [
            (since, protocol.transport)
            for protocol in protocols
            if (since := protocol.waiting.since) and not protocol.transport.is_closing()
        ]
        edge_log.info("%d sockets are open, the one that waited longest is cut", len(self.connections))
        min(waiting, key=lambda pair: pair[0])[1].abort()


class SocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """WebSocket. A peer has a deadline for the handshake, each message and each pong."""

    def __init__(self, *arguments: Any, limits: SocketLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._buffer = bytearray(READ_BYTES)
        self._message_timer: asyncio.TimerHandle | None = None
        self._control_second, self._num_control = 0.0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock of the handshake."""
        super().connection_made(transport)
        self.waiting = _Deadline(self.transport, self._limits.request_timeout_s, "no handshake")
        self.waiting.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        self.waiting.stop()
        self._stop_message_timer()

    # -- what the peer sends ------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> bytearray:
        """The buffer into which asyncio reads."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take the `nbytes` that were read."""
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Parse the data, and start the clock of a message that is not complete."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_complete:
            self._refuse_handshake(self.conn.handshake_exc)
        elif not (self.frames or self.conn.reader.buffer):
            self._stop_message_timer()
        elif self._message_timer is None:
            self._message_timer = self.loop.call_later(MESSAGE_TIMEOUT_S, self._message_is_late)

    def send_receive_event_to_app(self) -> None:
        """Hand on a complete message."""
        self._stop_message_timer()
        try:
            super().send_receive_event_to_app()
        except (
            InvalidState
        ):  # not UTF-8, before the handshake is answered or with a close frame behind it
            self.handle_parser_exception()

    def handle_cont(self, event: Any) -> None:
        """Count a fragment."""
        if len(self.frames) < MAX_FRAGMENTS:
            super().handle_cont(event)
        else:
            self._refuse(f"a message has more than {MAX_FRAGMENTS} fragments")

    def handle_ping(self) -> None:
        """Count a ping, and answer it with a pong."""
        self._count_control_frame()
        if not self.transport.is_closing():
            super().handle_ping()

    def handle_pong(self, event: Any) -> None:
        """Count a pong."""
        self._count_control_frame()
        super().handle_pong(event)

    def handle_parser_exception(self) -> None:
        """Close because the peer has broken the protocol."""
        if self.conn.close_sent is None:  # frames before the handshake: the peer cannot be told
            self.transport.abort()
        else:
            super().handle_parser_exception()

    # -- what it is told ----------------------------------------------------------------------

    def handle_connect(self, event: Any) -> None:
        """Hand the transport to the application."""
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"]["transport"] = {"is": self.transport}

    def start_keepalive(self) -> None:
        """Stop the clock: the handshake is accepted."""
        self.waiting.stop()
        super().start_keepalive()

    async def send(self, message: Any) -> None:
        """Send, and note that a refusal completes a handshake, too. Otherwise uvicorn logs an error."""
        await super().send(message)
        if self.close_sent:
            self.handshake_complete = True

    def keepalive_timeout(self) -> None:
        """Cut a peer that sent no pong: it would not read a close frame either."""
        if not self.close_sent:
            edge_log.info("socket cut: it answered no ping for %g s", PONG_TIMEOUT_S)
        super().keepalive_timeout()
        self.transport.abort()

    # -- limits -------------------------------------------------------------------------------

    def _refuse_handshake(self, error: Exception) -> None:
        """Answer a handshake that cannot be parsed. uvicorn alone would not answer it."""
        edge_log.info("handshake refused: %s", error)
        answer = b"".join(self.conn.data_to_send())
        self.transport.write(answer or self.conn.reject(400, f"{error}\n").serialize())
        self.handshake_complete = self.close_sent = True
        self.transport.close()

    def _count_control_frame(self) -> None:
        now = self.loop.time()
        if now - self._control_second > 1.0:
            self._control_second, self._num_control = now, 0
        self._num_control += 1
        if self._num_control > MAX_CONTROL_FRAMES:
            self._refuse(f"more than {MAX_CONTROL_FRAMES} pings within a second")

    def _message_is_late(self) -> None:
        self._message_timer = None
        if self.read_paused:  # the rest may have come: the server is not reading now
            self._message_timer = self.loop.call_later(MESSAGE_TIMEOUT_S, self._message_is_late)
        else:
            self._refuse(f"a message is not complete after {MESSAGE_TIMEOUT_S:g} s")

    def _stop_message_timer(self) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None

    def _refuse(self, reason: str) -> None:
        """Close with 1008. If the peer has already got a close frame, cut the socket at once."""
        if self.transport.is_closing():
            return
        edge_log.info(f"socket cut: {reason}")
        if self.close_sent or not self.handshake_complete:
            self.transport.abort()
        else:
            self.conn.fail(1008, reason)
            self.handle_parser_exception()
