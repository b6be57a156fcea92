"""HAProxy in front of two replicas: every client, full replicas, killed ones, and a rolling restart."""

import asyncio
import contextlib
import http.client
import json
from collections.abc import Iterator

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from callers import (
    ASKED,
    SHORT,
    assert_same_sound,
    converse,
    kill_in_mid_turn,
    run_one,
    speak_undisturbed,
    speak_while,
)
from conversation import TURN, pcm, turn
from front_door import HAPROXY, HEADERS, MAX_CONNECTIONS, FrontDoor, speak_http, speak_simple
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy: apt-get install haproxy"),
]
NUM_KILLS = 10


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> Iterator[FrontDoor]:
    door = FrontDoor(tmp_path_factory.mktemp("haproxy"))
    yield door
    door.stop()


@pytest.fixture(scope="module")
def undisturbed(door):
    """What one replica says, asked without HAProxy."""
    return speak_undisturbed(door.ports[0])


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
    """A client gets a refusal only if no replica has room, and it is the replica's own."""
    door.wait_for_connections(0, 0)
    with contextlib.ExitStack() as stack:
        # HAProxy does not know of these connections, so it goes on sending clients there.
        full = [stack.enter_context(handshake(door.ports[0])) for _ in range(MAX_CONNECTIONS)]
        for _ in range(2):  # one of them is sent to the full one first
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


def test_replica_killed_in_mid_turn_ten_times(door, undisturbed):
    kills = []
    for attempt in range(NUM_KILLS):
        kill = kill_in_mid_turn(door, attempt % 2 == 0, undisturbed)
        kills.append(kill)
        door.start_again(kill.victim)
        door.wait_until_up()
    num_lost, num_broken = sum(k.num_lost for k in kills), sum(k.num_broken for k in kills)
    assert num_broken == NUM_KILLS // 2
    assert num_lost >= NUM_KILLS
    print(f"{num_lost} of {3 * NUM_KILLS} listeners lost their replica, Pipecat {num_broken} times")


def test_rolling_restart_under_load_fails_no_turn(door, undisturbed):
    door.wait_for_connections(0, 0)
    num_turns = speak_while(door, lambda: roll(door), undisturbed)
    assert num_turns >= 8
    print(f"{num_turns} turns of others, none failed")


def roll(door):
    """Restart both replicas, one after the other, as the systemd unit does it."""
    for number in range(2):
        door.set_state(number, "drain")
        assert door.replicas[number].stop(limit_s=40) == 0
        door.start_again(number)
        door.set_state(number, "ready")
        door.wait_until_up()
