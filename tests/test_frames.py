"""WebSocket frames that break the standard: each gets its close code, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, RawClient, collect, send
from native_client import assert_healthy

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
FIN, MASKED = 0x80, 0x80
UNICODE = '["é€😀"]'.encode()
MAX_BYTES = 65_536
"""The most bytes of a message, by the default of `--max-text-chars`."""


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, reserved: int = 0) -> bytes:
    """A client's frame, with a mask of zeros. `reserved`: RSV1 is bit 2, RSV2 bit 1, RSV3 bit 0."""
    head = bytes([FIN * fin | reserved << 4 | opcode])
    if len(data) < 126:
        head += bytes([MASKED | len(data)])
    elif len(data) < 1 << 16:
        head += struct.pack("!BH", MASKED | 126, len(data))
    else:
        head += struct.pack("!BQ", MASKED | 127, len(data))
    return head + bytes(4) + data


@pytest.fixture
def client(live_server) -> Iterator[RawClient]:
    raw = RawClient(live_server)
    yield raw
    raw.hang_up()
    assert_healthy(live_server)


def read_to_end(peer: socket.socket) -> bytes:
    """All bytes until the server closes the socket."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := peer.recv(65_536):
            data += part
    return data


def answers(client: RawClient) -> list[tuple[int, bytes]]:
    """Opcode and payload of all frames until the server closes the socket."""
    data, frames = read_to_end(client.socket), []
    while data:
        start = {126: 4, 127: 10}.get(data[1], 2)
        length = int.from_bytes(data[2:start], "big") if start > 2 else data[1]
        frames.append((data[0] & 0x0F, data[start : start + length]))
        data = data[start + length :]
    return frames


def close_code(client: RawClient) -> int:
    """The code of the server's close frame, which must be its last frame."""
    opcode, payload = answers(client)[-1]
    assert opcode == CLOSE
    return int.from_bytes(payload[:2], "big")


def assert_understood(client: RawClient) -> None:
    """The server answers a message that is whole, and no request of its protocol."""
    answer = client.socket.recv(4096)
    assert answer[0] == FIN | TEXT
    assert json.loads(answer[2 + 2 * (answer[1] == 126) :])["code"] == "bad_request"


# --- compression ------------------------------------------------------------------------------------


def test_an_offer_to_compress_is_declined(live_server):
    offer = "permessage-deflate; client_max_window_bits; server_no_context_takeover"
    client = RawClient(live_server, headers={"Sec-WebSocket-Extensions": offer})
    assert b"extensions" not in client.handshake.lower()
    client.socket.sendall(frame(TEXT, b"{"))
    assert_understood(client)
    client.hang_up()


@pytest.mark.parametrize("fragmented", [False, True])
def test_a_compressed_message_is_refused_and_not_inflated(live_server, fragmented):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(60_000_000)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < MAX_BYTES
    before = resident_bytes(live_server)
    for _ in range(5):
        client = RawClient(live_server)
        client.socket.sendall(frame(TEXT, bomb, fin=not fragmented, reserved=4))
        assert close_code(client) == 1002
    assert resident_bytes(live_server) - before < 10_000_000
    assert_healthy(live_server)


def resident_bytes(server: LiveServer) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


# --- invalid frames ---------------------------------------------------------------------------------


BROKEN = {
    **{f"RSV{3 - bit} of {name}": frame(opcode, b"{", reserved=1 << bit)
       for bit in range(3) for name, opcode in (("text", TEXT), ("binary", BINARY), ("ping", PING))},
    **{f"opcode {opcode}": frame(opcode, b"{") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    **{f"half of control {opcode}": frame(opcode, b"", fin=False) for opcode in (CLOSE, PING, PONG)},
    **{f"long control {opcode}": frame(opcode, bytes(126)) for opcode in (CLOSE, PING, PONG)},
    "no mask": b"\x81\x01{",
    "no mask of a ping": b"\x89\x00",
    "continuation of nothing": frame(0, b"{"),
    "text within a message": frame(TEXT, b"{", fin=False) + frame(TEXT, b"{"),
    "binary within a message": frame(BINARY, b"{", fin=False) + frame(BINARY, b"{"),
    "close of one byte": frame(CLOSE, b"\x03"),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_frame_is_a_protocol_error(client, data):
    client.socket.sendall(data)
    assert close_code(client) == 1002


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65_535])
def test_a_close_code_that_must_not_be_sent_is_a_protocol_error(client, code):
    client.socket.sendall(frame(CLOSE, struct.pack("!H", code)))
    assert close_code(client) == 1002


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, 1007, 1009, 1011, 1014, 3000, 3999, 4000, 4999]
)
def test_a_close_is_echoed(client, code):
    client.socket.sendall(frame(CLOSE, struct.pack("!H", code) + b"x" * 123))
    assert close_code(client) == code


