"""The server as a process: wrong options, loading, its token, its limit of connections, signals."""

import contextlib
import json
import re
import signal

import pytest
from live_server import DEMO_TOKEN, LONG, ROOT, LiveServer, collect, first_chunk, send
from warm_process import run_warm
from websockets.exceptions import ConnectionClosed


def start_failing(*arguments, **environ):
    return run_warm(ROOT / "server.py", *arguments, environ=environ)


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--host", "0.0.0.0"], {}, "QWEN_MEGAKERNEL_TOKEN"),
        (["--port", "http"], {}, "--port"),
        ([], {"QWEN_MEGAKERNEL_PORT": "70000"}, "QWEN_MEGAKERNEL_PORT"),
        (["--speaker-ref", "/nowhere.wav"], {}, "--speaker-ref"),
        (["--speaker-ref-text", "Hi"], {}, "--speaker-ref-text"),
        (["--voices", "/nowhere"], {}, "--voices"),
        (["--backend", "tpu"], {}, "--backend"),
        (["--text-cleaning", "some"], {}, "--text-cleaning"),
        (["--drain-s", "nan"], {}, "--drain-s"),
        (["--allow-origin", "*"], {}, "--allow-origin"),
        (["--token", "short"], {}, "--token"),
        ([], {"QWEN_MEGAKERNEL_OFFLINE": "maybe"}, "QWEN_MEGAKERNEL_OFFLINE"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(arguments, environ, said):
    result = start_failing(*arguments, **environ)
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_load_failure_is_one_line(tmp_path):
    variables = {"PROT": "1", "KERNELS": str(tmp_path), "ARCH": "90a"}
    environ = {f"QWEN_MEGAKERNEL_{name}": value for name, value in variables.items()}
    server = LiveServer("--model", str(tmp_path), "--offline", environ=environ)
    try:
        assert server.wait() == 1
    finally:
        server.kill()
    assert "cannot load: CheckpointError" in server.err[-1]
    assert_no_traceback(server)
    warned = [line for line in server.err if "QWEN_MEGAKERNEL_" in line]
    assert len(warned) == 1
    assert "QWEN_MEGAKERNEL_PROT" in warned[0]


def assert_no_traceback(server):
    assert not [line for line in server.err if "Traceback" in line]


def test_port_answers_while_loading_and_a_signal_ends_it(tiny_base):
    server = LiveServer("--model", str(tiny_base), "--log-format", "json")
    try:
        assert server.get("/health")[0] == 200
        status, body = server.get("/ready")
        assert (status, json.loads(body)["phase"]) == (503, "loading")
        assert server.handshake_status() == 503
        assert server.stop() == 0
    finally:
        server.kill()
    assert all(json.loads(line)["level"] for line in server.err)
    assert server.out == []


@pytest.fixture(scope="module")
def guarded_server(tiny_base):
    environ = {"QWEN_MEGAKERNEL_TOKEN": DEMO_TOKEN, "QWEN_MEGAKERNEL_DRAIN_S": "99"}
    options = ("--drain-s", "1.5", "--max-connections", "3", "--log-format", "json")
    server = LiveServer("--model", str(tiny_base), *options, environ=environ)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def test_used_port_is_one_line_at_once(guarded_server):
    result = start_failing("--port", str(guarded_server.port))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(guarded_server.port) in result.stderr


def test_token_guards_everything_but_health(guarded_server):
    assert guarded_server.get("/health")[0] == 200
    for path in ("/ready", "/metrics", "/v1/audio/voices"):
        assert guarded_server.get(path)[0] == 401
    assert guarded_server.get("/ready", X_API_Key=DEMO_TOKEN)[0] == 200
    assert guarded_server.get("/ready", Authorization=f"Bearer {DEMO_TOKEN}")[0] == 200
    for path in ("/", f"/?token={DEMO_TOKEN}x"):
        assert guarded_server.handshake_status(path) == 401
    assert guarded_server.handshake_status(f"/?token={DEMO_TOKEN}") == 101
    assert DEMO_TOKEN not in "".join(guarded_server.err + guarded_server.out)


def test_connections_are_limited(guarded_server):
    path = f"/?token={DEMO_TOKEN}"
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(guarded_server.connect(path))
        assert guarded_server.handshake_status(path) == 503
    assert guarded_server.handshake_status(path) == 101
    page = guarded_server.get("/metrics", X_API_Key=DEMO_TOKEN)[1]
    refused = re.search(r'^qwen_megakernel_refused_total{what="connection"} (\S+)$', page, re.M)
    assert float(refused[1]) >= 1


def test_sigterm_drains(guarded_server):
    """The last test of the guarded server, which ends here."""
    path = f"/?token={DEMO_TOKEN}"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(guarded_server.connect(path)) for _ in range(3)]
        check_drain(guarded_server, path, *clients)
    assert guarded_server.wait() == 0
    assert_no_traceback(guarded_server)


def check_drain(guarded_server, path, busy, idle, queued):
    send(busy, **LONG)
    first_chunk(busy)
    send(queued, text="Short.", seed=1)
    send(queued, text="Never spoken.")
    first_chunk(queued)
    guarded_server.process.send_signal(signal.SIGTERM)
    guarded_server.wait_for_line("draining")
    status, body = guarded_server.get("/ready", X_API_Key=DEMO_TOKEN)
    assert (status, json.loads(body)["phase"]) == (503, "draining")
    assert guarded_server.handshake_status(path) == 503
    send(idle, text="Hello there.")
    assert collect(idle)[1]["code"] == "overloaded"
    replies = [collect(queued)[1] for _ in range(2)]
    assert {"code" in reply for reply in replies} == {True, False}
    assert collect(busy)[1]["finish_reason"] == "cancelled"
    for client in (busy, idle, queued):
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == 1001


def test_second_signal_ends_at_once(tiny_base):
    server = LiveServer("--model", str(tiny_base), "--drain-s", "60").wait_until_ready()
    try:
        with server.connect() as client:
            send(client, **LONG)
            first_chunk(client)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_line("draining")
            assert server.stop(limit_s=30) == 128 + signal.SIGTERM  # half of the drain's time
    finally:
        server.kill()
