"""Two real replicas of the demonstration voice behind a real HAProxy, and clients of it."""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer import command
from live_server import ROOT, LiveServer, send
from websockets.sync.client import connect

HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
MAX_CONNECTIONS = 8
"""Options of a replica."""
TOKEN = "a-secret-for-tests"
LIMIT_S = 60.0
BODY_DELAY_S = 0.05
"""A front door that passes the headers on at once has done so by then."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FrontDoor:
    """deploy/haproxy.cfg with other ports, and the replicas that it names."""

    def __init__(self, folder: Path) -> None:
        self.port, self.ports = free_port(), [free_port(), free_port()]
        self.socket = str(folder / "admin.sock")
        text = (ROOT / "deploy/haproxy.cfg").read_text(encoding="utf-8")
        for given, used in (
            (":8080", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:8765", f"127.0.0.1:{self.ports[0]}"),
            ("127.0.0.1:8766", f"127.0.0.1:{self.ports[1]}"),
            ("/run/haproxy/admin.sock", self.socket),
        ):
            text, count = re.subn(rf"{re.escape(given)}\b", used, text)
            assert count == 1, given
        config = folder / "haproxy.cfg"
        config.write_text(text, encoding="utf-8")
        environ = {**os.environ, "QWEN_MEGAKERNEL_TOKEN": TOKEN}
        self.process = subprocess.Popen([HAPROXY, "-db", "-f", config], env=environ)
        self.replicas: list[LiveServer] = []
        try:
            self.replicas += [self._replica(number) for number in range(2)]
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise

    def _replica(self, number: int) -> LiveServer:
        options = ("--max-connections", str(MAX_CONNECTIONS), "--drain-s", "30")
        voices = ("--model", "demo_voice", "--voices", "demo_voice/voices")
        proxy = ("--trusted-proxy", "127.0.0.1", "--token", TOKEN)
        return LiveServer("--port", str(self.ports[number]), *voices, *options, *proxy)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def states(self) -> dict[str, str]:
        """The states of the replicas, as HAProxy sees them."""
        lines = command(self.socket, "show stat").removeprefix("# ").splitlines()
        rows = [row for row in csv.DictReader(lines) if row["pxname"] == "replicas"]
        return {row["svname"]: row["status"] for row in rows if row["svname"].startswith("gpu")}

    def wait_until_up(self) -> None:
        """Wait until HAProxy sends clients to both replicas."""
        deadline = time.monotonic() + LIMIT_S
        while set(self.states().values()) != {"UP"}:
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.05)

    def connections(self) -> list[int]:
        """The number of clients of each replica."""
        return [replica.ready(TOKEN)["connections"] for replica in self.replicas]

    def wait_for_connections(self, *numbers: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self.connections() != list(numbers):
            assert time.monotonic() < deadline, self.connections()
            time.sleep(0.02)

    def kill(self, number: int) -> None:
        """As `kill -9` does."""
        self.replicas[number].process.kill()

    def start_again(self, number: int) -> None:
        self.replicas[number].kill()
        self.replicas[number] = self._replica(number)

    def set_state(self, number: int, state: str) -> None:
        script = str(ROOT / "deploy/balancer.py")
        words = [sys.executable, script, self.socket, f"replicas/gpu{number}", state]
        subprocess.run(words, check=True, timeout=10)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for replica in self.replicas:
            replica.kill()


@dataclass
class Outcome:
    """The outcome of one client."""

    audio: bytes = b""
    complete: bool = False
    failed_at: float = 0.0
    """On the clock of `time.monotonic`."""
    error: Exception | None = None


HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def speak_simple(port: int, fields: dict[str, Any], outcome: Outcome) -> None:
    """Speak one turn in the simple protocol, over a connection of its own."""
    try:
        options = {"max_size": None, "compression": None, "additional_headers": HEADERS}
        with connect(f"ws://127.0.0.1:{port}", **options) as client:
            send(client, **fields)
            while isinstance(message := client.recv(timeout=LIMIT_S), bytes):
                outcome.audio += message
            end = json.loads(message)
            assert end.get("finish_reason") == "stop", end
            outcome.complete = True
    except Exception as error:
        outcome.error, outcome.failed_at = error, time.monotonic()


def speak_http(port: int, fields: dict[str, Any], outcome: Outcome) -> None:
    """Speak one text over OpenAI's route. The body comes after the headers, as from most clients."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        body = {"input": fields["text"], "voice": fields["voice"], "seed": fields["seed"]}
        asked = json.dumps(body | {"response_format": "pcm"}).encode()
        link.putrequest("POST", "/v1/audio/speech")
        for name, value in (HEADERS | {"Content-Length": str(len(asked))}).items():
            link.putheader(name, value)
        link.endheaders()
        time.sleep(BODY_DELAY_S)
        link.send(asked)
        answer = link.getresponse()
        assert answer.status == 200, (answer.status, answer.read())
        while data := answer.read1(65_536):  # an answer without its last chunk is an IncompleteRead
            outcome.audio += data
        outcome.complete = True
    except Exception as error:
        outcome.error, outcome.failed_at = error, time.monotonic()
    finally:
        link.close()