def test_what_follows_a_close_is_not_read(client):
    client.socket.sendall(frame(CLOSE, b"\x03\xe8") + frame(TEXT, b"{") + frame(PING))
    assert [opcode for opcode, _ in answers(client)] == [CLOSE]


def test_a_reason_that_is_no_text_is_refused(client):
    client.socket.sendall(frame(CLOSE, b"\x03\xe8\xff"))
    assert close_code(client) == 1007


@pytest.mark.parametrize("length", [0, 1, 125])
def test_a_ping_within_a_message_is_answered_with_its_content(client, length):
    ping, content = frame(TEXT, b"[", fin=False), bytes(range(length))
    client.socket.sendall(ping + frame(PING, content) + frame(PONG, b"unasked") + frame(0, b"]"))
    assert client.socket.recv(2 + length) == bytes([FIN | PONG, length]) + content
    assert_understood(client)


# --- lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 125, 126, 127, 65_535, MAX_BYTES])
def test_messages_of_all_lengths_are_taken(client, length):
    client.socket.sendall(frame(TEXT, b"{" + b" " * (length - 1)))
    assert_understood(client)


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_a_length_beyond_the_limit_is_refused_by_its_head(client, length):
    client.socket.sendall(struct.pack("!BBQ", FIN | TEXT, MASKED | 127, length))
    assert close_code(client) == 1009


def test_fragments_together_have_the_limit_of_a_message(client):
    half = b" " * (MAX_BYTES // 2)
    client.socket.sendall(frame(TEXT, b"{" + half[1:], fin=False) + frame(0, half))
    assert_understood(client)
    client.socket.sendall(frame(TEXT, half, fin=False) + frame(0, half + b" "))
    assert close_code(client) == 1009


# --- UTF-8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(UNICODE) + 1))
def test_text_may_be_split_at_every_byte(client, at):
    client.socket.sendall(frame(TEXT, UNICODE[:at], fin=False) + frame(0, UNICODE[at:]))
    assert_understood(client)


NO_TEXT = [
    b"\xff",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\x80",
]


@pytest.mark.parametrize("bad", NO_TEXT, ids=bytes.hex)
def test_bytes_that_are_no_text_are_refused_wherever_they_are_split(live_server, bad):
    message = b'["' + bad + b'"]'
    for at in range(len(message) + 1):
        client = RawClient(live_server)
        client.socket.sendall(frame(TEXT, message[:at], fin=False) + frame(0, message[at:]))
        assert close_code(client) == 1007
    assert_healthy(live_server)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_bytes_that_are_no_text_right_before_a_close_are_passed_over(client, num_frames):
    """All of it comes in one piece, so the close is answered before the text is looked at."""
    client.socket.sendall(frame(TEXT, b"\xff") * num_frames + frame(CLOSE, b"\x03\xe8"))
    assert close_code(client) == 1000


# --- anything ---------------------------------------------------------------------------------------


def random_bytes(draw: random.Random) -> bytes:
    """Random frames, some of them with faults."""
    frames = []
    for _ in range(draw.randint(1, 6)):
        opcode = draw.choice([0, TEXT, TEXT, BINARY, PING, PONG, draw.randint(0, 15)])
        data = draw.choice([b"{", UNICODE, draw.randbytes(draw.randint(0, 300))])
        fin, reserved = draw.random() < 0.8, draw.choice([0] * 12 + [1, 2, 4])
        frames.append(frame(opcode, data, fin=fin, reserved=reserved))
    data = bytearray(b"".join(frames))
    for _ in range(draw.choice([0, 0, 1, 3])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("seed", range(10))
def test_random_frames_harm_nobody(live_server, seed):
    """The server closes only for a fault of the peer, and never calls it a fault of the server."""
    draw, codes = random.Random(seed), set()
    for _ in range(40):
        client = RawClient(live_server)
        with contextlib.suppress(OSError):  # it may have been cut meanwhile
            client.socket.sendall(random_bytes(draw) + frame(CLOSE, b"\x03\xe8"))
            client.socket.shutdown(1)
        for opcode, payload in answers(client):
            assert opcode in (TEXT, BINARY, CLOSE, PING, PONG)
            if opcode == CLOSE and payload:
                codes.add(int.from_bytes(payload[:2], "big"))
    assert {1002} <= codes <= {1000, 1002, 1007, 1008, 1009}
    with live_server.connect() as honest:
        send(honest, text="Hello there.", seed=1)
        assert collect(honest)[1]["samples"] > 0
    assert_healthy(live_server)
    assert not [line for line in live_server.err if "Exception in ASGI" in line]
