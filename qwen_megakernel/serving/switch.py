"""The WebSocket at `/` speaks two protocols: a client's first message decides which."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.connection import Connection, Dialect, Work
from qwen_megakernel.serving.events import ContextEvent, SessionFailed
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.simple import SimpleDialect
from qwen_megakernel.serving.wire import ProtocolError, parse_object


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The route."""

    async def speak(websocket: WebSocket) -> None:
        with sessions.admit(client_address(websocket.client)) as session:
            await Connection(websocket, session, DialectSwitch(session)).run()

    return [WebSocketRoute("/", speak)]


class DialectSwitch:
    """Becomes the native dialect if the first message is an object with a `type`, or the simple one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._chosen: Dialect | None = None

    def receive(self, data: str | bytes) -> None:
        """Choose the dialect at the first message, and hand the message on."""
        if self._chosen is None:
            self._chosen = (NativeDialect if _is_native(data) else SimpleDialect)(self._session)
        self._chosen.receive(data)

    def translate(self, event: ContextEvent | SessionFailed) -> Sequence[str | bytes | Work]:
        """Hand the event on. No context exists before the choice."""
        return self._chosen.translate(event) if self._chosen is not None else []


def _is_native(data: str | bytes) -> bool:
    try:
        return "type" in parse_object(data)
    except ProtocolError:
        return False
