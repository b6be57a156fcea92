"""The edge of the server: peers without a token that hold sockets, and frames without end."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Iterator

import pytest
from live_server import LONG, LiveServer, RawClient, collect, first_chunk, send

TIMEOUT_S = 1.0
IMPATIENT = f"""
import sys
from qwen_megakernel.serving import protocols
protocols.MESSAGE_TIMEOUT_S = {TIMEOUT_S}
protocols.SEND_TIMEOUT_S = {4 * TIMEOUT_S}
import server
sys.exit(server.main())
"""
"""The server with short deadlines where no option sets them."""
MAX_CONNECTIONS = 4
SPARE_SOCKETS = 16
FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (384, 384))
import server
sys.exit(server.main())
"""
UPGRADE = (
    "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
)
GET = "GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def edge_server(brief_base, recording) -> Iterator[LiveServer]:
    options = ("--request-timeout-s", str(TIMEOUT_S), "--max-connections", str(MAX_CONNECTIONS))
    options += ("--spare-sockets", str(SPARE_SOCKETS), "--speaker-ref", str(recording))
    server = LiveServer("--model", str(brief_base), *options, program=IMPATIENT)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def connect(server: LiveServer, text: str = "") -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    peer.sendall(text.encode())
    return peer


def read_to_end(peer: socket.socket) -> bytes:
    """All bytes until the server closes. It fails after 10 s without any."""
    with contextlib.suppress(ConnectionResetError):
        data = b""
        while part := peer.recv(65_536):
            data += part
        return data
    return b""


def speak_short(server: LiveServer) -> dict:
    with server.connect() as client:
        send(client, text="Hello there.", seed=1)
        return collect(client)[1]


def lines_like(server: LiveServer, pattern: str, after: int = 0) -> list[str]:
    return [line for line in server.err[after:] if re.search(pattern, line)]


# --- requests that are never complete ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("", ""),
        ("GET /hea", ""),
        (f"{GET}\r\n", "G"),
        (f"{GET}X-A: 1\r\n", "X-B: 2\r\n"),
        ("POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nx", "y"),
        ("POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\ny\r\n"),
    ],
    ids=["nothing", "half a line", "second request", "headers", "body", "chunks"],
)
def test_a_request_that_is_not_completed_is_cut(edge_server, first, then):
    """A byte now and then buys no time: 200 of them would take 50 s."""
    with connect(edge_server, first) as peer:
        peer.settimeout(TIMEOUT_S / 4)
        for _ in range(200):
            try:
                peer.sendall(then.encode())
                if not peer.recv(65_536):
                    return
            except TimeoutError:
                pass
            except OSError:
                return
    pytest.fail("the socket is still open")


def test_a_peer_that_does_not_read_its_answer_is_cut(edge_server):
    time.sleep(2 * TIMEOUT_S)  # what other tests left is closed by then
    fds = edge_server.num_fds()
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.connect(("127.0.0.1", edge_server.port))
        start = time.monotonic()
        peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        edge_server.wait_for_line("it read nothing of an answer")
        assert time.monotonic() - start > 2 * TIMEOUT_S  # it has more time for this
        deadline = time.monotonic() + 30
        while edge_server.num_fds() > fds:
            assert time.monotonic() < deadline, "the socket is still open"
            time.sleep(0.1)


def test_a_client_that_uses_its_connection_again_is_served(edge_server):
    client = http.client.HTTPConnection("127.0.0.1", edge_server.port, timeout=10)
    client.connect()
    first = client.sock
    for _ in range(6):
        client.request("GET", "/health")
        response = client.getresponse()
        assert (response.status, response.read()) == (200, b'{"status":"ok"}')
        time.sleep(TIMEOUT_S / 3)
    assert client.sock is first
    client.close()


# --- handshakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET / HTTP/1.1\r\n" + "".join(f"a{i}: b\r\n" for i in range(90)) + "".join(
            f"c{i}: d\r\n" for i in range(110)) + UPGRADE + "\r\n", 431),
        ("GET /" + "a" * 9000 + " HTTP/1.1\r\n" + UPGRADE + "\r\n", 414),
        ("GET / HTTP/1.1\r\nContent-Length: 5\r\n" + UPGRADE + "\r\n", 400),
        ("GET / HTTP/1.1\r\n" + UPGRADE.replace("Version: 13", "Version: 7") + "\r\n", 400),
        ("GET /nowhere HTTP/1.1\r\n" + UPGRADE + "\r\n", 404),
    ],
    ids=["headers", "path", "body", "version", "nowhere"],
)  # fmt: skip
def test_a_handshake_that_is_refused_is_answered_at_once(edge_server, request_text, status):
    num_lines = len(edge_server.err)
    with connect(edge_server, request_text) as peer:
        assert f" {status} ".encode() in read_to_end(peer).partition(b"\r\n")[0]
    assert not lines_like(edge_server, "socket cut", after=num_lines)
    assert not lines_like(edge_server, "ASGI callable|Traceback")


def test_refused_handshakes_have_a_few_lines_with_the_reason(edge_server):
    num_lines = len(edge_server.err)
    for _ in range(30):
        with connect(
            edge_server, f"GET / HTTP/1.1\r\nOrigin: https://evil.example\r\n{UPGRADE}\r\n"
        ) as peer:
            assert b" 403 " in read_to_end(peer)
    edge_server.wait_for_line("INFO .*handshake refused with 403: this Origin is not", after=num_lines)
    time.sleep(0.2)
    assert 1 <= len(edge_server.err) - num_lines <= 6


