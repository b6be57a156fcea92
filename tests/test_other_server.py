"""The application under plain uvicorn, which hands no transport over, as Ray Serve does not."""

import asyncio
import contextlib
import json

import pytest
import uvicorn
from live_server import LONG
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedOK, InvalidStatus

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.serving import process
from qwen_megakernel.serving.app import App, ServerSettings

TEXT = {"text": "Hello there.", "seed": 3}


@pytest.fixture(scope="module")
def tts(brief_base, recording):
    with TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch") as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        yield tts


@contextlib.asynccontextmanager
async def plain_uvicorn(tts, **settings):
    """The app, and the URL of its WebSocket."""
    app = App(ServerSettings(**settings))
    app.start_serving(tts)
    listener = process.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app.asgi, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield app, f"ws://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def speak(client):
    """Bytes of audio, and the last message."""
    await client.send(json.dumps(TEXT))
    audio = 0
    while isinstance(message := await client.recv(), bytes):
        audio += len(message)
    return audio, json.loads(message)


def run(script):
    asyncio.run(asyncio.wait_for(script(), 60))


def test_a_turn_is_spoken(tts):
    async def script():
        async with plain_uvicorn(tts) as (_, url), connect(url, compression=None) as client:
            audio, end = await speak(client)
            assert end["finish_reason"] == "stop"
            whole = tts.synthesize(TEXT["text"], params=GenerationParams(seed=TEXT["seed"]))
            assert audio == 4 * len(whole) > 0

    run(script)


def test_a_full_one_refuses_the_handshake(tts):
    async def script():
        async with plain_uvicorn(tts, max_connections=1) as (_, url), connect(url):
            with pytest.raises(InvalidStatus) as refused:
                await connect(url)
            response = refused.value.response
            assert (response.status_code, response.headers["Retry-After"]) == (503, "5")

    run(script)


def test_a_drain_closes_sockets(tts):
    async def script():
        async with plain_uvicorn(tts) as (app, url), connect(url) as client:
            await speak(client)
            await app.drain()
            with pytest.raises(ConnectionClosedOK) as closed:
                await client.recv()
            assert closed.value.rcvd.code == 1001

    run(script)


def test_load_is_the_share_of_connections_or_of_slots(tts):
    async def script():
        async with (
            plain_uvicorn(tts, max_connections=8) as (app, url),
            contextlib.AsyncExitStack() as stack,
        ):
            assert app.load == 0
            client = await stack.enter_async_context(connect(url))
            await stack.enter_async_context(connect(url))
            assert app.load == 2 / 8
            # One of four slots is no more than that; of two turns it is.
            await client.send(json.dumps(LONG))
            await client.recv()
            assert app.load == 2 / 8
            other = await stack.enter_async_context(connect(url))
            await other.send(json.dumps(LONG))
            await other.recv()
            assert app.load == 2 / 4

    run(script)
