"""Open a connection to the server: name the client, agree on the audio, and explain failures."""

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
"""Seconds until the server must have accepted the connection and sent `ready`."""
CONNECT_OPTIONS = {
    "max_size": None,
    "compression": None,  # samples do not compress
    "ping_interval": 5,  # notices a lost peer after 5 to 10 s
    "ping_timeout": 5,
}
"""Options of `websockets.connect`."""


class ServerError(ConnectionError):
    """The server cannot be reached or used. One line says why."""

    def __init__(self, message: str, status_code: int | None = None, *, final: bool = False) -> None:
        super().__init__(message)
        self.status_code = status_code
        """The status of the HTTP answer, by which Pipecat decides whether to try again."""
        self.final = final
        """Whether another try would fail in the same way."""


async def open_connection(
    connect: Callable[..., Awaitable[ClientConnection]], url: str, token: str | None, sample_rate: int
) -> tuple[ClientConnection, Ready]:
    """Open a connection for 16-bit samples of a rate. Returns it and the server's `ready`.

    Raises:
        ServerError: for every failure that is not a bug.
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
    """Options of `websockets.connect`: the token, and no proxy for a server on this machine.

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
        options["proxy"] = None  # a proxy cannot reach this machine's loopback
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
    """The error for a refused handshake, with the server's reason."""
    status = error.response.status_code
    said = " ".join((error.response.body or b"").decode(errors="replace").split())[:300]
    hint = {401: " (is the token right?)", 503: " (it will be tried again)"}.get(status, "")
    return ServerError(f"{url}: HTTP {status}{hint}: {said}", status)
