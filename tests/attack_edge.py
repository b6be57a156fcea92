"""Attacks on a server beside three honest streams, and what the streams notice.

    python tests/attack_edge.py [--seconds 30] [--only ATTACK ...] [--model DIR]

The first attacks are on the sockets, the others on the engine and its queue. A row for the server
without an attack comes first, then one for each attack. Underruns and first audio are those of honest
turns. Each turn has a new connection, which opens when the audio before it has been played. Memory,
descriptors and log lines are the server's. Memory counts from a moment after all slots were used once.
`load` is the machine's load over the last minute. The last column says which limits a row exceeds
(`Row.faults`), and the exit code is 1 if any does. The attacker is a process of low priority, because a
real one has a machine of its own. A machine that is too slow for three voices has underruns without an
attack. A tiny random CustomVoice checkpoint (`python -m qwen_megakernel synth-checkpoint`) needs less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from live_server import LiveServer, RawClient, send  # noqa: E402

from pipecat_client.test_client import SAMPLE_RATE, Playhead  # noqa: E402

NUM_STREAMS = 3
TEXT = "Good morning, how are you?"
HELD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nG"
NO_HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Content-Length: 5\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
FRAGMENTS = b"\x01\x81\0\0\0\0{" + b"\0\x80\0\0\0\0" * 20_000
PINGS = (b"\x89\xfd\0\0\0\0" + b"p" * 125) * 2000
NUM_SLOTS = 16
SILENT_CONNECTIONS = 3 * NUM_SLOTS
"""So many that honest clients still have room."""
START_BUFFER_S = 0.1
"""Seconds that an honest player waits after its first chunk."""
SOCKETS_PER_S = 500
SETTLE_S = 10.0
"""Seconds after an attack before memory is measured."""
MAX_P95_RATIO = 2.0
MAX_MB_LEFT = 10.0
MAX_FDS = 1024
MAX_LINES = 100


# ---------------------------------------------------------------------------- honest clients


@dataclass
class Honest:
    """What honest clients noticed."""

    first_audio_s: list[float] = field(default_factory=list)
    underruns: int = 0
    failed: int = 0

    def speak_until(self, stop: threading.Event, server: LiveServer) -> None:
        """Speak turn after turn, each on a new connection."""
        while not stop.is_set():
            try:
                self.speak(server)
            except Exception:  # whatever it is, an honest client was not served
                self.failed += 1
                time.sleep(0.1)

    def speak(self, server: LiveServer, limit_s: float = 30.0) -> None:
        """Speak one turn, and wait until its audio has been played; `limit_s` between two messages."""
        start, playhead, first_s, samples = time.perf_counter(), Playhead(), 0.0, 0
        with server.connect(open_timeout=10) as client:
            send(client, text=TEXT, seed=1)
            while isinstance(chunk := client.recv(timeout=limit_s), bytes):
                now = time.perf_counter() - start
                if not playhead.chunks:
                    first_s = now
                    self.first_audio_s.append(first_s)
                    now += START_BUFFER_S
                playhead.add(np.frombuffer(chunk, "<f4"), now)
                samples += len(chunk) // 4
        self.underruns += playhead.underruns
        time.sleep(max(0.0, start + first_s + samples / SAMPLE_RATE - time.perf_counter()))


# ---------------------------------------------------------------------------- attackers


def hold_sockets(port: int, request: bytes) -> Iterator[None]:
    """Hold 1,030 sockets that wait for an answer which never comes. Then reopen the oldest, in turn."""
    held: list[socket.socket] = []
    try:
        while True:
            with contextlib.suppress(OSError):
                peer = socket.create_connection(("127.0.0.1", port), timeout=2)
                held.append(peer)
                peer.sendall(request[:-1])
                time.sleep(1 / SOCKETS_PER_S)  # the last byte comes after the answer, if there is one
                peer.sendall(request[-1:])
            if len(held) > 1030:
                held.pop(0).close()
            yield
    finally:
        for peer in held:
            peer.close()


def connect(port: int, receive_buffer: int | None = None) -> RawClient:
    """A client that has made its handshake."""
    server: Any = SimpleNamespace(port=port)
    return RawClient(server, receive_buffer)


def flood(port: int, data: bytes) -> Iterator[None]:
    """Send frames without end on one socket that reads nothing. When it is cut, take another."""
    while True:
        with contextlib.suppress(OSError, AssertionError):
            attacker = connect(port, receive_buffer=4096)
            with attacker.socket:
                while True:
                    attacker.socket.sendall(data)
                    yield
        yield


def message(**fields: Any) -> bytes:
    """A frame of JSON, masked with zeros."""
    data = json.dumps(fields).encode()
    return b"\x81\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data


def speak(text: str, context_id: str = "x") -> bytes:
    """A frame that appends text to a context."""
    return message(type="speak", context_id=context_id, text=text)


HELLO = message(type="hello", protocol=1)
CANCEL = message(type="cancel")
HELD_TEXT = HELLO + speak("a" * 4095)
"""Letters without a space: one word that may go on."""


def talk(port: int, first: bytes, data: bytes) -> Iterator[None]:
    """Send messages without end on one socket and read the answers. When it is cut, take another."""
    while True:
        with contextlib.suppress(OSError, AssertionError):
            attacker = connect(port).socket
            threading.Thread(target=read_all, args=(attacker,), daemon=True).start()
            with attacker:
                attacker.sendall(first)
                while True:
                    attacker.sendall(data)
                    yield
        yield


def read_all(peer: socket.socket) -> None:
    """Read until either side closes the socket."""
    with contextlib.suppress(OSError):
        while peer.recv(1 << 18):
            pass


def hold_slots(port: int) -> Iterator[None]:
    """Open turns of two words whose texts never end. When one is over, its connection opens the next."""
    contexts = count()
    with selectors.DefaultSelector() as selector:
        while True:
            while len(selector.get_map()) < SILENT_CONNECTIONS:
                with contextlib.suppress(OSError, AssertionError):
                    peer = connect(port).socket
                    peer.sendall(HELLO + speak("Hello there ", f"x{next(contexts)}"))
                    selector.register(peer, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=0.1):
                peer: Any = key.fileobj
                with contextlib.suppress(OSError):
                    if data := peer.recv(1 << 18):
                        if b'"done"' in data:
                            peer.sendall(speak("Hello there ", f"x{next(contexts)}"))
                        continue
                selector.unregister(peer)
                peer.close()
            yield


ATTACKS: dict[str, Callable[[int], Iterator[None]]] = {
    "half a second request": partial(hold_sockets, request=HELD),
    "handshakes without answer": partial(hold_sockets, request=NO_HANDSHAKE),
    "empty fragments": partial(flood, data=FRAGMENTS),
    "pings": partial(flood, data=PINGS),
    "empty texts": partial(talk, first=HELD_TEXT, data=speak("") * 2000),
    "one-character texts": partial(talk, first=HELLO, data=speak("\u4e2d") * 4095 + CANCEL),
    "silent turns": hold_slots,
    "cancelled turns": partial(talk, first=HELLO, data=(speak("Hello there.") + CANCEL) * 300),
    "junk": partial(talk, first=HELLO, data=message(nonsense=1) * 300),
}


def attack_until(stop: Event, begun: Event, port: int, name: str) -> None:
    """Run one attack. It runs in a process of its own."""
    os.nice(10)
    for _ in ATTACKS[name](port):
        begun.set()
        if stop.is_set():
            return


@contextlib.contextmanager
def attacking(port: int, name: str | None) -> Iterator[None]:
    """Run the attack of that name until the `with` block ends."""
    context = multiprocessing.get_context("spawn")
    stop, begun = context.Event(), context.Event()
    attacker = context.Process(target=attack_until, args=(stop, begun, port, name), daemon=True)
    if name is not None:
        attacker.start()
        assert begun.wait(120), "the attacker did not begin"
    try:
        yield
    finally:
        stop.set()
        if name is not None:
            attacker.join(5)
            attacker.kill()


# ---------------------------------------------------------------------------- figures


def memory_mb(server: LiveServer) -> float:
    """The server's resident memory."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass(frozen=True)
