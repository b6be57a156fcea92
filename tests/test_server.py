"""The server as its users meet it: a process, sockets, signals. No mocks."""

import concurrent.futures
import contextlib
import json
import os
import random
import re
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LONG, SOON, RawClient, collect, first_chunk, send
from websockets.exceptions import ConnectionClosed

from qwen_megakernel.tools.banner import time_spent

SHORT_TEXT = "Hello there."
TOKEN = "a-secret-for-tests"
FRAME_BYTES = 1920 * 4


def speak_short(server, **fields):
    with server.connect() as client:
        send(client, text=SHORT_TEXT, **fields)
        return collect(client)


def wait_until(condition, limit_s=60.0):
    """Whether a condition became true in time."""
    deadline = time.monotonic() + limit_s
    while not (fulfilled := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return fulfilled


def as_samples(chunks):
    return np.frombuffer(b"".join(chunks), "<f4")


def assert_same_take(one, other):
    """Equal except for the rounding of sums, which depends on the number of turns in a frame."""
    np.testing.assert_allclose(one, other, atol=1e-4)


def assert_healthy(server):
    assert server.get("/health")[0] == 200
    assert not [line for line in server.err if "Traceback" in line]


# --- a turn ------------------------------------------------------------------------------------


def test_a_turn(live_server):
    chunks, done = speak_short(
        live_server, language="en", temperature=0.9, top_k=50, speaker_ref="default"
    )
    samples = as_samples(chunks)
    assert done["samples"] == len(samples) > 0
    assert len(samples) % 1920 == 0
    assert np.abs(samples).max() <= 1.0
    assert done["done"] is True
    assert done["finish_reason"] in ("stop", "length", "repeat", "silence")
    assert done["duration_s"] == pytest.approx(len(samples) / 24_000, abs=1e-3)
    assert done["ttfc_ms"] > 0
    assert done["rtf"] > 0
    assert done["rtf"] == pytest.approx(done["generation_s"] / done["duration_s"], rel=0.05)


def test_chunk_tokens_are_frames(live_server):
    chunks, _ = speak_short(live_server, chunk_tokens=3, seed=1)
    assert {len(chunk) for chunk in chunks[:-1]} <= {3 * FRAME_BYTES}


def test_seed_repeats_a_take(live_server):
    takes = [b"".join(speak_short(live_server, seed=seed)[0]) for seed in (5, 5, 6)]
    shared = min(len(takes[0]), len(takes[2]))
    assert takes[0] == takes[1]
    assert takes[0][:shared] != takes[2][:shared]


def test_texts_of_one_connection_are_spoken_in_order(live_server):
    with live_server.connect() as client:
        for seed in range(3):
            send(client, text=SHORT_TEXT, seed=seed)
        queued = [b"".join(collect(client)[0]) for _ in range(3)]
    assert queued == [b"".join(speak_short(live_server, seed=seed)[0]) for seed in range(3)]


def test_queue_is_bounded(live_server):
    with live_server.connect() as client:
        for _ in range(10):
            send(client, **LONG)
        while isinstance(reply := client.recv(timeout=120), bytes):
            pass
        assert json.loads(reply)["code"] == "overloaded"
        send(client, cancel=True)
        replies = [collect(client)[1] for _ in range(9)]
        assert {reply["finish_reason"] for reply in replies} == {"cancelled"}
        send(client, text=SHORT_TEXT)
        assert collect(client)[1]["samples"] > 0


def test_live_text(live_server):
    with live_server.connect() as client:
        send(client, text="Hello ", more=True, seed=3)
        for word in ("there, ", "how ", "are ", "you?"):
            time.sleep(0.02)
            send(client, text=word, more=True)
        send(client, text="", more=False)
        chunks, done = collect(client)
        assert chunks
        assert "error" not in done
        send(client, text=SHORT_TEXT)
        assert collect(client)[1]["samples"] > 0


def test_live_text_waits_for_its_end_while_queued(live_server):
    with live_server.connect() as client:
        send(client, text=SHORT_TEXT, seed=1)
        send(client, text="One ", more=True, seed=2)
        send(client, text="two.")
        assert collect(client)[1]["samples"] > 0
        assert collect(client)[1]["samples"] > 0


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\0\1", "bad_request"),
        ("{", "bad_request"),
        ("[]", "bad_request"),
        ('{"text": ""}', "bad_request"),
        ('{"text": " \\n"}', "bad_request"),
        ('{"text": "", "more": false}', "bad_request"),
        ('{"text": "\\udc00"}', "bad_request"),
        ('{"text": "a", "temperature": NaN}', "bad_request"),
        ('{"text": "a", "top_k": 1e3}', "bad_request"),
        ("[" * 60_000, "bad_request"),
        (json.dumps({"text": "a" * 4097}), "text_too_long"),
        (json.dumps({"text": "\U0001f600" * 4097}), "text_too_long"),
        ('{"text": "a", "speaker_ref": "nobody"}', "unknown_voice"),
        ('{"text": "a", "language": "klingon"}', "unknown_language"),
    ],
)
def test_refused_messages_leave_the_connection_alive(live_server, message, code):
    with live_server.connect() as client:
        client.send(message)
        chunks, reply = collect(client)
        assert chunks == []
        assert reply["code"] == code
        assert set(reply) == {"error", "code"}
        send(client, text=SHORT_TEXT)
        assert collect(client)[1]["samples"] > 0


