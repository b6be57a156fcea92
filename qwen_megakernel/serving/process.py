"""The server process: its socket, its signals, the loading of the model, its exit code.

The port answers before the model is loaded, so that a used one is known at once and a supervisor
can watch the phases.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from qwen_megakernel.serving.app import App, Phase, ServerSettings
from qwen_megakernel.serving.connection import HttpProtocol, SocketProtocol
from qwen_megakernel.serving.observe import log

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

Report = Callable[[Phase, str], None]
"""Called by the loader, from its thread, with what it begins to do."""
T = TypeVar("T")

SEND_BUFFER_BYTES = 65_536
"""Of each socket. With the kernel's default a client that stopped reading is noticed 80 s late."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process with the signal's code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; `OSError` if there is none to be had."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # `localhost` may be ::1 first, but tunnels and the banner say 127.0.0.1.
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    # asyncio sets TCP_NODELAY only where the protocol is spelt out. Without it Nagle's algorithm
    # holds a small message, such as the answer to a cancel, for the 40 ms of a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit the size.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def run(
    settings: ServerSettings,
    listener: socket.socket,
    load: Callable[[Report], TTSDecoder],
    announce: Callable[[TTSDecoder], None],
) -> int:
    """Serve until SIGTERM or SIGINT; the exit code.

    Args:
        settings: as validated by the command line.
        listener: from `bind`.
        load: makes the decoder, in a thread of its own; what it raises is told in one line.
        announce: called once turns are taken.
    """
    return asyncio.run(_run(App(settings), listener, load, announce))


async def _run(
    app: App,
    listener: socket.socket,
    load: Callable[[Report], TTSDecoder],
    announce: Callable[[TTSDecoder], None],
) -> int:
    server = _Server(_uvicorn_config(app))
    stop = _stop_signal()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = _in_daemon_thread(lambda: load(app.report))
    awaited: set[asyncio.Future[Any]] = {loading, stop, serving}
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        _tell_serving_ended(serving)
        return 1
    if not loading.done():
        # Nothing can interrupt a thread that loads; there is nothing to save either.
        _exit_now(0)
    if (error := loading.exception()) is not None:
        app.report("failed")
        _tell_load_failure(error)
        return await _shut_down(server, serving, 1)
    decoder = loading.result()
    app.start_serving(decoder)
    announce(decoder)
    await asyncio.wait({stop, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        _tell_serving_ended(serving)
        code = 1
    else:
        await app.drain()
        code = await _shut_down(server, serving, 0)
    decoder.close()
    return code


def _uvicorn_config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app.asgi,
        http=HttpProtocol,
        ws=SocketProtocol,
        ws_max_size=app.settings.max_message_bytes,
        ws_per_message_deflate=False,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )


async def _shut_down(server: _Server, serving: asyncio.Task[None], code: int) -> int:
    server.should_exit = True
    await serving
    return code


def _stop_signal() -> asyncio.Future[None]:
    """Done at the first signal; the second ends the process wherever it is."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if received.done():
            _exit_now(128 + number)
        received.set_result(None)

    if threading.current_thread() is not threading.main_thread():
        log.warning("not in the main thread: SIGTERM and SIGINT do not drain this server")
        return received
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, on_signal, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(on_signal, number))
    return received


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell_serving_ended(serving: asyncio.Task[None]) -> None:
    error = serving.exception()
    reason = f"{type(error).__name__}: {error}" if error else "nobody stopped it"
    log.error("the server ended by itself: %s", reason, exc_info=error)


def _tell_load_failure(error: BaseException) -> None:
    # What a user can cause is told in a line; anything else is our bug and needs its traceback.
    expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    message = " ".join(str(error).split()) or "no message"
    log.error("cannot load: %s: %s", type(error).__name__, message, exc_info=None if expected else error)


def _in_daemon_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    # Not asyncio.to_thread: the interpreter waits for executor threads at exit.
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            value = function()
        except BaseException as error:
            _settle(loop, future.set_exception, error)
        else:
            _settle(loop, future.set_result, value)

    threading.Thread(target=work, name="load", daemon=True).start()
    return future


def _settle(loop: asyncio.AbstractEventLoop, setter: Callable[[Any], None], value: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(setter, value)