class Row:
    """The figures beside one attack, or without an attack."""

    turns: int
    failed: int
    underruns: int
    p50_ms: float
    p95_ms: float
    peak_mb: float
    left_mb: float
    fds: int
    lines: int
    load: float

    HEAD = (
        f"{'attack':<26} {'turns':>5} {'failed':>6} {'underruns':>9} {'p50 ms':>7} {'p95 ms':>7} "
        f"{'peak MB':>8} {'left MB':>8} {'fds':>5} {'lines':>5} {'load':>5}  beyond"
    )

    def __str__(self) -> str:
        return (
            f"{self.turns:>5} {self.failed:>6} {self.underruns:>9} "
            f"{self.p50_ms:>7.0f} {self.p95_ms:>7.0f} {self.peak_mb:>+8.0f} {self.left_mb:>+8.0f} "
            f"{self.fds:>5} {self.lines:>5} {self.load:>5.1f}"
        )

    def faults(self, alone: Row) -> list[str]:
        """The limits that the row exceeds, compared with a row without an attack."""
        limits = {
            "failed": self.failed <= alone.failed,
            "underruns": self.underruns * max(1, alone.turns) <= alone.underruns * max(1, self.turns),
            "p95": self.p95_ms <= MAX_P95_RATIO * alone.p95_ms,
            "memory": self.left_mb <= max(0.0, alone.left_mb) + MAX_MB_LEFT,
            "descriptors": self.fds <= MAX_FDS,
            "lines": self.lines <= MAX_LINES,
        }
        return [name for name, held in limits.items() if not held]


