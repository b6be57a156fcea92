"""A real server process on a tiny random checkpoint, for tests over real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from warm_process import WarmProcess
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parents[1]
LONG = {
    "text": "The quick brown fox jumps over the lazy dog, and then it does so once again." * 2,
    "temperature": 10,
    "top_k": 0,
    "seed": 0,
}
"""A turn with more speech than any test waits for: only a cancel or a disconnect ends it soon.

The seed matters: one such turn in six gives EOS within 13 s of audio, and this one does not."""
DEMO_TOKEN = "a-secret-for-tests"
"""The token of the fixture `demo_server`."""
SOON = 80
"""Half of these 13 s, in frames. A turn that stops for another reason than its end has fewer frames."""

VOICES_OFTEN = """
import sys
from qwen_megakernel.serving import voice_library
voice_library.MAX_PER_MINUTE = 10_000
from server import main
sys.exit(main(sys.argv[1:]))
"""
"""The server without its limit on added voices per minute: some tests add more."""


SERVER_PYTHON = os.environ.get("SERVER_PYTHON")
"""The interpreter of servers, where it is not this one."""


def _start(
    arguments: Sequence[str], environ: dict[str, str], program: str | None
) -> WarmProcess | subprocess.Popen[str]:
    file = ROOT / "server.py"
    if SERVER_PYTHON is None:
        return WarmProcess(file, arguments, program=program, environ=environ, cwd=ROOT)
    return subprocess.Popen(
        [SERVER_PYTHON, *([str(file)] if program is None else ["-c", program]), *arguments],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class LiveServer:
    """`python server.py`, or another program with its options, on a free port."""

    def __init__(
        self, *arguments: str, environ: dict[str, str] | None = None, program: str | None = None
    ) -> None:
        self.process = _start(("--port", "0", *arguments), {**os.environ, **(environ or {})}, program)
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()
        self.port = int(self.wait_for_line(r"listening on \S+ port (\d+)")[1])

    @staticmethod
    def _read(stream, lines: list[str]) -> None:
        for line in stream:
            lines.append(line)

    def wait_for_line(self, pattern: str, limit_s: float = 120.0, after: int = 0) -> re.Match:
        """Wait for the first match in a line of stderr after the first `after` lines."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for line in self.err[after:]:
                if match := re.search(pattern, line):
                    return match
            if self.process.poll() is not None and not self._readers[1].is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no line like {pattern!r} in:\n{''.join(self.err)}")

    def wait_until_ready(self) -> LiveServer:
        self.wait_for_line(r"INFO\s+ready|\"message\": \"ready", 300)
        return self

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def connect(self, path: str = "/", **options):
        """A context manager that gives the connection."""
        return connect(f"{self.url}{path}", max_size=None, compression=None, **options)

    def handshake_status(self, path: str = "/", **options) -> int | None:
        """The HTTP status of a WebSocket handshake; None if a refusal has no error in its body."""
        try:
            with self.connect(path, **options):
                return 101
        except InvalidStatus as error:
            return error.response.status_code if b'"error"' in error.response.body else None

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ready(self, token: str = "") -> dict:
        return json.loads(self.get("/ready", X_API_Key=token)[1])

    def frames_of_cancelled_turn(self, after: int) -> int:
        """The frames of a cancelled turn, from the log after the first `after` lines."""
        return int(self.wait_for_line(r"turn \S+: cancelled, .*frames (\d+)", after=after)[1])

    def wait_until_idle(self, limit_s: float = 120.0, token: str = "") -> None:
        """Wait until no turn holds a slot or waits for one."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            state = self.ready(token)
            if not state["active"] and not state["waiting"]:
                return
            time.sleep(0.005)
        raise AssertionError(f"turns did not end: {state}")

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number: int = signal.SIGTERM, limit_s: float = 50.0) -> int:
        """Send a signal. Returns the exit code."""
        self.process.send_signal(number)
        return self.wait(limit_s)

    def wait(self, limit_s: float = 50.0) -> int:
        code = self.process.wait(limit_s)
        for reader in self._readers:
            reader.join(5)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()


def collect(client: ClientConnection, limit_s: float = 240.0) -> tuple[list[bytes], dict]:
    """A turn's chunks and its last message."""
    chunks = []
    while True:
        message = client.recv(timeout=limit_s)
        if isinstance(message, str):
            return chunks, json.loads(message)
        chunks.append(message)


def first_chunk(client: ClientConnection, limit_s: float = 240.0) -> bytes:
    message = client.recv(timeout=limit_s)
    assert isinstance(message, bytes), message
    return message


def send(client: ClientConnection, **fields) -> None:
    client.send(json.dumps(fields))


class RawClient:
    """A WebSocket client without a thread that reads: it can stall, vanish and break the rules."""

    def __init__(
        self,
        server: LiveServer,
        receive_buffer: int | None = None,
        headers: dict[str, str] | None = None,
        path: str = "/",
    ) -> None:
        """`headers`: additional headers of the handshake."""
        self.socket = socket.socket()
        self.socket.settimeout(60)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        headers = {
            **(headers or {}),
            "Host": "localhost",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version": "13",
        }
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode())
        self.handshake = b""
        """The server's answer to the handshake."""
        while b"\r\n\r\n" not in self.handshake:
            self.handshake += self.socket.recv(1)
        assert b" 101 " in self.handshake, self.handshake

    def send(self, **fields) -> None:
        """A text message, masked with zeros."""
        text = json.dumps(fields).encode()
        self.socket.sendall(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)

    def wait_for_audio(self) -> None:
        """Wait until something arrives. The server sends only audio on its own."""
        assert self.socket.recv(1) == b"\x82"

    def reset(self) -> None:
        """Vanish like a crashed process: RST, no close frame."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def hang_up(self) -> None:
        """Close the TCP connection properly, without a close frame."""
        self.socket.close()
