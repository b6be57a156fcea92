"""Proves deploy/ray_serve.py on a real Ray Serve: replicas of the demonstration voice on a CPU.

    pip install "ray[serve]==2.60.0"
    python deploy/check_ray.py --kills 10

Starts a Ray of its own, deploys with `serve run` and with `serve deploy`, and prints a table, a row a
check. Clients and checks are those of tests/scale. Exits with 0 if all passed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import loguru

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "deploy", "tests", "tests/scale", "tests/pipecat")]

from callers import (  # noqa: E402
    ASKED,
    SHORT,
    assert_same_sound,
    converse,
    kill_in_mid_turn,
    run_one,
    speak_undisturbed,
    speak_while,
)
from conversation import TURN, pcm, turn  # noqa: E402
from front_door import HEADERS, Outcome, speak_http, speak_simple  # noqa: E402
from ray_door import LIMIT_S, MAX_CONNECTIONS, RayDoor, wait_until  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

QUICK = {"metrics_interval_s": 1, "look_back_period_s": 3, "upscale_delay_s": 2, "downscale_delay_s": 5}
"""Of autoscaling, in seconds."""
Sound = dict[Any, bytes]


def check_clients(door: RayDoor, undisturbed: Sound) -> str:
    """Every client hears through the front door what a replica says to it directly."""
    for speak in (speak_simple, speak_http):
        assert_same_sound(speak, run_one(speak, door.port, ASKED), undisturbed[speak])
    _, down, errors = asyncio.run(converse(door.port, lambda tap: turn(*TURN)))
    assert errors == []
    assert_same_sound(None, pcm(down), undisturbed["pipecat"])
    return "Pipecat, OpenAI's route and the simple protocol: the same sound as from a replica itself"


def handshake(port: int) -> Any:
    """A socket that says nothing."""
    return connect(f"ws://127.0.0.1:{port}", additional_headers=HEADERS)


def check_full(door: RayDoor, undisturbed: Sound) -> str:
    """A full replica is passed over; where all are full, the client gets a replica's own refusal."""
    door.wait_for_connections(0, 0)
    with contextlib.ExitStack() as stack:
        # HAProxy does not know of these, so it goes on sending clients there.
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(handshake(door.replicas[0].port))
        num_asked = ask_until_heard(door.port)
        run_one(speak_simple, door.port, SHORT)
        door.wait_for_connections(MAX_CONNECTIONS, 0)
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(handshake(door.port))
        assert door.connections() == [MAX_CONNECTIONS] * 2
        try:
            handshake(door.port).close()
            raise AssertionError("a client was let in although all replicas are full")
        except InvalidStatus as refused:
            response = refused.response
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert b"connections are taken" in response.body
        check_http_refusal(door.port)
    door.wait_for_connections(0, 0)
    return (
        f"{MAX_CONNECTIONS + 1} WebSockets passed over a full one, and OpenAI's route when it was asked "
        f"for the {num_asked}. time; all full: 503 with Retry-After"
    )


def ask_until_heard(port: int) -> int:
    """How often OpenAI's route was asked until it spoke. Ray's HAProxy hands a refusal on where the body
    comes after the headers; OpenAI's clients then ask again."""
    for number in range(1, 11):
        outcome = Outcome()
        speak_http(port, SHORT, outcome)
        if outcome.complete:
            return number
        assert "(503, " in str(outcome.error), outcome.error
    raise AssertionError("OpenAI's route refused ten times although a replica has room")


