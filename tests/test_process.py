"""The server process where signals cannot be handled as on Linux, and where its tasks fail."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from live_server import LONG, ROOT, LiveServer, collect, first_chunk, send

WINDOWS_LOOP = """
import asyncio, sys, server
def add_signal_handler(self, *args):
    raise NotImplementedError
asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = add_signal_handler
sys.exit(server.main())
"""
"""A program's first lines: on Linux, an event loop behaves like that of Windows."""
IN_A_SESSION = """
import signal, sys, server
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(server.main())
"""
"""The tests themselves may run under nohup, whose child ignores SIGHUP."""
UNDER_NOHUP = """
import signal, sys, server
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(server.main())
"""
IN_A_THREAD = """
import threading, server
thread = threading.Thread(target=server.main)
thread.start()
thread.join()
"""
FAILS_ON_DEMAND = """
import pathlib, sys, server, uvicorn
flag, on_tick = pathlib.Path(sys.argv.pop()), uvicorn.Server.on_tick
async def failing(self, counter):
    if flag.exists():
        raise OSError("the network is gone")
    return await on_tick(self, counter)
uvicorn.Server.on_tick = failing
sys.exit(server.main())
"""
WITHOUT_UNIX = """
import sys
for name in ("fcntl", "pwd", "grp", "resource", "termios", "syslog"):
    sys.modules[name] = None
"""
"""More such lines: imports of modules that only Unix has fail, as on Windows."""

Start = Callable[..., LiveServer]


@pytest.fixture
def start(tiny_base) -> Iterator[Start]:
    """Starts a program as the server, and kills it at the end."""
    servers = []

    def start(program: str, *arguments: str) -> LiveServer:
        servers.append(LiveServer("--model", str(tiny_base), *arguments, program=program))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_without_signal_handlers_serves_and_drains(start: Start, number: signal.Signals):
    server = start(WINDOWS_LOOP).wait_until_ready()
    assert server.get("/health")[0] == 200
    assert server.stop(number) == 0
    assert [line for line in server.err if "drain" in line]
    assert not [line for line in server.err if "Traceback" in line]


def test_a_loop_without_signal_handlers_ends_at_once_on_the_second_signal(start: Start):
    server = start(WINDOWS_LOOP, "--drain-s", "60").wait_until_ready()
    with server.connect() as client:
        send(client, **LONG)
        first_chunk(client)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("draining")
        assert server.stop() == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_session_that_hangs_up_drains_the_server(start: Start):
    server = start(IN_A_SESSION, "--drain-s", "60").wait_until_ready()
    with server.connect() as client:
        send(client, text="Hello.", seed=1)
        first_chunk(client)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("draining")
        assert "error" not in collect(client)[1]
    assert server.wait() == 0


def test_a_server_under_nohup_goes_on_when_the_session_hangs_up(start: Start):
    server = start(UNDER_NOHUP).wait_until_ready()
    server.process.send_signal(signal.SIGHUP)
    assert server.get("/health")[0] == 200
    assert server.stop() == 0


def test_a_server_in_a_thread_serves_and_says_that_it_takes_no_signals(start: Start):
    server = start(IN_A_THREAD).wait_until_ready()
    assert server.get("/health")[0] == 200
    server.wait_for_line("WARNING .*not in the main thread")


@pytest.mark.parametrize("phase", ["loading", "ready"])
def test_a_server_whose_listening_fails_ends_with_1_and_says_why(start: Start, phase: str, tmp_path):
    flag = tmp_path / "flag"
    if phase == "loading":
        flag.touch()
    server = start(FAILS_ON_DEMAND, str(flag))
    if phase == "ready":
        server.wait_until_ready()
        flag.touch()
    assert server.wait() == 1
    assert [line for line in server.err if "ERROR" in line and "the network is gone" in line]


IMPORTED = (
    "pipecat_client.test_client", "pipecat_client.megakernel_tts", "server",
    "qwen_megakernel.tts_model", "qwen_megakernel.tools.doctor", "qwen_megakernel.tools.build",
)  # fmt: skip
BUILT_WITHOUT_UNIX = """
import importlib
for module in sys.argv[1:]:
    importlib.import_module(module)
    print("imported", module, flush=True)
from qwen_megakernel.__main__ import main
sys.exit(main(["build", "--arch", "sm_90a"]))
"""


@pytest.mark.slow
def test_without_unix_all_is_imported_and_a_build_says_what_is_supported():
    wanted = [name for name in IMPORTED if find_spec("pipecat") or not name.endswith("megakernel_tts")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX + BUILT_WITHOUT_UNIX, *wanted],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert [line[9:] for line in done.stdout.splitlines() if line.startswith("imported ")] == wanted
    assert done.returncode == 1
    assert "the kernels are built on Linux only" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