def test_unknown_voice_names_the_known_ones(live_server):
    assert "default" in speak_short(live_server, speaker_ref="nobody")[1]["error"]


def test_live_text_has_the_same_limit(live_server):
    with live_server.connect() as client:
        send(client, text="a" * 4000, more=True)
        send(client, text="a" * 97, more=True)
        while isinstance(reply := client.recv(timeout=120), bytes):
            pass
        assert json.loads(reply)["code"] == "text_too_long"


def test_oversized_message_closes_with_1009(live_server):
    with live_server.connect() as client:
        send(client, text="a" * 70_000)
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(timeout=60)
        assert caught.value.rcvd.code == 1009
    assert_healthy(live_server)


def test_broken_utf8_closes_only_its_connection(live_server):
    with live_server.connect() as client:
        client.socket.sendall(b"\x81\x82\0\0\0\0\xff\xff")  # a masked text message of two bytes
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(timeout=60)
        assert caught.value.rcvd.code == 1007
    assert_healthy(live_server)


def test_paths_in_speaker_ref_open_nothing(live_server, tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(b"RIFF")
    before = os.stat(secret).st_atime_ns
    names = [
        str(secret),
        f"file://{secret}",
        f"../../..{secret}",
        "..",
        "/dev/zero",
        "http://127.0.0.1:9/x",
    ]
    with live_server.connect() as client:
        for name in [*names, *[n.replace("/", "\\") for n in names], "%2e%2e%2fx", "a\0b"]:
            send(client, text="Hi", speaker_ref=name)
            assert collect(client)[1]["code"] == "unknown_voice"
    assert os.stat(secret).st_atime_ns == before


# --- cancel ------------------------------------------------------------------------------------


def test_cancel_stops_at_once_and_gets_done(live_server):
    with live_server.connect() as client:
        send(client, **LONG, chunk_tokens=1)
        received = len(first_chunk(client))
        send(client, cancel=True)
        chunks, done = collect(client)
        received += sum(map(len, chunks))
        assert done["finish_reason"] == "cancelled"
        assert done["samples"] * 4 == received
        live_server.wait_until_idle()
        send(client, text=SHORT_TEXT)
        assert collect(client)[1]["finish_reason"] != "cancelled"


def test_cancel_is_honoured_within_one_frame(live_server):
    frames = []
    for _ in range(5):
        num_lines = len(live_server.err)
        with live_server.connect() as client:
            send(client, **LONG)
            first_chunk(client)
            client.send('{"cancel": true}')
            collect(client)
        line = live_server.wait_for_line(r"cancelled.*frames (\d+)", after=num_lines)
        frames.append(int(line[1]))
    # The first chunk is one frame. While the client reacts, one more frame is made; on a busy machine
    # perhaps two. A cancel that waits for a chunk of the ramp to fill would show here.
    assert sorted(frames)[2] <= 3


def test_cancel_with_nothing_running_is_answered(live_server):
    with live_server.connect() as client:
        send(client, cancel=True)
        assert collect(client)[1] == {
            "done": True,
            "duration_s": 0.0,
            "generation_s": 0.0,
            "ttfc_ms": 0.0,
            "rtf": 0.0,
            "samples": 0,
            "finish_reason": "cancelled",
        }


def test_cancel_of_one_client_leaves_others(live_server):
    alone = as_samples(speak_short(live_server, seed=11)[0])
    with live_server.connect() as other, live_server.connect() as client:
        send(other, **LONG)
        first_chunk(other)
        send(client, text=SHORT_TEXT, seed=11)
        first = first_chunk(client)
        send(other, cancel=True)
        other.send("nonsense")
        assert_same_take(as_samples([first, *collect(client)[0]]), alone)


# --- many clients ------------------------------------------------------------------------------


def test_clients_share_by_frame(live_server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(live_server.connect()) for _ in range(4)]
        for client in clients:
            send(client, **LONG, chunk_tokens=1)
        for client in clients:  # none ends in this time, so all must be served side by side
            for _ in range(10):
                first_chunk(client)
        assert live_server.ready()["active"] == 4
    live_server.wait_until_idle()


def test_concurrent_turns_are_those_of_a_single_client(live_server):
    alone = [b"".join(speak_short(live_server, seed=seed)[0]) for seed in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda seed: b"".join(speak_short(live_server, seed=seed)[0]), range(3))
        )
    assert [len(take) for take in together] == [len(take) for take in alone]