@pytest.mark.parametrize(
    "frames",
    [b"\x83\x80\0\0\0\0", b"\x01\x80\0\0\0\0" + b"\0\x80\0\0\0\0" * 600, b"\x89\x80\0\0\0\0" * 600,
     b"\x81\x81\0\0\0\0\xff" * 3],
    ids=["unknown", "fragments", "pings", "no text"],
)  # fmt: skip
def test_frames_right_behind_a_handshake_harm_nobody(edge_server, frames):
    for _ in range(20):
        peer = connect(edge_server, f"GET / HTTP/1.1\r\n{UPGRADE}\r\n")
        with peer, contextlib.suppress(OSError):
            peer.sendall(frames)
    assert edge_server.get("/health")[0] == 200
    assert not lines_like(edge_server, "ERROR|Traceback")


# --- too many sockets -------------------------------------------------------------------------------


def test_a_flood_of_sockets_keeps_nobody_out(edge_server):
    with contextlib.ExitStack() as stack:
        speaker = stack.enter_context(edge_server.connect())
        send(speaker, **LONG)
        first_chunk(speaker)
        fds = edge_server.num_fds()
        for _ in range(5):
            for _ in range(2 * SPARE_SOCKETS):
                stack.enter_context(connect(edge_server, "GET /hea"))
            assert edge_server.get("/health")[0] == 200
            assert speak_short(edge_server)["samples"] > 0
            assert edge_server.num_fds() <= fds + MAX_CONNECTIONS + SPARE_SOCKETS
        send(speaker, cancel=True)
        assert collect(speaker)[1]["finish_reason"] == "cancelled"
    assert lines_like(edge_server, "sockets are open, the one that waited longest is cut")


def test_a_low_descriptor_limit_is_kept_and_told(tiny_base):
    server = LiveServer("--model", str(tiny_base), program=FEW_DESCRIPTORS)
    try:
        server.wait_until_ready()
        server.wait_for_line("WARNING .*only 64 sockets are taken instead of 320")
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(connect(server, f"{GET}\r\nG"))
            assert server.get("/health")[0] == 200
        assert not lines_like(server, "Traceback|Too many open files")
        assert len(server.err) < 40
    finally:
        server.kill()


# --- frames without end -----------------------------------------------------------------------------


@pytest.fixture
def attacker(edge_server) -> Iterator[RawClient]:
    client = RawClient(edge_server, receive_buffer=4096)
    yield client
    client.hang_up()


def close_code(attacker: RawClient) -> int:
    """The code of the close frame, which may follow pongs."""
    data = read_to_end(attacker.socket)
    while data and data[0] != 0x88:
        data = data[2 + data[1] :]
    return int.from_bytes(data[2:4], "big")


@pytest.mark.parametrize("payload", [b"", b"x"], ids=["empty", "of one byte"])
def test_a_message_of_many_fragments_is_refused(edge_server, attacker, payload):
    fragment = bytes([0, 0x80 | len(payload), 0, 0, 0, 0]) + payload
    attacker.socket.sendall(b"\x01\x81\0\0\0\0{" + fragment * 126 + b"\x80\x81\0\0\0\0}")
    assert b"bad_request" in attacker.socket.recv(4096)  # 128 fragments are a message
    attacker.socket.sendall(b"\x01\x81\0\0\0\0{" + fragment * 128)
    assert close_code(attacker) == 1008
    edge_server.wait_for_line("socket cut: a message has more than 128 fragments")


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"\x81", b""), (b"\x81\xfe\x01\0\0\0\0\0{", b" "), (b"\x01\x81\0\0\0\0{", b"\0\x80\0\0\0\0")],
    ids=["half a head", "half a frame", "fragments"],
)
def test_a_message_that_is_not_completed_is_cut(edge_server, attacker, first, then):
    attacker.socket.sendall(first)
    start = time.monotonic()
    attacker.socket.settimeout(TIMEOUT_S / 4)
    for _ in range(120):  # at most 30 s
        try:
            attacker.socket.sendall(then)
            assert int.from_bytes(attacker.socket.recv(4096)[2:4], "big") == 1008
            break
        except TimeoutError:
            pass
    else:
        pytest.fail("the socket is still open")
    assert time.monotonic() - start > TIMEOUT_S / 2
    edge_server.wait_for_line("socket cut: a message is not complete after 1 s")


def is_always_in_a_message(client: RawClient) -> bool:
    """Whole messages for three times as long as one may last; False where this machine stood still
    for so long within one."""
    message = b"\x81\x81\0\0\0\0{"
    start = begun = time.monotonic()
    client.socket.sendall(message[:-1])
    while time.monotonic() - start < 3 * TIMEOUT_S:
        next_begun, answer = time.monotonic(), b""
        with contextlib.suppress(OSError):
            client.socket.sendall(message[-1:] + message[:-1])
            answer = client.socket.recv(4096)
        if b"bad_request" not in answer:
            assert time.monotonic() - begun >= TIMEOUT_S, "cut before its time"
            return False
        begun = next_begun
        time.sleep(TIMEOUT_S / 5)
    return True


def test_whole_messages_have_no_deadline(edge_server):
    for _ in range(20):
        client = RawClient(edge_server)
        done = is_always_in_a_message(client)
        client.hang_up()
        if done:
            return
    pytest.fail("this machine stands still for a second again and again")


def test_a_flood_of_pings_is_refused(edge_server, attacker):
    attacker.socket.sendall(b"\x89\x80\0\0\0\0" * 65)
    assert close_code(attacker) == 1008
    edge_server.wait_for_line("socket cut: more than 64 pings within a second")


def test_pings_at_a_usual_rate_are_answered(attacker):
    for _ in range(60):
        attacker.socket.sendall(b"\x89\x82\0\0\0\0ab")
        assert attacker.socket.recv(4) == b"\x8a\x02ab"
