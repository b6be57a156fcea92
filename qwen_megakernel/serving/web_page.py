"""The page at `/`, for people with a browser. Its files in `page/` load nothing from other hosts.

The page needs no token, because it holds no secrets. It asks its user for the token and sends it with
its own requests.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).with_name("page")
NOT_A_BROWSER = (
    'This is a WebSocket endpoint: connect with ws:// and send {"text": "..."}. '
    "A browser gets a page here.\n"
)
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


def routes() -> list[BaseRoute]:
    """The routes of the page and of its files. Browsers ask again with an ETag, so nothing is stale."""
    files = StaticFiles(directory=FOLDER)

    async def send(name: str, request: Request) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(HEADERS)
        return response

    async def front(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            # A page does not help a WebSocket client whose proxy has removed the upgrade.
            headers = {"Upgrade": "websocket", "Vary": "Accept"}
            return Response(NOT_A_BROWSER, 426, headers, "text/plain")
        return await send("index.html", request)

    async def file(request: Request) -> Response:
        return await send(request.path_params["name"], request)

    return [
        Route("/", front, include_in_schema=False),
        Route("/page/{name}", file, include_in_schema=False),
    ]