@pytest.mark.slow
def test_stalled_reader_is_cut_and_slows_nobody(live_server):
    silent = socket.create_connection(("127.0.0.1", live_server.port), timeout=60)
    stalled = RawClient(live_server, receive_buffer=4096)
    start, num_lines = time.monotonic(), len(live_server.err)
    stalled.send(**LONG)
    stalled.wait_for_audio()
    for seed in range(3):
        assert speak_short(live_server, seed=seed)[1]["samples"] > 0
    live_server.wait_for_line(r"cut: it (read nothing|answered no ping) for", after=num_lines)
    assert time.monotonic() - start > 9
    live_server.wait_until_idle()
    stalled.hang_up()
    assert silent.recv(1) == b""  # cut as well: it never sent a request
    silent.close()


# --- clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [RawClient.reset, RawClient.hang_up])
def test_lost_client_frees_its_slot(live_server, leave):
    client, num_lines = RawClient(live_server), len(live_server.err)
    client.send(**LONG)
    client.wait_for_audio()
    assert live_server.ready()["active"] == 1
    leave(client)
    assert live_server.frames_of_cancelled_turn(num_lines) < SOON
    live_server.wait_until_idle()


def test_closing_client_frees_its_slot(live_server):
    num_lines = len(live_server.err)
    with live_server.connect() as client:
        send(client, **LONG)
        first_chunk(client)
    assert live_server.frames_of_cancelled_turn(num_lines) < SOON
    live_server.wait_until_idle()


@pytest.mark.slow
def test_200_random_cycles_leak_nothing(live_server):
    speak_short(live_server)
    live_server.wait_until_idle()
    time.sleep(0.2)
    fds = live_server.num_fds()
    chance = random.Random(7)

    def cycle(_):
        client = RawClient(live_server)
        for _ in range(chance.randrange(3)):
            client.send(**LONG, more=chance.random() < 0.3)
        if chance.random() < 0.5:
            time.sleep(chance.random() * 0.03)
        if chance.random() < 0.4:
            client.send(cancel=True)
        if chance.random() < 0.3:
            client.send(text=chance.choice([None, 7, ""]))
        chance.choice([client.reset, client.hang_up])()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(cycle, range(200)))
    live_server.wait_until_idle()
    assert wait_until(lambda: live_server.ready()["connections"] == 0)
    assert wait_until(lambda: live_server.num_fds() <= fds)
    assert speak_short(live_server)[1]["samples"] > 0
    assert_healthy(live_server)


garbage = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=40),
    st.fixed_dictionaries(
        {},
        optional={
            "text": st.sampled_from(["", " ", "Hi.", None, 7, "a" * 5000]),
            "more": st.sampled_from([True, False, None, 1]),
            "cancel": st.sampled_from([True, False, "yes"]),
            "temperature": st.one_of(st.none(), st.floats(), st.text(max_size=3)),
            "top_k": st.one_of(st.none(), st.integers(), st.floats()),
            "speaker_ref": st.one_of(st.none(), st.text(max_size=5), st.just("default")),
            "language": st.one_of(st.none(), st.text(max_size=5), st.just("en")),
            "chunk_tokens": st.one_of(st.none(), st.integers(-1, 70)),
            "seed": st.one_of(st.none(), st.integers()),
        },
    ).map(json.dumps),
)


