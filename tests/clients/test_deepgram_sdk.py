"""Deepgram's own SDK speaks through this server. Only its URLs, key and voice are changed."""

import pytest

pytest.importorskip("deepgram", reason="make test-clients has it")

import deepgram
from deepgram.core.api_error import ApiError
from deepgram.environment import DeepgramClientEnvironment
from deepgram.speak.v1.types import SpeakV1Text
from live_server import DEMO_TOKEN, LONG, SOON
from websockets.exceptions import InvalidStatus


def make_client(demo_server, http_url, key=DEMO_TOKEN):
    environment = DeepgramClientEnvironment(
        base=http_url, production=demo_server.url, agent=demo_server.url, agent_rest=http_url
    )
    return deepgram.DeepgramClient(api_key=key, environment=environment)


@pytest.fixture
def client(demo_server, http_url):
    return make_client(demo_server, http_url)


def test_a_file_is_spoken(client):
    kinds = {"mp3": b"\xff", "linear16": b"RIFF", "opus": b"OggS", "flac": b"fLaC"}
    for encoding, magic in kinds.items():
        data = b"".join(
            client.speak.v1.audio.generate(text="Good morning.", model="slt", encoding=encoding)
        )
        assert data.startswith(magic)
        assert len(data) > 1000


def test_refusals_are_read(client, demo_server, http_url):
    with pytest.raises(ApiError) as refused:
        b"".join(client.speak.v1.audio.generate(text="Hi.", model="nobody"))
    assert (refused.value.status_code, refused.value.body["err_code"]) == (400, "UNKNOWN_VOICE")
    stranger = make_client(demo_server, http_url, "wrong")
    with pytest.raises((ApiError, InvalidStatus), match="401"), stranger.speak.v1.connect(model="slt"):
        pass


def hear(connection, last):
    audio = b""
    while True:
        message = connection.recv()
        if isinstance(message, bytes):
            audio += message
        elif message.type == last:
            return audio


def test_it_speaks_is_interrupted_and_speaks_again(client, demo_server):
    after = len(demo_server.err)
    with client.speak.v1.connect(model="slt", encoding="linear16", sample_rate=24_000) as connection:
        assert connection.recv().type == "Metadata"
        connection.send_text(SpeakV1Text(text=LONG["text"]))
        assert isinstance(connection.recv(), bytes)
        connection.send_clear()
        hear(connection, "Cleared")
        assert demo_server.frames_of_cancelled_turn(after) < SOON
        for text in ("Good ", "morning."):
            connection.send_text(SpeakV1Text(text=text))
        connection.send_flush()
        assert len(hear(connection, "Flushed")) > 24_000
        connection.send_close()