def check_http_refusal(port: int) -> None:
    """OpenAI's route refuses in OpenAI's words."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(link):
        link.request("POST", "/v1/audio/speech", json.dumps({"input": "Hello."}), HEADERS)
        answer = link.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert "connections are taken" in json.loads(answer.read())["error"]["message"]


def check_kills(door: RayDoor, undisturbed: Sound, number: int) -> str:
    """A replica is killed in mid-turn, in turns Pipecat's own and the other one."""
    kills, back_s = [], []
    for attempt in range(number):
        names = [replica.name for replica in door.replicas]
        kill = kill_in_mid_turn(door, attempt % 2 == 0, undisturbed)
        start = time.monotonic()
        door.wait_until_up(2, gone={names[kill.victim]})
        back_s.append(time.monotonic() - start)
        kills.append(kill)
    num_lost, num_broken = sum(k.num_lost for k in kills), sum(k.num_broken for k in kills)
    assert num_broken == (number + 1) // 2
    slowest_s = max(kill.slowest_s for kill in kills)
    return (
        f"{number} kills: {num_lost} of {3 * number} listeners lost their replica and knew within "
        f"{slowest_s:.2f} s; all others and Pipecat's speech ({num_broken} times broken) whole; "
        f"a new replica after {max(back_s):.0f} s at most"
    )


def check_upgrade(door: RayDoor, undisturbed: Sound, idle_s: int = 601) -> str:
    """All replicas are replaced under load, and no turn fails."""
    old = {replica.name for replica in door.replicas}

    def upgrade() -> None:
        door.deploy(idle_s, min_replicas=2, max_replicas=2, **QUICK)
        door.wait_until_up(2, gone=old)
        wait_until(lambda: not old & set(door.processes()), "old replicas do not end")

    start = time.monotonic()
    num_turns = speak_while(door, upgrade, undisturbed, LIMIT_S)
    return f"both replaced in {time.monotonic() - start:.0f} s, {num_turns + 2} turns, none failed"


def check_load_step(door: RayDoor, undisturbed: Sound) -> str:
    """1 -> 2 -> 1 replicas as clients come and go, and no turn fails."""
    door.deploy(601, min_replicas=1, max_replicas=2, **QUICK)
    door.wait_until_up(1)
    seen: dict[str, float] = {}

    def step() -> None:
        with contextlib.ExitStack() as stack:
            start = time.monotonic()
            for _ in range(MAX_CONNECTIONS - 5):  # four more clients speak
                stack.enter_context(handshake(door.port))
            door.wait_until_up(2)
            seen["up"] = time.monotonic() - start
        start = time.monotonic()
        door.wait_until_up(1)
        seen["down"] = time.monotonic() - start
        wait_until(lambda: len(door.processes()) == 1, "the replica does not end")
        seen["ended"] = time.monotonic() - start

    num_turns = speak_while(door, step, undisturbed, LIMIT_S, all_replaced=False)
    return (
        f"1 -> 2 in {seen['up']:.0f} s, 2 -> 1 in {seen['down']:.0f} s, its process ended after "
        f"{seen['ended']:.0f} s; {num_turns + 2} turns, none failed"
    )


def tell(name: str, result: str) -> None:
    """A row of the table."""
    print(f"| {name} | {result} |", flush=True)


def main() -> int:
    """Print a row for each check; the exit code."""
    parser = argparse.ArgumentParser(description="Check deploy/ray_serve.py on a real Ray Serve.")
    parser.add_argument("--kills", type=int, default=10)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Ray is ended all the same
    loguru.logger.remove()  # Pipecat's account of each lost connection
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        door = RayDoor(Path(folder))
        try:
            door.serve("start", "--http-port", str(door.port))
            door.serve("run", "--non-blocking", "ray_serve:build", "min_replicas=2", "max_replicas=2")
            door.wait_until_up(2)
            run_one(speak_simple, door.port, SHORT)
            door.serve("shutdown", "-y")
            tell("serve run", "two replicas take clients")
            door.deploy(600, min_replicas=2, max_replicas=2, **QUICK)
            door.wait_until_up(2)
            tell("serve deploy", "two replicas take clients")
            undisturbed = speak_undisturbed(door.replicas[0].port)
            tell("clients", check_clients(door, undisturbed))
            tell("full replicas", check_full(door, undisturbed))
            tell("kill -9", check_kills(door, undisturbed, args.kills))
            tell("rolling upgrade", check_upgrade(door, undisturbed))
            tell("load step", check_load_step(door, undisturbed))
        finally:
            door.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