def test_garbage_of_one_client_never_harms_another(live_server):
    expected = as_samples(speak_short(live_server, seed=21)[0])

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(garbage, min_size=1, max_size=8))
    def attack(messages):
        with live_server.connect() as client:
            for message in messages:
                client.send(message)
            client.send('{"cancel": true}')
            replies = [client.recv(timeout=120)]
            while not (isinstance(replies[-1], str) and json.loads(replies[-1]).get("done")):
                replies.append(client.recv(timeout=120))
            for reply in replies:
                if isinstance(reply, str) and "error" in (fields := json.loads(reply)):
                    assert fields["code"] != "internal"

    stop = threading.Event()
    takes = []

    def speak_on():
        while not stop.is_set():
            takes.append(as_samples(speak_short(live_server, seed=21)[0]))

    speaker = threading.Thread(target=speak_on)
    speaker.start()
    try:
        attack()
    finally:
        stop.set()
        speaker.join(60)
    assert takes
    for take in takes:
        assert_same_take(take, expected)
    live_server.wait_until_idle()
    assert_healthy(live_server)


def test_flood_of_nonsense_in_one_packet(live_server):
    with live_server.connect() as client:
        client.socket.sendall(b"\x81\x81\0\0\0\0{" * 3000)
        codes = {json.loads(client.recv(timeout=120))["code"] for _ in range(3000)}
        assert codes == {"bad_request"}
    assert_healthy(live_server)


# --- operations --------------------------------------------------------------------------------


def test_ready_and_health(live_server):
    status, body = live_server.get("/ready")
    assert status == 200
    assert json.loads(body)["phase"] == "ready"
    assert json.loads(body)["voices"] == ["default"]
    assert live_server.get("/health") == (200, '{"status":"ok"}')
    assert live_server.get("/")[0] == 426
    assert live_server.get("/nothing")[0] == 404


def test_the_log_says_where_loading_time_went(live_server):
    steps = [("importing torch", 10.0), ("opening a folder", 12.06), ("warming up", 12.1)]
    assert time_spent(steps, 13.0) == "3.0 s since the start: importing torch 2.1 s; warming up 0.9 s"
    assert live_server.wait_for_line(r"\d+\.\d s since the start: ")


def test_metrics_count_turns(live_server):
    def figure(name):
        match = re.search(rf"^{re.escape(name)} (\S+)$", live_server.get("/metrics")[1], re.M)
        return float(match[1]) if match else 0.0

    cancelled = 'qwen_megakernel_turns_total{finish_reason="cancelled"}'
    before, heard = figure(cancelled), figure("qwen_megakernel_ttfc_seconds_count")
    with live_server.connect() as client:
        send(client, **LONG)
        first_chunk(client)
        assert figure("qwen_megakernel_turns_active") == 1
        assert figure("qwen_megakernel_connections") == 1
        send(client, cancel=True)
        collect(client)
    assert figure(cancelled) == before + 1
    assert figure("qwen_megakernel_ttfc_seconds_count") == heard + 1
    assert figure("process_open_fds") == pytest.approx(live_server.num_fds(), abs=3)


def test_banner_says_what_to_do_next(live_server):
    banner = "".join(live_server.out)
    port = live_server.port
    assert f"ssh -L {port}:127.0.0.1:{port} user@host" in banner
    assert f"python -m qwen_megakernel say --url ws://127.0.0.1:{port} --text" in banner
    assert "voices:  default" in banner


def test_logs_hold_figures_but_no_text(live_server):
    speak_short(live_server, seed=99)
    line = live_server.wait_for_line(
        r"turn \S+: \w+, chars 12, voice default, seed 99, ttfc \d+ ms, rtf \S+, frames \d+"
    )
    assert line
    assert "Hello there" not in "".join(live_server.err)


def test_web_pages_of_strangers_are_refused(live_server):
    assert live_server.handshake_status(origin="https://evil.example") == 403
    assert live_server.handshake_status(origin=f"http://127.0.0.1:{live_server.port}") == 101


def test_rebound_names_are_refused(live_server):
    for path in ("/health", "/ready", "/metrics", "/"):
        assert live_server.get(path, Host="evil.example")[0] == 403
    assert live_server.get("/ready", Host="localhost:1")[0] == 200
