"""The demo's own page: a conversation over Pipecat's WebSocket transport, which works offline.

The server also has Pipecat's prebuilt page, which loads a part of itself from another host.
"""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_megakernel.serving.web_page import FOLDER as SHARED
from qwen_megakernel.serving.web_page import HEADERS

FOLDER = Path(__file__).with_name("page")
PATH = "/talk"


def talk_page() -> ASGIApp:
    """The application to mount at `PATH`. It uses the loudspeaker and the style of the server's page."""
    return Starlette(
        routes=[
            Mount("/shared", StaticFiles(directory=SHARED)),
            Mount("/", StaticFiles(directory=FOLDER, html=True)),
        ],
        middleware=[Middleware(_WithHeaders)],
    )


class _WithHeaders:
    """Adds the headers that keep the page from loading anything from other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self._app(scope, receive, send_with_headers)
