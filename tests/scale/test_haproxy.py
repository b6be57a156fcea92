"""HAProxy in front of two replicas: every client, full replicas, killed ones, and a rolling restart."""

import asyncio
import contextlib
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import TURN, make_service, pcm, play, turn, until
from front_door import HAPROXY, HEADERS, MAX_CONNECTIONS, FrontDoor, Outcome, speak_http, speak_simple
from pipecat.frames.frames import LLMFullResponseEndFrame, LLMFullResponseStartFrame, LLMTextFrame
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wire_tap import WireTap, num_chunks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy: apt-get install haproxy"),
]
ASKED = {
    "text": "Good evening, this is the front desk, and I am glad that you have called us today.",
    "voice": "rms",
    "seed": 3,
}
SHORT = ASKED | {"text": "Good evening, this is the front desk."}
EXACT = {"voice": "rms", "language": "en", "seed": 11, "chunk_frames": 1}
NUM_KILLS = 10
CLEAN_S = 10.0
"""In which a client notices that its replica is gone."""


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> Iterator[FrontDoor]:
    door = FrontDoor(tmp_path_factory.mktemp("haproxy"))
    yield door
    door.stop()


def assert_same_sound(speak, audio, expected):
    """Sample by sample. On a CPU the last digits depend on how many speak at a time."""
    kind, limit = (np.float32, 1e-3) if speak is speak_simple else (np.int16, 33)
    heard, wanted = (np.frombuffer(data, kind).astype(np.float64) for data in (audio, expected))
    assert heard.shape == wanted.shape != (0,)
    assert np.abs(heard - wanted).max() <= limit


def run_one(speak, port, fields):
    outcome = Outcome()
    speak(port, fields, outcome)
    assert outcome.error is None, outcome.error
    return outcome.audio


async def converse(port, script):
    """Pipecat's service through a tap: the tap, frames and errors. `script` is made from the tap."""
    async with WireTap(port, HEADERS) as tap:
        return tap, *await play(make_service(tap.url, **EXACT), script(tap))


@pytest.fixture(scope="module")
def undisturbed(door):
    """What one replica says, asked without HAProxy: `ASKED` by function, and `TURN` of Pipecat."""
    port = door.ports[0]
    _, down, errors = asyncio.run(converse(port, lambda tap: turn(*TURN)))
    assert errors == []
    spoken = {speak: run_one(speak, port, ASKED) for speak in (speak_simple, speak_http)}
    return spoken | {"pipecat": pcm(down)}


def test_every_client_speaks_through_the_front_door(door, undisturbed):
    for speak in (speak_simple, speak_http):
        assert_same_sound(speak, run_one(speak, door.port, ASKED), undisturbed[speak])
    _, down, errors = asyncio.run(converse(door.port, lambda tap: turn(*TURN)))
    assert errors == []
    assert_same_sound(None, pcm(down), undisturbed["pipecat"])


def handshake(port):
    return connect(f"ws://127.0.0.1:{port}", additional_headers=HEADERS)


def test_clients_are_spread(door):
    door.wait_for_connections(0, 0)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(handshake(door.port))
        assert door.connections() == [2, 2]


def test_full_replica_is_passed_over_and_all_full_is_told(door):
    """A client sees a refusal only where no replica has room, and gets the replica's own."""
    door.wait_for_connections(0, 0)
    with contextlib.ExitStack() as stack:
        # HAProxy does not know of these, so it goes on sending clients there.
        full = [stack.enter_context(handshake(door.ports[0])) for _ in range(MAX_CONNECTIONS)]
        run_one(speak_http, door.port, SHORT)
        run_one(speak_simple, door.port, SHORT)
        door.wait_for_connections(MAX_CONNECTIONS, 0)
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(handshake(door.port))
        assert door.connections() == [MAX_CONNECTIONS] * 2
        with pytest.raises(InvalidStatus) as refused:
            handshake(door.port)
        response = refused.value.response
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert b"connections are taken" in response.body
        check_http_refusal(door.port)
        full[0].close()
        door.wait_for_connections(MAX_CONNECTIONS - 1, MAX_CONNECTIONS)
        stack.enter_context(handshake(door.port))


def check_http_refusal(port):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    link.request("POST", "/v1/audio/speech", json.dumps({"input": "Hello."}), HEADERS)
    answer = link.getresponse()
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert "connections are taken" in json.loads(answer.read())["error"]["message"]
    link.close()


