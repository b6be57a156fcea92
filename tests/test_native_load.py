"""The native protocol under load and in operation: slow clients, lost ones, many, and none."""

import re
import signal
import time

import numpy as np
import pytest
import soxr
from live_server import LONG, SOON, LiveServer, RawClient
from native_client import (
    LONG_TEXT,
    SENTENCES,
    WILD,
    DirectSocket,
    Heard,
    NativeClient,
    figure,
    take,
    wait_for_figure,
)
from slow_cases import slow_after
from websockets.exceptions import ConnectionClosed

from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    Done,
    End,
    Error,
    Flush,
    Started,
)

CUT = "cut: it (read nothing|answered no ping)"

# --- clients that do not read, or leave -------------------------------------------------------------


def unsent_in_kernel(server):
    """Bytes in the largest send queue among the server's sockets."""
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    mine = [row for row in rows if int(row[1].split(":")[1], 16) == server.port]
    return max(int(row[4].split(":")[0], 16) for row in mine)


def still_figure(server, name, limit_s=240):
    """A figure, once it has not grown for a second. A ping may add to it."""
    deadline, held = time.monotonic() + limit_s, -1000.0
    while (grown := figure(server, name)) - held > 100:
        assert time.monotonic() < deadline
        held = grown
        time.sleep(1)
    return held


@pytest.mark.parametrize("native", slow_after(1, [True, False]), ids=["native", "simple"])
def test_stalled_reader_is_paused_then_cut_and_slows_nobody(live_server, native, report):
    before = [len(take(live_server, SENTENCES[0], seed=seed)) for seed in range(3)]
    stalled = RawClient(live_server, receive_buffer=4096)
    start, num_lines = time.monotonic(), len(live_server.err)
    if native:
        stalled.send(type="hello", protocol=1, audio={"encoding": "pcm_f32le", "sample_rate": 48_000})
        stalled.send(type="speak", context_id="a", text=LONG_TEXT, **WILD)
    else:
        stalled.send(**LONG)
    held, kernel, after = 0, 0, []
    # On a slow machine its buffers fill slowly, and the server gives up waiting for a pong first.
    while not any(re.search(CUT, line) for line in live_server.err[num_lines:]):
        assert time.monotonic() - start < 240
        if len(after) < len(before):
            after.append(len(take(live_server, SENTENCES[0], seed=len(after))))
        held = max(held, figure(live_server, "unsent_bytes"))
        kernel = max(kernel, unsent_in_kernel(live_server))
        time.sleep(0.05)
    elapsed_s = time.monotonic() - start
    report(f"stalled reader: {held:.0f} bytes held, {kernel} in the kernel, cut after {elapsed_s:.1f} s")
    assert after == before[: len(after)] != []  # a slow machine has no time for more
    assert elapsed_s > 9
    assert held > 65_536
    assert held + kernel <= 500_000
    live_server.wait_until_idle()
    wait_for_figure(live_server, "unsent_bytes", lambda value: value == 0)
    stalled.hang_up()


@pytest.mark.slow
def test_a_paused_reader_hears_everything(live_server):
    b = take(live_server, SENTENCES[0], seed=5)
    slow = DirectSocket(live_server, receive_buffer=4096)
    with NativeClient(live_server, "pcm_f32le", 48_000, slow) as client:
        client.speak("a", LONG_TEXT, **WILD)
        wait_for_figure(live_server, "unsent_bytes", lambda value: value > 131_072)
        held = still_figure(live_server, "unsent_bytes")  # generation would go on for 2.5 MB
        assert held < 500_000
        client.speak("b", SENTENCES[0], seed=5)
        client.send(End("b"))
        while len(client.heard.get("a", Heard()).audio) < 2 * (held + 131_072):  # it goes on
            client.receive()
        client.send(Cancel("a"))
        client.hear("a")
        np.testing.assert_allclose(
            client.array(client.hear("b")), soxr.resample(b, 24_000, 48_000), atol=1e-4
        )


