"""A dialect needs only a translation and a route. This one is over plain HTTP, on the real engine.

`POST /pcm` takes {"text", and any of `SpeechOptions`} and streams float32 samples as they are made.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import math
import re
import socket
import time

import numpy as np
import pytest
from live_server import LONG, SOON
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.engine.capacity import Capacity
from qwen_megakernel.serving import process
from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.app import DIALECTS, App, ServerSettings
from qwen_megakernel.serving.events import ContextAudio, ContextDone, ContextFailed
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.session import MAX_UNSENT_BYTES
from qwen_megakernel.turn import RequestError

# --- the dialect ------------------------------------------------------------------------------------


def routes(sessions):
    async def speak(request):
        return Speech(sessions, await request.json())

    return [Route("/pcm", speak, methods=["POST"])]


class Speech(Response):
    """The answer to one request: a session of one context."""

    def __init__(self, sessions, fields):
        self.sessions, self.text, self.choices = sessions, fields.pop("text"), SpeechOptions(**fields)

    async def __call__(self, scope, receive, send):
        address = client_address(scope["client"])
        with self.sessions.admit(address) as session:  # when the client hangs up, this is cancelled
            try:
                session.append("speech", self.text, self.choices, ended=True)
            except RequestError as refusal:
                answer = PlainTextResponse(str(refusal), 400)
            else:
                answer = await self.answer(session)
            await answer(scope, receive, send)

    async def answer(self, session):
        events = await session.take()
        match events[0]:
            case ContextFailed(code="overloaded", message=message, retry_after_s=seconds):
                return PlainTextResponse(message, 503, {"Retry-After": str(math.ceil(seconds))})
        return StreamingResponse(self.samples(session, events), media_type="audio/pcm")

    async def samples(self, session, events=()):
        while True:
            for event in events or await session.take():
                match event:
                    case ContextAudio(samples=samples):
                        yield samples.astype("<f4").tobytes()
                    case ContextFailed(message=message):
                        raise RuntimeError(message)  # the answer breaks off
                    case ContextDone():
                        return
            events = ()


# --- a server and its clients -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tts(brief_base, recording):
    with TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch") as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        yield tts


class Stage:
    """A server in this process."""

    def __init__(self, app, tts, port):
        self.app, self.tts, self.port = app, tts, port

    def request(self, method, path, body=None):
        """Status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    async def post(self, **fields):
        return await asyncio.to_thread(self.request, "POST", "/pcm", json.dumps(fields))

    async def figure(self, name):
        _, _, page = await asyncio.to_thread(self.request, "GET", "/metrics")
        return float(re.search(rf"^qwen_megakernel_{name} (\S+)$", page.decode(), re.M)[1])

    async def open(self, **fields):
        """A client that has got its first audio, and reads on when the test lets it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop, body = asyncio.get_running_loop(), json.dumps(fields)
        await loop.sock_connect(client, ("127.0.0.1", self.port))
        headers = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
        request = f"POST /pcm HTTP/1.1\r\n{headers}\r\n\r\n{body}"
        await loop.sock_sendall(client, request.encode())
        reader, writer = await asyncio.open_connection(sock=client, limit=4096)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await reader.read(1)
        return reader, writer


async def until(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def serve(tts, script, **settings):
    """Run a script on a stage."""

    async def run():
        app = App(ServerSettings(**settings), (*DIALECTS, routes))
        app.start_serving(tts)
        listener = process.bind("127.0.0.1", 0)
        server = process._Server(process._uvicorn_config(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await script(Stage(app, tts, listener.getsockname()[1]))
        finally:
            server.should_exit = True
            await serving

    asyncio.run(run())


# --- what holds for every dialect -------------------------------------------------------------------


def test_a_text_is_spoken_and_accounted_for(tts, caplog):
    async def script(stage):
        status, headers, body = await stage.post(text="Hello there.", seed=3)
        assert (status, headers["Transfer-Encoding"]) == (200, "chunked")
        whole = tts.synthesize("Hello there.", params=GenerationParams(seed=3))
        np.testing.assert_allclose(np.frombuffer(body, "<f4"), whole, atol=1e-4)
        assert await stage.figure("ttfc_seconds_count") == 1
        assert (await stage.post(text="a" * 4097))[0] == 400

    with caplog.at_level(logging.INFO, "qwen_megakernel"):
        serve(tts, script)
    assert re.search(r"turn 1-1: stop, chars 12, voice default, seed 3, ttfc \d+ ms", caplog.text)


def test_a_client_that_hangs_up_stops_its_turn_at_the_next_frame(tts, caplog):
    async def script(stage):
        _, writer = await stage.open(**LONG)
        writer.transport.abort()
        await until(lambda: not tts.num_active)
        assert await stage.figure("connections") == 0

    with caplog.at_level(logging.INFO, "qwen_megakernel"):
        serve(tts, script)
    frames = int(re.search(r"turn 1-1: cancelled, .* frames (\d+)", caplog.text)[1])
    assert frames < SOON  # those of the time that the news took


def test_a_client_that_does_not_read_holds_the_engine(tts):
    async def script(stage):
        reader, writer = await stage.open(**LONG)
        (active,) = tts._engine._speaking
        await until(lambda: active.turn.held)
        frames = active.num_fed
        assert await stage.figure("unsent_bytes") >= MAX_UNSENT_BYTES
        await asyncio.sleep(0.5)
        assert active.num_fed <= frames + 1
        while active.turn.held:  # it reads on, and so the engine goes on
            await reader.read(65_536)
        await until(lambda: active.num_fed > frames + 1)
        writer.transport.abort()
        await until(lambda: not tts.num_active)

    serve(tts, script)


def test_a_drain_ends_what_goes_on_and_lets_nobody_in(tts):
    async def script(stage):
        reader, _ = await stage.open(**LONG)
        draining = asyncio.create_task(stage.app.drain())
        await asyncio.sleep(0)
        status, headers, body = await stage.post(text="Too late.")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert json.loads(body) == {"error": "not ready: draining"}
        assert (await reader.read()).endswith(b"\r\n0\r\n\r\n")  # in good order
        await draining
        await until(lambda: not tts.num_active)

    serve(tts, script, drain_s=0.2)


@pytest.mark.parametrize("trusted", [True, False])
def test_clients_of_one_address_share_its_connections(tts, trusted):
    async def script(stage):
        def join(address):
            headers = {"X-Forwarded-For": address}
            return connect(f"ws://127.0.0.1:{stage.port}", additional_headers=headers)

        def share():
            with join("203.0.113.7"), join("203.0.113.8"):
                if trusted:
                    with pytest.raises(InvalidStatus) as refused:
                        join("203.0.113.7")
                    response = refused.value.response
                    assert (response.status_code, response.headers["Retry-After"]) == (429, "5")
                    assert json.loads(response.body)["error"] == "this address has 1 connections already"
                else:  # a client may claim what it likes, and this machine is not counted
                    with join("203.0.113.7"):
                        pass

        await asyncio.to_thread(share)  # also the end of a connection waits for the server

    proxies = ("127.0.0.1",) if trusted else ()
    serve(tts, script, max_connections_per_address=1, trusted_proxies=proxies)


def test_a_socket_on_which_nothing_is_said_is_closed(tts, caplog):
    async def script(stage):
        def listen():
            with connect(f"ws://127.0.0.1:{stage.port}") as client:
                with pytest.raises(ConnectionClosed) as closed:
                    client.recv(timeout=60)
                return closed.value.rcvd.code

        assert await asyncio.to_thread(listen) == 1001
        assert await stage.figure("connections") == 0

    with caplog.at_level(logging.INFO, "qwen_megakernel"):
        serve(tts, script, idle_s=0.3)
    assert "connection 1: idle for 0.3 s, closed" in caplog.text


def test_what_a_client_that_has_left_still_had_to_say_is_not_read(tts):
    async def script(stage):
        def flood():
            with connect(f"ws://127.0.0.1:{stage.port}") as client:
                for _ in range(400):
                    client.send("{}")
                client.socket.shutdown(socket.SHUT_RDWR)

        await asyncio.to_thread(flood)
        for _ in range(200):  # at ten messages a second the rest would take 38 s
            if not await stage.figure("connections"):
                return
            await asyncio.sleep(0.05)
        pytest.fail("the session is still there")

    serve(tts, script, max_messages_per_s=10)


def test_a_full_engine_is_a_status_with_the_time_to_come_back(tts, monkeypatch):
    async def script(stage):
        monkeypatch.setattr(tts, "capacity", lambda owner: Capacity(4, 0, 23, 2.0))
        status, headers, body = await stage.post(text="One too many.")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert body == b"a turn would wait 12.0 s for a slot, and may wait 10 s"
        monkeypatch.undo()
        assert (await stage.post(text="Room again.", seed=1))[0] == 200

    serve(tts, script)


def test_its_clients_count(tts):
    async def script(stage):
        _, writer = await stage.open(**LONG)
        assert await stage.figure("connections") == 1
        status, headers, body = await stage.post(text="One too many.")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert json.loads(body) == {"error": "all 1 connections are taken"}
        with pytest.raises(InvalidStatus, match="503"):
            await asyncio.to_thread(connect, f"ws://127.0.0.1:{stage.port}")
        writer.transport.abort()
        await until(lambda: not tts.num_active)
        assert (await stage.post(text="Room again.", seed=1))[0] == 200

    serve(tts, script, max_connections=1)
