"""Clients of every dialect that cancel, hang up or vanish: turns stop, and nothing is left behind."""

import asyncio
import http.client
import json
import logging
import os
import random
import re
import socket
import struct

import pytest
from live_server import LONG, SOON
from websockets.sync.client import connect

from qwen_megakernel import TTSDecoder
from qwen_megakernel.serving import process
from qwen_megakernel.serving.app import App, ServerSettings

TEXT = LONG["text"]
NUM_SLOTS = 4
SLACK = 20
"""Frames that most turns may speak while the news is on its way: client and engine share the cores."""


# --- clients -------------------------------------------------------------------------------------


def reset(sock):
    """Vanish like a crashed process: RST, no close frame."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Socket:
    """A WebSocket dialect: its messages for text and cancel, and the form of a message with audio.

    A dialect without a cancel hangs up instead.
    """

    def __init__(self, path, say, cancel, is_audio, is_end=None):
        self.path, self.say, self.cancel = path, say, cancel
        self.is_audio, self.is_end = is_audio, is_end

    def __call__(self, port, how, hear):
        client = connect(f"ws://127.0.0.1:{port}{self.path}", compression=None, max_size=None)
        for fields in self.say:
            client.send(json.dumps(fields))
        if hear:
            while not self.is_audio(client.recv(timeout=240)):
                pass
        if how == "cancel" and self.cancel is not None:
            client.send(json.dumps(self.cancel))
            while not self.is_end(client.recv(timeout=240)):
                pass
        if how == "reset":
            reset(client.socket)
        client.close()


class Request:
    """A dialect over HTTP. It has no cancel."""

    def __init__(self, path, body):
        self.path, self.body = path, json.dumps(body)

    def __call__(self, port, how, hear):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
        client.request("POST", self.path, self.body)
        if hear:
            response = client.getresponse()
            assert response.status == 200
            response.read(1)
        if how == "reset":
            reset(client.sock)
        client.close()


def is_binary(message):
    return isinstance(message, bytes)


def has_type(*types):
    return lambda message: isinstance(message, str) and json.loads(message).get("type") in types


def has_audio(message):
    return bool(json.loads(message)["audio"])


DIALECTS = {
    "native": Socket(
        "/",
        [
            {"type": "hello", "protocol": 1},
            {"type": "speak", "context_id": "a", "text": TEXT},
            {"type": "end", "context_id": "a"},
        ],
        {"type": "cancel"},
        is_binary,
        has_type("done"),
    ),
    "native, Opus": Socket(
        "/",
        [
            {"type": "hello", "protocol": 1, "audio": {"encoding": "opus"}},
            {"type": "speak", "context_id": "a", "text": TEXT},
        ],
        {"type": "cancel"},
        is_binary,
        has_type("done"),
    ),
    "simple": Socket(
        "/", [{"text": TEXT}], {"cancel": True}, is_binary, lambda message: not is_binary(message)
    ),
    "Cartesia": Socket(
        "/tts/websocket",
        [
            {"context_id": "a", "transcript": TEXT, "add_timestamps": True},
            {"context_id": "b", "transcript": TEXT, "continue": True},
            {"context_id": "b", "cancel": True},
        ],
        {"context_id": "a", "cancel": True},
        has_type("chunk"),
        lambda message: json.loads(message)["done"] and json.loads(message)["context_id"] == "a",
    ),
    "Deepgram": Socket(
        "/v1/speak?encoding=mulaw&sample_rate=8000",
        [{"type": "Speak", "text": TEXT}, {"type": "Flush"}],
        {"type": "Clear"},
        is_binary,
        has_type("Cleared"),
    ),
    "ElevenLabs": Socket(
        "/v1/text-to-speech/default/stream-input?output_format=pcm_24000",
        [{"text": " "}, {"text": TEXT}, {"text": ""}],
        None,
        has_audio,
    ),
    "ElevenLabs, contexts, mp3": Socket(
        "/v1/text-to-speech/default/multi-stream-input",
        [
            {"context_id": "a", "text": TEXT, "flush": True},
            {"context_id": "a", "close_context": True},
            {"context_id": "b", "text": TEXT},
            {"context_id": "b", "close_context": True},
        ],
        {"context_id": "a", "close_context": True},
        has_audio,
        lambda message: json.loads(message)["isFinal"] and json.loads(message)["contextId"] == "a",
    ),
    "vLLM-Omni": Socket(
        "/v1/audio/speech/stream",
        [
            {"type": "session.config", "response_format": "mp3"},
            {"type": "input.text", "text": TEXT},
            {"type": "input.done"},
        ],
        None,
        is_binary,
    ),
    "OpenAI, mp3": Request("/v1/audio/speech", {"input": TEXT}),
    "OpenAI, events": Request(
        "/v1/audio/speech", {"input": TEXT, "response_format": "pcm", "stream_format": "sse"}
    ),
    "Cartesia, file": Request("/tts/bytes", {"transcript": TEXT}),
    "Deepgram, file": Request("/v1/speak?encoding=opus", {"text": TEXT}),
    "ElevenLabs, file": Request("/v1/text-to-speech/default", {"text": TEXT}),
    "ElevenLabs, times": Request(
        "/v1/text-to-speech/default/stream/with-timestamps?output_format=pcm_24000", {"text": TEXT}
    ),
}


# --- a server in this process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tts(tiny_base, recording):
    """A decoder whose turns do not end by themselves."""
    with TTSDecoder.load(tiny_base, num_slots=NUM_SLOTS, device="cpu", backend="torch") as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        yield tts


async def until(condition, limit_s=60.0):
    for _ in range(round(limit_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("what should be idle is not")


def left_open():
    """Open descriptors, without those of the event loop's threads."""
    return len(os.listdir("/proc/self/fd"))


