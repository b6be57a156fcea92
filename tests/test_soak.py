"""Many short turns over many connections: memory, descriptors and threads stay as they are.

SOAK_TURNS is the number of turns."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from live_server import LiveServer, collect, first_chunk, send
from native_client import assert_healthy, figure

NUM_TURNS = int(os.environ.get("SOAK_TURNS", "2000"))
NUM_CLIENTS = 8
TURNS_OF_A_CONNECTION = 25
CANCELLED = 0.1
"""Part of the turns that are cancelled after their first chunk."""
TEXTS = ("Hi.", "Hello there.", "How are you?", "I am fine, thank you very much.")
MAX_GROWTH_MB = 20.0


def memory_mb(server: LiveServer) -> float:
    """The server's resident memory."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def num_threads(server: LiveServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def speak_turns(server: LiveServer, numbers: range, failures: list[str]) -> None:
    """Speak turns one after another, several on each connection."""
    for start in range(0, len(numbers), TURNS_OF_A_CONNECTION):
        with server.connect() as client:
            for number in numbers[start : start + TURNS_OF_A_CONNECTION]:
                draw = random.Random(number)
                send(client, text=draw.choice(TEXTS), seed=number, chunk_tokens=1)
                if draw.random() < CANCELLED:
                    first_chunk(client)
                    send(client, cancel=True)
                done = collect(client)[1]
                if done.get("finish_reason") not in ("stop", "length", "cancelled"):
                    failures.append(f"turn {number}: {done}")


def speak_all(server: LiveServer, numbers: range, failures: list[str]) -> None:
    """Share the turns among the clients, and wait until all of them are over."""
    parts = [numbers[client::NUM_CLIENTS] for client in range(NUM_CLIENTS)]
    threads = [threading.Thread(target=speak_turns, args=(server, part, failures)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_until_idle()
    time.sleep(0.5)  # for the sockets to be closed


@pytest.mark.slow
def test_many_turns_leave_nothing_behind(brief_base, recording, report):
    # On a slow machine turns wait. Here they may wait, and none is refused.
    options = ("--speaker-ref", str(recording), "--max-queue-s", "600")
    server = LiveServer("--model", str(brief_base), *options)
    try:
        server.wait_until_ready()
        failures: list[str] = []
        parts = [range(NUM_TURNS)[part * NUM_TURNS // 4 :][: NUM_TURNS // 4] for part in range(4)]
        speak_all(server, parts[0], failures)
        memory, before = [memory_mb(server)], (server.num_fds(), num_threads(server))
        start = time.monotonic()
        for part in parts[1:]:
            speak_all(server, part, failures)
            memory.append(memory_mb(server))
        after = server.num_fds(), num_threads(server)
        rate = 0.75 * NUM_TURNS / (time.monotonic() - start)
        report(
            f"{NUM_TURNS} turns, {rate:.0f} a second; MB after each quarter: "
            f"{', '.join(f'{mb:.1f}' for mb in memory)}; descriptors and threads {before} -> {after}; "
            f"load {os.getloadavg()[0]:.1f}"
        )
        assert failures == []
        assert memory[-1] - memory[0] < MAX_GROWTH_MB
        assert after == before
        assert figure(server, "connections") == figure(server, "turns_active") == 0
        assert_healthy(server)
        assert server.stop() == 0
    finally:
        server.kill()
