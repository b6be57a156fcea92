"""Clients of two replicas behind a front door, and what they do while replicas die or are replaced."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from conversation import TURN, make_service, pcm, play, turn, until
from front_door import HEADERS, LIMIT_S, Outcome, speak_http, speak_simple
from live_server import send
from pipecat.frames.frames import LLMFullResponseEndFrame, LLMFullResponseStartFrame, LLMTextFrame
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from wire_tap import WireTap, num_chunks

ASKED = {
    "text": "Good evening, this is the front desk, and I am glad that you have called us today.",
    "voice": "rms",
    "seed": 3,
}
SHORT = ASKED | {"text": "Good evening, this is the front desk."}
EXACT = {"voice": "rms", "language": "en", "seed": 11, "chunk_frames": 1}
CLEAN_S = 30.0
"""A client notices at once that its replica is gone. Only one that hangs takes so many seconds."""


class Door(Protocol):
    """What balances clients over replicas."""

    port: int

    def connections(self) -> list[int]: ...
    def wait_for_connections(self, *numbers: int) -> None: ...
    def kill(self, number: int) -> None: ...


def assert_same_sound(speak: Callable | None, audio: bytes, expected: bytes) -> None:
    """Sample by sample. On a CPU the last digits depend on how many speak at a time."""
    kind, limit = (np.float32, 1e-3) if speak is speak_simple else (np.int16, 33)
    heard, wanted = (np.frombuffer(data, kind).astype(np.float64) for data in (audio, expected))
    assert heard.shape == wanted.shape != (0,)
    assert np.abs(heard - wanted).max() <= limit


def run_one(speak: Callable, port: int, fields: dict[str, Any]) -> bytes:
    """One turn, which must be whole."""
    outcome = Outcome()
    speak(port, fields, outcome)
    assert outcome.error is None, outcome.error
    return outcome.audio


async def converse(port: int, script: Callable, limit_s: float = 120.0):
    """Pipecat's service through a tap: the tap, frames and errors. `script` is made from the tap."""
    async with WireTap(port, HEADERS) as tap:
        return tap, *await play(make_service(tap.url, **EXACT), script(tap), limit_s=limit_s)


def speak_undisturbed(port: int) -> dict[Any, bytes]:
    """What one replica says: `ASKED` by function, and `TURN` of Pipecat."""
    _, down, errors = asyncio.run(converse(port, lambda tap: turn(*TURN)))
    assert errors == []
    spoken = {speak: run_one(speak, port, ASKED) for speak in (speak_simple, speak_http)}
    return spoken | {"pipecat": pcm(down)}


class Listeners:
    """Clients of the simple protocol and of HTTP, each in a thread."""

    def __init__(self, port: int) -> None:
        self.outcomes = [(speak, Outcome()) for speak in (speak_simple, speak_http, speak_simple)]
        self.threads = [
            threading.Thread(target=speak, args=(port, ASKED, outcome), daemon=True)
            for speak, outcome in self.outcomes
        ]
        for thread in self.threads:
            thread.start()

    def all_heard(self) -> bool:
        return all(outcome.audio or outcome.error for _, outcome in self.outcomes)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"


class Regular:
    """A client of the simple protocol that speaks turn after turn over one socket.

    A server that goes closes it between two turns, or refuses a turn before its first sound. Then it
    connects again, which is no failure.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.outcomes: list[Outcome] = []
        self.num_moves = 0
        """Sockets that were closed between two turns."""

    def speak_until(self, over: threading.Event) -> None:
        """Turns of `SHORT`, until one fails or `over` is set."""
        while not over.is_set():
            try:
                options = {"max_size": None, "compression": None, "additional_headers": HEADERS}
                with connect(f"ws://127.0.0.1:{self._port}", **options) as client:
                    while not over.is_set() and self._speak(client):
                        pass
            except Exception as error:
                self.outcomes.append(Outcome(error=error))
                return

    def _speak(self, client: ClientConnection) -> bool:
        """One turn; whether the socket is still there. Raises what is a failure."""
        audio = b""
        try:
            send(client, **SHORT)
            while isinstance(message := client.recv(timeout=LIMIT_S), bytes):
                audio += message
            end = json.loads(message)
            if end.get("finish_reason") != "stop":
                raise ConnectionError(end)
        except (ConnectionClosed, ConnectionError):
            if audio:
                raise
            self.num_moves += 1
            return False
        self.outcomes.append(Outcome(audio, complete=True))
        return True


@dataclass
class Kill:
    """What came of killing a replica in mid-turn."""

    victim: int
    num_lost: int
    """Listeners that the victim had."""
    num_broken: int
    """Connections that Pipecat's service lost."""
    slowest_s: float
    """Until the last listener knew."""


