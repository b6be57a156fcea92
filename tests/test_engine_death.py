"""The engine dies during live turns: clients are told, the process ends, a supervisor restarts it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import LONG, LiveServer, RawClient, collect, first_chunk, send
from native_client import LONG_TEXT, WILD, NativeClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from qwen_megakernel.engine.engine import Engine
from qwen_megakernel.serving.app import App, ServerSettings
from qwen_megakernel.serving.native_messages import AudioChunk
from qwen_megakernel.turn import Turn

MORTAL = """
import os, pathlib, sys, server
from qwen_megakernel.tools import serve
load, fault = serve.load_decoder, pathlib.Path(os.environ["FAULT"])
def load_mortal(*arguments):
    decoder = load(*arguments)
    engine = decoder._engine
    launch = engine._launch
    def failing(batch):
        if fault.exists():
            raise RuntimeError("an illegal memory access was encountered")
        return launch(batch)
    engine._launch = failing
    return decoder
serve.load_decoder = load_mortal
sys.exit(server.main())
"""
"""A program: the server, with a device that is lost as soon as a file exists."""
SUPERVISOR = f"""
import signal, subprocess, sys
code = 1
while code:  # as Restart=on-failure
    child = subprocess.Popen([sys.executable, "-c", {MORTAL!r}, *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    print("ended with", code, file=sys.stderr, flush=True)
"""


@pytest.fixture
def fault(tmp_path) -> Path:
    return tmp_path / "fault"


def start(checkpoint: Path, program: str, fault: Path, *options: str) -> LiveServer:
    return LiveServer(
        "--model", str(checkpoint), *options, program=program, environ={"FAULT": str(fault)}
    ).wait_until_ready()


@pytest.fixture
def mortal(tiny_base, fault) -> Iterator[LiveServer]:
    server = start(tiny_base, MORTAL, fault)
    yield server
    server.kill()


def closing(client: ClientConnection) -> tuple[list[dict], int]:
    """The messages that come until the server closes, and the code."""
    messages = []
    while True:
        try:
            message = client.recv(timeout=240)
        except ConnectionClosed as closed:
            return messages, closed.rcvd.code
        if isinstance(message, str):
            messages.append(json.loads(message))


def test_all_clients_are_told_and_the_process_ends_with_an_error(mortal, fault):
    clients = [mortal.connect().__enter__() for _ in range(3)]
    speaking, idle, silent = clients
    send(speaking, **LONG)
    first_chunk(speaking)
    send(idle, cancel=True)
    assert collect(idle)[1]["done"]
    with NativeClient(mortal) as native, concurrent.futures.ThreadPoolExecutor(4) as pool:
        native.speak("a", LONG_TEXT, **WILD)
        native.wait_for(AudioChunk, "a")
        native.speak("b", "Hello.")
        fault.touch()
        ends = list(pool.map(closing, [speaking, idle, silent, native.socket]))
    assert mortal.wait(240) == 1
    assert [code for _, code in ends] == [1011] * 4
    (turn, *rest), told, nothing, of_native = (messages for messages, _ in ends)
    assert "failed" in turn["error"]
    for message in (*rest, *told, of_native[-1]):
        assert message["code"] == "internal"
    assert (len(told), nothing, of_native[-1]["context_id"]) == (1, [], None)
    failed = [(m["context_id"], m["type"]) for m in of_native if m["type"] in ("error", "done")]
    assert failed == [("a", "error"), ("a", "done"), ("b", "error"), ("b", "done"), (None, "error")]


def test_a_client_that_does_not_read_delays_nothing(mortal, fault):
    stalled = RawClient(mortal, receive_buffer=4096)
    stalled.send(**LONG)
    stalled.wait_for_audio()
    time.sleep(1)
    fault.touch()
    assert mortal.wait(240) == 1
    assert not [line for line in mortal.err if "cut: it" in line], "the reader was waited for"


def test_an_engine_that_dies_while_the_server_drains_is_an_error_too(mortal, fault):
    with mortal.connect() as client:
        send(client, **LONG)
        first_chunk(client)
        mortal.process.send_signal(signal.SIGTERM)
        mortal.wait_for_line("draining")
        fault.touch()
        assert mortal.wait(240) == 1


@pytest.mark.slow
def test_a_supervisor_that_restarts_on_failure_has_a_server_again(brief_base, recording, fault):
    server = start(brief_base, SUPERVISOR, fault, "--speaker-ref", str(recording))
    try:
        with server.connect() as client:
            fault.touch()
            send(client, text="Hello there.")
            assert "error" in collect(client)[1]
        num_lines = len(server.err)
        server.wait_for_line("ended with 1")
        fault.unlink()
        server.port = int(server.wait_for_line(r"listening on \S+ port (\d+)", after=num_lines)[1])
        server.wait_for_line(r"INFO\s+ready", 120, after=num_lines)
        with server.connect() as client:
            send(client, text="Hello there.", seed=1)
            assert collect(client)[1]["samples"] > 0
        assert server.stop() == 0
        assert "ended with 0" in server.err[-1]
    finally:
        server.kill()


def test_a_sink_that_raises_keeps_no_other_turn_from_being_told():
    told = []

    def broken(event):
        raise RuntimeError("nobody listens")

    turns = [Turn(lambda: None, None) for _ in range(2)]
    dead = object.__new__(Engine)  # no thread
    dead._opened = [(turns[0], None, broken), (turns[1], None, told.append)]
    dead._waiting, dead._speaking = [], []
    dead._fail_all()
    assert [event.reason for event in told] == ["error"]
    assert all(turn.finished for turn in turns)


def test_dead_engine_is_unhealthy_and_takes_no_turns():
    """A state that a test cannot bring about in a real engine."""
    app = App(ServerSettings())
    dead = {
        "error": RuntimeError("frame 3 hung"),
        "description": {},
        "voices": {},
        "num_active": 0,
        "num_waiting": 0,
        "num_slots": 4,
        "standby": SimpleNamespace(memory="loaded"),
    }
    app.start_serving(SimpleNamespace(**dead))

    async def status(path, kind="http"):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "method": "GET", "path": path, "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"host", b"localhost")], "extensions": {"websocket.http.response": {}}}
        await app.asgi(scope, None, send)
        return sent[0]["status"], sent[1]["body"]

    assert asyncio.run(status("/health"))[0] == 503
    code, body = asyncio.run(status("/ready"))
    assert code == 503
    assert b'"phase":"failed","detail":"RuntimeError: frame 3 hung"' in body
    assert asyncio.run(status("/", "websocket"))[0] == 503