def leave(tts, caplog, rounds):
    """Run clients of every dialect, two at a time. Returns the frames of each stopped turn."""
    chance = random.Random(5)
    jobs = [
        (DIALECTS[name], chance.choice(["cancel", "close", "reset"]), chance.random() < 0.8)
        for _ in range(rounds)
        for name in DIALECTS
    ]

    async def script():
        app = App(ServerSettings())
        app.start_serving(tts)
        listener = process.bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = process._Server(process._uvicorn_config(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            for name in DIALECTS:  # what is loaded once, and the pool of threads
                await asyncio.to_thread(DIALECTS[name], port, "close", True)
            await until(lambda: not (tts.num_active or tts.num_waiting or len(app._sessions)))
            await asyncio.sleep(0.2)
            caplog.clear()
            before = (left_open(), len(asyncio.all_tasks()))
            for start in range(0, len(jobs), 2):
                pair = [asyncio.to_thread(job[0], port, *job[1:]) for job in jobs[start : start + 2]]
                await asyncio.gather(*pair)
            await until(lambda: not (tts.num_active or tts.num_waiting or len(app._sessions)))
            await until(lambda: (left_open(), len(asyncio.all_tasks())) <= before, 10.0)
        finally:
            server.should_exit = True
            await serving

    with caplog.at_level(logging.INFO, "qwen_megakernel"):
        asyncio.run(script())
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    # The test's own client logs a fault of its library when it resets a connection that is being read.
    assert not [each.getMessage() for each in errors if each.name != "websockets.client"]
    stops = re.findall(r"turn \S+: (\w+), .*frames (\d+)", caplog.text)
    assert {reason for reason, _ in stops} == {"cancelled"}
    return sorted(int(frames) for _, frames in stops)


def check(frames):
    assert frames[-1] < SOON
    assert frames[len(frames) // 2] <= 1 + SLACK


def test_who_leaves_stops_the_turn_and_leaves_nothing_behind(tts, caplog):
    check(leave(tts, caplog, 3))


@pytest.mark.slow
def test_a_thousand_clients_leave(tts, caplog, report):
    frames = leave(tts, caplog, -(-1000 // len(DIALECTS)))
    report(f"{len(frames)} turns were stopped, after {frames[len(frames) // 2]} frames in the median")
    check(frames)