def use_all_slots(server: LiveServer) -> None:
    """Speak a short turn on each slot at once, so that all memory is in use before the first figure."""
    honest = Honest()
    threads = [threading.Thread(target=honest.speak, args=(server, 120.0)) for _ in range(NUM_SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(server: LiveServer, attack: str | None, seconds: float) -> Row:
    """Three honest streams beside an attack."""
    before_mb, num_lines = memory_mb(server), len(server.err)
    honest, stop, most_mb, most_fds = Honest(), threading.Event(), 0.0, 0
    threads = [
        threading.Thread(target=honest.speak_until, args=(stop, server)) for _ in range(NUM_STREAMS)
    ]
    with attacking(server.port, attack):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.1)
            most_mb, most_fds = max(most_mb, memory_mb(server)), max(most_fds, server.num_fds())
        stop.set()
    for thread in threads:
        thread.join(60)
    time.sleep(SETTLE_S if attack is not None else 0)
    first = sorted(honest.first_audio_s)
    return Row(
        turns=len(first),
        failed=honest.failed,
        underruns=honest.underruns,
        p50_ms=1000 * median(first or [0]),
        p95_ms=1000 * (quantiles(first, n=20)[-1] if len(first) > 1 else float("nan")),
        peak_mb=most_mb - before_mb,
        left_mb=memory_mb(server) - before_mb,
        fds=most_fds,
        lines=sum(" turn " not in line for line in server.err[num_lines:]),
        load=os.getloadavg()[0],
    )


def main() -> int:
    """Print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each attack")
    parser.add_argument("--model", metavar="DIR", help="default: the demonstration voice")
    parser.add_argument("--only", choices=ATTACKS, nargs="+", help="instead of all attacks")
    options = parser.parse_args()
    demo = ("--model", str(ROOT / "demo_voice"), "--voices", str(ROOT / "demo_voice" / "voices"))
    server = LiveServer(*(("--model", options.model) if options.model else demo))
    beyond = []
    try:
        server.wait_until_ready()
        use_all_slots(server)
        print(Row.HEAD)
        alone = measure(server, None, options.seconds)
        print(f"{'none':<26} {alone}", flush=True)
        for name in options.only or ATTACKS:
            row = measure(server, name, options.seconds)
            beyond += row.faults(alone)
            print(f"{name:<26} {row}  {', '.join(row.faults(alone)) or '-'}", flush=True)
    finally:
        server.kill()
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
