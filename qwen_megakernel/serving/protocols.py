"""uvicorn's protocols of HTTP and WebSocket, with an end for peers that hold a socket and do nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

FIRST_REQUEST_S = 10.0
"""A peer that connects and sends no request for so long is cut."""
FLUSH_S = 10.0
"""A socket that is closed in good order but cannot be flushed for so long is cut."""


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