class Listeners:
    """Clients of the simple protocol and of HTTP, each in a thread."""

    def __init__(self, port):
        self.outcomes = [(speak, Outcome()) for speak in (speak_simple, speak_http, speak_simple)]
        self.threads = [
            threading.Thread(target=speak, args=(port, ASKED, outcome), daemon=True)
            for speak, outcome in self.outcomes
        ]
        for thread in self.threads:
            thread.start()

    def all_heard(self):
        return all(outcome.audio or outcome.error for _, outcome in self.outcomes)

    def wait(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"


def kill_in_mid_turn(door, kill_pipecats):
    """One round. Gives the listeners, what Pipecat said, its lines, the time, and how many listeners
    the replica had that was killed."""
    door.wait_for_connections(0, 0)
    seen = {}

    def script(tap):
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame(TURN[0])
        yield LLMTextFrame(TURN[1])
        yield from until(lambda: tap.lines and num_chunks(tap.line))
        pipecats = door.connections().index(1)
        listeners = Listeners(door.port)
        yield from until(listeners.all_heard)
        heard = num_chunks(tap.line)
        yield LLMTextFrame(TURN[2])
        yield from until(lambda: num_chunks(tap.line) > heard)
        victim = pipecats if kill_pipecats else 1 - pipecats
        seen["lost"] = door.connections()[victim] - kill_pipecats
        seen["at"] = time.monotonic()
        door.replicas[victim].process.send_signal(signal.SIGKILL)
        seen["victim"], seen["listeners"] = victim, listeners
        yield LLMFullResponseEndFrame()
        yield from until(lambda: not any(thread.is_alive() for thread in listeners.threads))

    tap, down, errors = asyncio.run(converse(door.port, script))
    seen["listeners"].wait()
    door.replicas[seen["victim"]].wait()
    return seen, pcm(down), len(tap.lines), errors


def test_replica_killed_in_mid_turn_ten_times(door, undisturbed):
    num_lost = num_broken = 0
    for attempt in range(NUM_KILLS):
        seen, said, num_lines, errors = kill_in_mid_turn(door, kill_pipecats=attempt % 2 == 0)
        # Every sample once, wherever it was spoken.
        assert_same_sound(None, said, undisturbed["pipecat"])
        assert not any(error.category.is_permanent for error in errors)
        num_broken += num_lines > 1
        failed = [outcome for _, outcome in seen["listeners"].outcomes if outcome.error]
        assert len(failed) == seen["lost"]
        for outcome in failed:
            assert 0 <= outcome.failed_at - seen["at"] < CLEAN_S
        for speak, outcome in seen["listeners"].outcomes:
            if outcome.complete:
                assert_same_sound(speak, outcome.audio, undisturbed[speak])
        num_lost += len(failed)
        door.start_again(seen["victim"])
        door.wait_until_up()
    assert num_broken == NUM_KILLS // 2
    assert num_lost >= NUM_KILLS
    print(f"{num_lost} of {3 * NUM_KILLS} listeners lost their replica, Pipecat {num_broken} times")


def test_rolling_restart_under_load_fails_no_turn(door, undisturbed):
    door.wait_for_connections(0, 0)
    over, outcomes = threading.Event(), []

    def speak_on(speak):
        while not over.is_set():
            outcomes.append(Outcome())
            speak(door.port, SHORT, outcomes[-1])

    threads = [threading.Thread(target=speak_on, args=(speak,)) for speak in (speak_simple, speak_http)]
    rolling = threading.Thread(target=roll, args=(door, over))

    def script(tap):
        for thread in (*threads, rolling):
            thread.start()
        yield from turn(*TURN)
        yield from until(over.is_set)
        yield from turn(*TURN)

    try:
        _, down, errors = asyncio.run(converse(door.port, script))
    finally:
        over.set()
    for thread in (*threads, rolling):
        thread.join(60)
    assert not any(error.category.is_permanent for error in errors)
    assert_same_sound(None, pcm(down), 2 * undisturbed["pipecat"])
    assert [outcome.error for outcome in outcomes if not outcome.complete] == []
    assert len(outcomes) >= 8
    print(f"{len(outcomes)} turns of others, none failed")


def roll(door, over):
    """Restart both replicas, one after the other, as the systemd unit does it."""
    try:
        for number in range(2):
            door.set_state(number, "drain")
            assert door.replicas[number].stop(limit_s=40) == 0
            door.start_again(number)
            door.set_state(number, "ready")
            door.wait_until_up()
    finally:
        over.set()
