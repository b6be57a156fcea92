"""Opening a connection to the server: who we are, what audio we want, and what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from qwen_megakernel import __version__
from qwen_megakernel.serving.access import is_loopback
from qwen_megakernel.serving.native_messages import (
    AudioFormat,
    Error,
    Hello,
    Ready,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.wire import ProtocolError

HANDSHAKE_S = 5.0
"""Until the server has accepted the connection and said that it is ready."""
CONNECT_OPTIONS = {
    "max_size": None,
    "compression": None,  # samples do not compress
    "ping_interval": 5,  # a peer that is gone is noticed after 5 to 10 s
    "ping_timeout": 5,
}
"""For `websockets.connect`."""


class ServerError(ConnectionError):
    """The server cannot be reached or used; one line that says why."""

    def __init__(self, message: str, status_code: int | None = None, *, final: bool = False) -> None:
        super().__init__(message)
        self.status_code = status_code
        """Of the HTTP answer; Pipecat tells from it whether to try again."""
        self.final = final
        """Trying again would give the same."""


async def open_connection(
    connect: Callable[..., Awaitable[ClientConnection]], url: str, token: str | None, sample_rate: int
) -> tuple[ClientConnection, Ready]:
    """A connection on which 16-bit samples of this rate are agreed, and what the server offers.

    Raises:
        ServerError: in every case that is not a bug.
    """
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            websocket = await connect(url, **connect_options(url, token))
            try:
                return websocket, await _greet(websocket, url, sample_rate)
            except BaseException:
                await websocket.close()
                raise
    except InvalidStatus as error:
        raise _refusal(url, error) from error
    except InvalidURI as error:
        raise ServerError(f"{url}: not an address like ws://host:port", final=True) from error
    except TimeoutError as error:
        raise ServerError(f"{url}: no answer for {HANDSHAKE_S:g} s") from error
    except (ConnectionClosed, InvalidHandshake) as error:
        raise ServerError(f"{url}: {error}") from error
    except ServerError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise ServerError(f"{url}: {reason}; is the server running, and the tunnel open?") from error


def connect_options(url: str, token: str | None) -> dict[str, Any]:
    """Arguments of `websockets.connect`: the token, and no proxy where only this machine is reached.

    Raises:
        InvalidURI: the host or the port cannot be read.
    """
    options: dict[str, Any] = dict(CONNECT_OPTIONS)
    if token:
        options["additional_headers"] = {"Authorization": f"Bearer {token}"}
    try:
        address = urlsplit(url)
        host, _ = address.hostname or "", address.port
    except ValueError as error:
        raise InvalidURI(url, str(error)) from error
    if is_loopback(host):
        options["proxy"] = None  # a proxy of the environment cannot reach our loopback
    return options


async def _greet(websocket: ClientConnection, url: str, sample_rate: int) -> Ready:
    hello = Hello(audio=AudioFormat("pcm_s16le", sample_rate), client=f"pipecat_client/{__version__}")
    await websocket.send(encode(hello))
    try:
        answer = parse_server_message(await websocket.recv())
    except ProtocolError:
        answer = None
    if isinstance(answer, Error):
        raise ServerError(f"{url}: {answer.message} ({answer.code})", final=True)
    if not isinstance(answer, Ready):
        message = f"{url}: this server does not speak protocol {hello.protocol}; is it server.py?"
        raise ServerError(message, final=True)
    if (answer.encoding, answer.sample_rate) != (hello.audio.encoding, sample_rate):
        raise ServerError(f"{url}: audio of {answer.sample_rate} Hz was not asked for", final=True)
    return answer


def _refusal(url: str, error: InvalidStatus) -> ServerError:
    """A refused handshake, with what the server said about it."""
    status = error.response.status_code
    said = " ".join((error.response.body or b"").decode(errors="replace").split())[:300]
    hint = {401: " (is the token right?)", 503: " (it will be tried again)"}.get(status, "")
    return ServerError(f"{url}: HTTP {status}{hint}: {said}", status)
