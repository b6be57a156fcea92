"""Cartesia's own SDK speaks through this server. Only its URLs, key and voice are changed."""

import pytest

pytest.importorskip("cartesia", reason="make test-clients has it")

import cartesia
from live_server import DEMO_TOKEN, LONG, SOON

OUTPUT = {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 24_000}


@pytest.fixture
def client(demo_server, http_url):
    with cartesia.Cartesia(
        api_key=DEMO_TOKEN, base_url=http_url, websocket_base_url=demo_server.url
    ) as client:
        yield client


def options(**more):
    return {"model_id": "sonic-3", "voice": {"id": "slt"}, "output_format": OUTPUT} | more


def test_voices_are_listed(client):
    assert {"slt", "rms"} <= {voice.id for voice in client.voices.list()}
    assert client.voices.get("slt").name == "slt"


def test_a_file_is_spoken(client):
    wav = {"container": "wav", "encoding": "pcm_s16le", "sample_rate": 44_100}
    data = client.tts.generate(transcript="Good morning.", **options(output_format=wav)).read()
    assert data[:4] + data[8:12] == b"RIFFWAVE"
    with pytest.raises(cartesia.BadRequestError) as refused:
        client.tts.generate(transcript="Hi.", **options(voice={"id": "nobody"}))
    assert refused.value.body["error_code"] == "unknown_voice"
    with pytest.raises(cartesia.AuthenticationError):
        client.copy(api_key="wrong").voices.list()


def test_it_speaks_is_interrupted_and_speaks_again(client, demo_server):
    after = len(demo_server.err)
    with client.tts.websocket_connect() as connection:
        first = connection.context(**options())
        first.push(LONG["text"])
        assert next(iter(first.receive())).type == "chunk"
        first.cancel()
        assert [event.type for event in first.receive()][-1] == "done"
        assert demo_server.frames_of_cancelled_turn(after) < SOON
        second = connection.context(**options(add_timestamps=True, language="en"))
        second.push("Stay hungry, ")
        second.push("", flush=True)
        second.push("stay foolish.")
        second.no_more_inputs()
        events = list(second.receive())
    assert {event.context_id for event in events} == {second._context_id}
    flushes = {event.flush_id for event in events if event.type == "chunk"}
    assert flushes == {1, 2}
    words = [word for e in events if e.type == "timestamps" for word in e.word_timestamps.words]
    assert words == ["Stay", "hungry,", "stay", "foolish."]
    assert sum(len(event.audio) for event in events if event.type == "chunk") > 24_000
    assert [event.type for event in events if event.type != "timestamps"][-1] == "done"


def test_several_contexts_share_a_socket(client):
    with client.tts.websocket_connect() as connection:
        contexts = [connection.context(**options()) for _ in range(3)]
        for context in contexts:
            context.push("Good morning.", seed=3)
            context.no_more_inputs()
        audio = [
            b"".join(event.audio for event in context.receive() if event.type == "chunk")
            for context in contexts
        ]
    # Beside other streams a sample may round differently, so the lengths are compared.
    assert len({len(data) for data in audio}) == 1
    assert len(audio[0]) > 24_000