@pytest.mark.parametrize("leave", [RawClient.reset, RawClient.hang_up])
def test_lost_client_frees_its_slot(live_server, leave):
    client, num_lines = RawClient(live_server), len(live_server.err)
    client.send(type="hello", protocol=1)
    client.send(type="speak", context_id="a", text=LONG_TEXT, **WILD)
    deadline = time.monotonic() + 30
    while not live_server.ready()["active"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    leave(client)
    assert live_server.frames_of_cancelled_turn(num_lines) < SOON
    live_server.wait_until_idle()


# --- operations -------------------------------------------------------------------------------------


def test_contexts_are_logged_and_counted_without_their_text(live_server):
    num_lines, stops = len(live_server.err), 'turns_total{finish_reason="stop"}'
    before = figure(live_server, stops)
    with NativeClient(live_server) as client:
        client.speak("private-name", "Hello there. ", seed=99)
        client.send(Flush("private-name"))
        client.speak("private-name", "Secret!")
        client.send(End("private-name"))
        client.hear("private-name")
        client.speak("bad", "Hello", voice="private-voice")
        client.hear("bad")
    assert live_server.wait_for_line(
        r"turn \S+: stop, chars 20, voice default, seed 99, ttfc \d+ ms, rtf \S+, frames \d+",
        after=num_lines,
    )
    assert live_server.wait_for_line(r"turn \S+: error, chars 5", after=num_lines)
    assert figure(live_server, stops) == before + 1
    said = "".join(live_server.err[num_lines:])
    assert "private" not in said
    assert "Secret" not in said


def test_cancel_stops_the_decoder_soon(live_server):
    """At the next frame after the server has read it (tests/test_engine.py)."""
    frames = []
    for _ in range(5):
        num_lines = len(live_server.err)
        with NativeClient(live_server) as client:
            client.speak("a", LONG_TEXT, **WILD)
            client.wait_for(AudioChunk, "a")
            client.send(Cancel("a"))
            client.hear("a")
        line = live_server.wait_for_line(r"cancelled.*frames (\d+)", after=num_lines)
        frames.append(int(line[1]))
    assert max(frames) < SOON


@pytest.fixture
def narrow_server(tiny_base):
    """One slot, so that turns wait; it ends with the test."""
    options = ("--num-slots", "1", "--max-connections", "100", "--drain-s", "1.5")
    server = LiveServer("--model", str(tiny_base), *options)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.mark.slow
def test_overload_and_drain(narrow_server):
    clients = [NativeClient(narrow_server) for _ in range(20)]
    clients[0].speak("a", LONG_TEXT, **WILD)
    clients[0].send(End("a"))
    clients[0].speak("b", "Never spoken.")
    clients[0].wait_for(Started, "a")
    for client in clients[1:]:
        client.speak("a", LONG_TEXT, **WILD)
    while narrow_server.ready()["waiting"] < 1:
        time.sleep(0.02)
    time.sleep(0.5)
    num_waiting = narrow_server.ready()["waiting"]
    assert 1 <= num_waiting < 15
    for client in clients[1 + num_waiting :]:  # in the order of their turns
        heard = client.hear("a")
        assert [type(message) for message in heard.messages[-2:]] == [Error, Done]
        assert (heard.of(Error)[0].code, heard.done.finish_reason) == ("overloaded", "error")
        assert heard.of(Error)[0].retry_after_s >= 1
    for client in clients[1 : 1 + num_waiting]:
        client.send(Cancel("a"))
        client.hear("a")
    clients[1].speak("c", "Opened.")
    while narrow_server.ready()["waiting"] != 1:  # cancelled turns no longer count
        time.sleep(0.02)
    narrow_server.process.send_signal(signal.SIGTERM)
    narrow_server.wait_for_line("draining")
    heard = clients[0].hear("b")  # had not begun
    assert (heard.of(Error)[0].code, heard.done.finish_reason) == ("overloaded", "error")
    assert clients[0].hear("a").done.finish_reason == "cancelled"  # had begun, but goes on for ever
    with pytest.raises(ConnectionClosed) as closed:
        clients[0].hear("never")
    assert closed.value.rcvd.code == 1001
    assert narrow_server.wait() == 0
    assert not [line for line in narrow_server.err if "Traceback" in line]


@pytest.mark.slow
def test_new_contexts_are_refused_while_draining(narrow_server):
    with NativeClient(narrow_server) as client:
        client.speak("a", LONG_TEXT, **WILD)
        client.wait_for(Started, "a")
        narrow_server.process.send_signal(signal.SIGTERM)
        narrow_server.wait_for_line("draining")
        client.speak("late", "Hi.")
        assert client.wait_for(Error, "late").code == "overloaded"
        assert client.hear("a").done.finish_reason == "cancelled"
        assert client.heard["late"].done is None
