"""Cancels in the native protocol: acknowledged within a frame or two, and no stale audio follows."""

import asyncio
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
from native_client import LONG_TEXT, SENTENCES, WILD, DirectSocket, NativeClient, assert_healthy, take
from session_stage import Stage, run_at_once

from qwen_megakernel.config import HOP
from qwen_megakernel.serving.connection import Connection
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    End,
    Flush,
    Hello,
    Speak,
    Started,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.process import bind

LATE = 4
"""Frames: one on its way to the client, one that was being made, and two where the cores are busy."""


def test_cancel_of_a_queued_context_leaves_the_speaking_one(live_server):
    alone = take(live_server, SENTENCES[2], seed=4)
    with NativeClient(live_server, "pcm_f32le") as client:
        client.speak("a", SENTENCES[2], seed=4)
        client.send(End("a"))
        client.speak("b", SENTENCES[0])
        client.send(Cancel("b"))
        assert client.hear("b").done.finish_reason == "cancelled"
        assert client.heard["b"].done.samples == 0
        np.testing.assert_allclose(client.array(client.hear("a")), alone, atol=1e-4)


def test_cancel_of_all(live_server):
    with NativeClient(live_server) as client:
        client.send(Cancel())  # nothing is open: nothing is answered
        for name in "abc":
            client.speak(name, LONG_TEXT, **WILD)
        client.wait_for(Started, "a")
        client.send(Cancel())
        assert [client.hear(name).done.finish_reason for name in "abc"] == ["cancelled"] * 3
        live_server.wait_until_idle()
        client.speak("d", SENTENCES[0])
        client.send(End("d"))
        assert client.hear("d").done.samples > 0


def cancel_at_random_times(server, rounds):
    """Frames that each context still sent between its cancel and the acknowledgement."""
    late = []
    chance = np.random.default_rng(3)
    with NativeClient(server, socket=DirectSocket(server), checked=False) as client:
        for number in range(rounds):
            name = f"c{number}"
            client.speak(name, LONG_TEXT, **WILD, chunk_frames=1)
            if chance.random() < 0.7:
                client.wait_for(AudioChunk, name)
            until = time.monotonic() + chance.random() * 0.06
            while (left := until - time.monotonic()) > 0:
                try:
                    client.receive(left)
                except TimeoutError:
                    break
            heard = client.heard.get(name)
            if heard and heard.done:
                continue  # one in thousands of frames gives EOS by itself
            num_bytes = len(heard.audio) if heard else 0
            client.send(Cancel(name))
            heard = client.hear(name)
            assert heard.done.finish_reason == "cancelled"  # and nothing follows: see _keep
            late.append((len(heard.audio) - num_bytes) // (2 * HOP))
        client.speak("last", SENTENCES[0])
        client.send(End("last"))
        client.hear("last")
        assert client.errors == []
    return late


class LoopbackSocket:
    """A WebSocket whose client cancels context `a` while `started` is being sent to it."""

    application_state = None

    def __init__(self):
        transport = SimpleNamespace(
            get_write_buffer_size=lambda: 0, is_closing=lambda: False, abort=lambda: None
        )
        self.scope = {"extensions": {"transport": {"is": transport}}}
        self.said, self.heard = asyncio.Queue(), []

    def say(self, message):
        self.said.put_nowait({"type": "websocket.receive", "text": encode(message)})

    async def accept(self):
        pass

    async def receive(self):
        return await self.said.get()

    async def send_text(self, data):
        self.heard.append(parse_server_message(data))
        if isinstance(self.heard[-1], Started):
            self.say(Cancel("a"))
            await asyncio.sleep(0.02)

    send_bytes = send_text


def test_a_cancel_between_two_messages_leaves_the_counts_true():
    async def talk():
        stage, socket = Stage(), LoopbackSocket()
        connection = Connection(socket, stage.session, NativeDialect(stage.session))
        running = asyncio.ensure_future(connection.run())
        for message in (Hello(), Speak("a", "Word."), Flush("a")):
            socket.say(message)
        await asyncio.sleep(0.02)
        for _ in range(2):
            stage.turns[0].speak()
        await asyncio.sleep(0.1)
        socket.said.put_nowait({"type": "websocket.disconnect"})
        await running
        return socket.heard

    _, *before, done = run_at_once(talk())
    # Events that were taken go out. Events that waited do not.
    assert [type(message) for message in before] == [Started, AudioChunk]
    assert (done.finish_reason, done.samples) == ("cancelled", 1920)


def test_a_cancel_behind_the_next_contexts_audio_leaves_the_counts_true():
    """All of `a` is generated and some of it was sent; then `b` speaks, and `a` is cancelled."""

    async def talk():
        stage = Stage()
        dialect = NativeDialect(stage.session)
        for message in (Hello(), Speak("a", "Word."), End("a"), Speak("b", "Word.")):
            dialect.receive(encode(message))
        stage.turns[0].speak()
        stage.turns[0].finish()
        await asyncio.sleep(0)
        stage.turns[1].speak()
        await asyncio.sleep(0)
        await stage.session.take()  # `ready`
        events = await stage.session.take()
        dialect.receive(encode(Cancel("a")))
        events += await stage.events()
        return [parse_server_message(data) for event in events for data in dialect.translate(event)]

    *_, done = run_at_once(talk())
    assert (done.context_id, done.finish_reason, done.samples) == ("a", "cancelled", 1920)


def test_small_messages_are_not_held_back():
    """Nagle's algorithm would hold it back: with delayed ACKs that costs 40 ms."""

    async def has_nodelay():
        listener, accepted = bind("127.0.0.1", 0), asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
        async with server:
            _, client = await asyncio.open_connection(*listener.getsockname())
            writer = await accepted
            option = socket.IPPROTO_TCP, socket.TCP_NODELAY
            result = writer.get_extra_info("socket").getsockopt(*option)
            client.close()
            writer.close()
            return result

    assert asyncio.run(has_nodelay())


@pytest.mark.slow
def test_100_cancels_at_random_times(live_server):
    late = cancel_at_random_times(live_server, 100)
    assert np.median(late) <= LATE
    assert_healthy(live_server)


@pytest.mark.slow
def test_1000_cancels_at_random_times(live_server):
    assert np.median(cancel_at_random_times(live_server, 1000)) <= LATE
    assert_healthy(live_server)