def kill_in_mid_turn(door: Door, kill_pipecats: bool, undisturbed: dict[Any, bytes]) -> Kill:
    """Kill one of two replicas, Pipecat's own or the other one, while four clients are spoken to.

    Every sample of Pipecat's comes once, wherever it was spoken. Listeners of the other replica hear
    all. Those of the victim know within `CLEAN_S`.
    """
    door.wait_for_connections(0, 0)
    seen: dict[str, Any] = {}

    def script(tap: WireTap):
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame(TURN[0])
        yield LLMTextFrame(TURN[1])
        yield from until(lambda: tap.lines and num_chunks(tap.line))
        pipecats = door.connections().index(1)
        listeners = seen["listeners"] = Listeners(door.port)
        yield from until(listeners.all_heard)
        heard = num_chunks(tap.line)
        yield LLMTextFrame(TURN[2])
        yield from until(lambda: num_chunks(tap.line) > heard)
        victim = seen["victim"] = pipecats if kill_pipecats else 1 - pipecats
        seen["lost"] = door.connections()[victim] - kill_pipecats
        seen["at"] = time.monotonic()
        door.kill(victim)
        yield LLMFullResponseEndFrame()
        yield from until(lambda: not any(thread.is_alive() for thread in listeners.threads))

    tap, down, errors = asyncio.run(converse(door.port, script))
    listeners = seen["listeners"]
    listeners.wait()
    assert_same_sound(None, pcm(down), undisturbed["pipecat"])
    assert not any(error.category.is_permanent for error in errors)
    waits = [o.failed_at - seen["at"] for _, o in listeners.outcomes if o.error]
    assert len(waits) == seen["lost"], [o.error for _, o in listeners.outcomes]
    assert all(0 <= wait_s < CLEAN_S for wait_s in waits), waits
    for speak, outcome in listeners.outcomes:
        if outcome.complete:
            assert_same_sound(speak, outcome.audio, undisturbed[speak])
    return Kill(seen["victim"], len(waits), len(tap.lines) - 1, max(waits, default=0.0))


def speak_while(
    door: Door,
    change: Callable[[], None],
    undisturbed: dict[Any, bytes],
    limit_s: float = 110.0,
    *,
    all_replaced: bool = True,
) -> int:
    """Speak one turn after the other while `change` runs: with Pipecat, and three other clients.

    Not a turn may fail. Gives the number of turns of the other three. With `all_replaced` the change
    ends every replica, so the client that stays connected must move.
    """
    over, outcomes, failures = threading.Event(), [], []
    regular = Regular(door.port)

    def speak_on(speak: Callable) -> None:
        while not over.is_set():
            outcomes.append(Outcome())
            speak(door.port, SHORT, outcomes[-1])

    def run_change() -> None:
        try:
            change()
        except Exception as error:
            failures.append(error)
        finally:
            over.set()

    threads = [threading.Thread(target=speak_on, args=(speak,)) for speak in (speak_simple, speak_http)]
    threads.append(threading.Thread(target=regular.speak_until, args=(over,)))
    threads.append(threading.Thread(target=run_change))

    def script(tap: WireTap):
        for thread in threads:
            thread.start()
        yield from turn(*TURN)
        yield from until(over.is_set, limit_s)
        yield from turn(*TURN)

    try:
        _, down, errors = asyncio.run(converse(door.port, script, limit_s + 60))
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failures == [], failures
    assert not any(error.category.is_permanent for error in errors)
    assert_same_sound(None, pcm(down), 2 * undisturbed["pipecat"])
    outcomes += regular.outcomes
    failed = [outcome.error for outcome in outcomes if not outcome.complete]
    assert failed == [], failed
    assert regular.num_moves > 0 or not all_replaced
    return len(outcomes)
