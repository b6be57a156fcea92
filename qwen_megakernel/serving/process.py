"""The server process: its socket, its signals, the loading of the model, its exit code.

The port answers before the model is loaded. So the operator notices a port in use at once, and a
supervisor can watch the phases.
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
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from qwen_megakernel.serving.app import FEWEST_CONNECTIONS, App, Phase, ServerSettings
from qwen_megakernel.serving.observe import log
from qwen_megakernel.serving.protocols import (
    PING_INTERVAL_S,
    PONG_TIMEOUT_S,
    HttpProtocol,
    SocketLimits,
    SocketProtocol,
)

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

Report = Callable[[Phase, str], None]
"""The loader calls this from its thread with the phase that begins, and a detail."""
T = TypeVar("T")

SEND_BUFFER_BYTES = 65_536
"""Send buffer of each socket. With the kernel's default, a client that stops reading is noticed 80 s
late."""
BACKLOG = 64
"""Connections that the kernel holds before the server accepts them. asyncio accepts as many at once."""
FAILURE_POLL_S = 0.1
"""Seconds between two checks whether the engine lives. Its thread knows no event loop, so it cannot
tell."""
MOST_FOLLOWING = 512
"""Sockets for connections if their number follows from the slots, which are not known yet."""
OTHER_FILES = 64
"""Descriptors for anything but sockets: weights, the GPU, the event loop."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process with the signal's code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError` if the address cannot be used."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # `localhost` may be ::1 first, but tunnels and the banner say 127.0.0.1.
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    # asyncio sets TCP_NODELAY only if the protocol is given here. Without it, Nagle's algorithm holds
    # a small message, such as the answer to a cancel, for the 40 ms of a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit the size.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
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
    """Serve until SIGTERM, SIGINT or SIGHUP, or until the engine dies. Returns the exit code.

    Args:
        settings: as validated by the command line.
        listener: from `bind`.
        load: makes the decoder, in a thread of its own. The log has one line for what it raises.
        announce: called once the server takes turns.
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
        # Nothing can interrupt the thread that loads, and there is nothing to save.
        _exit_now(0)
    if (error := loading.exception()) is not None:
        app.report("failed")
        _tell_load_failure(error)
        return await _shut_down(server, serving, 1)
    decoder = loading.result()
    app.start_serving(decoder)
    announce(decoder)
    failed = asyncio.create_task(_until_failed(decoder))
    await asyncio.wait({stop, serving, failed}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        _tell_serving_ended(serving)
        code = 1
    else:
        await (app.drain() if stop.done() else app.fail())
        code = await _shut_down(server, serving, 0)
    if decoder.error is not None:
        # Freeing the memory of a lost device may hang, and the supervisor would wait.
        _exit_now(1)
    decoder.close()
    return code


async def _until_failed(decoder: TTSDecoder) -> None:
    while decoder.error is None:
        await asyncio.sleep(FAILURE_POLL_S)


def _uvicorn_config(app: App) -> uvicorn.Config:
    limits = SocketLimits(_max_sockets(app.settings), app.settings.request_timeout_s)
    return uvicorn.Config(
        app.asgi,
        http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type]
        ws=partial(SocketProtocol, limits=limits),  # type: ignore[arg-type]
        backlog=BACKLOG,
        ws_max_size=app.settings.max_message_bytes,
        ws_per_message_deflate=False,
        proxy_headers=bool(app.settings.trusted_proxies),
        forwarded_allow_ips=list(app.settings.trusted_proxies),
        ws_ping_interval=PING_INTERVAL_S,
        ws_ping_timeout=PONG_TIMEOUT_S,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )


def _max_sockets(settings: ServerSettings) -> int:
    """The sockets that may be open at a time: as many as asked for, if there are enough descriptors."""
    # A socket closes a few rounds of the event loop later. Each round may accept `BACKLOG` more.
    room = _max_descriptors() - OTHER_FILES - 4 * BACKLOG
    # If the number follows from the slots, it is not known before the model is loaded.
    most = settings.max_connections or MOST_FOLLOWING
    wanted = (settings.max_connections or FEWEST_CONNECTIONS) + settings.spare_sockets
    if room < wanted:
        log.warning(
            "the process may have %d files open, so only %d sockets are taken instead of %d; "
            "`ulimit -n` raises that",
            _max_descriptors(),
            max(room, 1),
            wanted,
        )
    return max(min(most + settings.spare_sockets, room), 1)


def _max_descriptors() -> int:
    try:
        import resource
    except ImportError:  # Windows, where sockets are not files
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


async def _shut_down(server: _Server, serving: asyncio.Task[None], code: int) -> int:
    server.should_exit = True
    await serving
    return code


def _stop_signal() -> asyncio.Future[None]:
    """A future that is done at the first signal. The second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[None] = loop.create_future()

    def on_signal(number: int) -> None:
        if received.done():
            _exit_now(128 + number)
        received.set_result(None)

    if threading.current_thread() is not threading.main_thread():
        log.warning("not in the main thread: signals do not drain this server")
        return received
    for number in _stop_signals():
        try:
            loop.add_signal_handler(number, on_signal, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(on_signal, number))
    return received


def _stop_signals() -> list[signal.Signals]:
    numbers = [signal.SIGTERM, signal.SIGINT]
    # `nohup` ignores SIGHUP, and Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell_serving_ended(serving: asyncio.Task[None]) -> None:
    error = serving.exception()
    reason = f"{type(error).__name__}: {error}" if error else "nobody stopped it"
    log.error("the server ended by itself: %s", reason, exc_info=error)


def _tell_load_failure(error: BaseException) -> None:
    # An error that a user can cause gets one line. Any other is a bug and needs its traceback.
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
