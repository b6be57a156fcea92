"""Cartesia's speech API: messages as data, the dialect on a session, and a real server."""

import asyncio
import base64
import http.client
import io
import json
from itertools import chain

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import DEMO_TOKEN, LONG, SOON
from session_stage import Stage, run_at_once
from slow_cases import slow_after
from websockets.exceptions import InvalidStatus

from qwen_megakernel.serving.cartesia import RULES, CartesiaDialect
from qwen_megakernel.serving.cartesia_messages import (
    Cancel,
    Generate,
    OutputFormat,
    error_body,
    parse_bytes,
    parse_message,
    voice_page,
)
from qwen_megakernel.serving.events import Reply
from qwen_megakernel.serving.wire import ProtocolError, SpeechError
from qwen_megakernel.serving.word_timing import Pace

SOCKET = "/tts/websocket"
OUTPUT = {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 24_000}
REQUEST = {
    "model_id": "sonic-3",
    "transcript": "Hi.",
    "voice": {"mode": "id", "id": "slt"},
    "output_format": OUTPUT,
}


def parse(**fields):
    return parse_message(json.dumps(REQUEST | {"context_id": "a"} | fields))


# --- messages as data -------------------------------------------------------------------------------


def test_what_is_left_out_has_cartesias_defaults():
    assert parse_message('{"transcript": "Hi."}') == Generate(
        context_id=None, text="Hi.", more=False, flush=False, unbuffered=False, voice=None,
        language=None, seed=None, output=OutputFormat(), timestamps=False,
    )  # fmt: skip


def test_every_field_is_read():
    message = parse(
        transcript="",
        voice="slt",
        language="de-CH",
        output_format={"container": "raw", "encoding": "pcm_mulaw", "sample_rate": 8000},
        add_timestamps=True,
        use_normalized_timestamps=False,
        max_buffer_delay_ms=0,
        flush=True,
        seed=7,
        speed="normal",
        generation_config={"speed": 1, "volume": 1.0, "emotion": "neutral"},
        unknown=[1],
        **{"continue": True},
    )
    assert message == Generate(
        context_id="a", text="", more=True, flush=True, unbuffered=True, voice="slt",
        language="german", seed=7, output=OutputFormat("raw", "pcm_mulaw", 8000), timestamps=True,
    )  # fmt: skip
    assert parse_message('{"context_id": "a", "cancel": true}') == Cancel("a")


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"transcript": None}, "bad_request", "transcript"),
        ({"context_id": ""}, "bad_request", "256"),
        ({"context_id": 7}, "bad_request", "context_id"),
        ({"voice": {"mode": "embedding", "embedding": [1.0]}}, "unsupported", "mode id"),
        ({"voice": 3}, "bad_request", "voice"),
        ({"output_format": {"container": "wav"}}, "unsupported", "raw"),
        ({"output_format": {"container": "ogg"}}, "unsupported", "raw, wav, mp3"),
        ({"output_format": OUTPUT | {"encoding": "pcm_s24le"}}, "unsupported", "pcm_mulaw"),
        ({"output_format": OUTPUT | {"sample_rate": 12_000}}, "unsupported", "22050"),
        ({"output_format": "raw"}, "bad_request", "output_format"),
        ({"speed": "fast"}, "unsupported", "speed"),
        ({"generation_config": {"speed": 1.2}}, "unsupported", "speed"),
        ({"generation_config": {"volume": 2}}, "unsupported", "volume"),
        ({"generation_config": {"emotion": "angry"}}, "unsupported", "emotion"),
        ({"pronunciation_dict_id": "x"}, "unsupported", "pronunciation_dict_id"),
        ({"add_phoneme_timestamps": True}, "unsupported", "add_phoneme_timestamps"),
        ({"max_buffer_delay_ms": 5001}, "bad_request", "max_buffer_delay_ms"),
        ({"continue": "yes"}, "bad_request", "continue"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, code, says):
    with pytest.raises(ProtocolError, match=says) as refused:
        parse(**fields)
    assert refused.value.code == code
    assert refused.value.context_id == ("a" if "context_id" not in fields else None)


def test_a_file_may_have_a_container():
    output = {"container": "mp3", "sample_rate": 44_100, "bit_rate": 128_000}
    asked = parse_bytes(json.dumps(REQUEST | {"output_format": output}).encode())
    assert asked.output == OutputFormat("mp3", "mp3", 44_100, 128_000)
    for body in (b"\xff", b"[]", b'{"transcript": " "}', b"{}"):
        with pytest.raises(SpeechError) as refused:
            parse_bytes(body)
        assert error_body(400, "No.", refused.value.code)["error_code"] == "bad_request"


def test_pages_of_voices_end():
    names = [f"voice{number:03}" for number in range(250)]
    found, query = [], {}
    while page := voice_page(names, query)["data"]:
        found += [voice["id"] for voice in page]
        query = {"starting_after": found[-1]}
    assert found == names
    assert [v["id"] for v in voice_page(names, {"q": "E24", "limit": "2"})["data"]] == names[240:242]
    assert [v["id"] for v in voice_page(names, {"ending_before": "voice002", "limit": "1"})["data"]] == [
        "voice001"
    ]
    with pytest.raises(SpeechError):
        voice_page(names, {"limit": "0"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "context_id", "transcript", "continue", "flush", "cancel", "voice", "language", "output_format",
    "add_timestamps", "max_buffer_delay_ms", "seed", "speed", "generation_config",
)  # fmt: skip
VALUES = JSON | st.sampled_from([True, False, "a", "Hi.", "pcm_mulaw", OUTPUT, REQUEST["voice"], 8000])
MESSAGES = (
    st.text(max_size=100)
    | st.binary(max_size=100)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8).map(json.dumps)
)


@given(
    st.binary(max_size=100)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8).map(lambda f: json.dumps(f).encode())
)
@settings(max_examples=200, deadline=None)
def test_any_body_is_a_request_or_an_error_with_a_code(body):
    try:
        asked = parse_bytes(body)
    except SpeechError as refused:
        answer = error_body(refused.status, str(refused), refused.code)
    else:
        assert asked.text.strip()
        return
    assert answer["error_code"]
    assert answer["message"]
    json.dumps(answer).encode()


# --- the dialect on a session -----------------------------------------------------------------------


class Talk:
    """The dialect on a fake session, and the messages that it has sent."""

    def __init__(self, **limits):
        self.stage = Stage(RULES, max_messages_per_s=500.0, **limits)
        self.dialect = CartesiaDialect(self.stage.session, lambda voice: Pace())

    def say(self, context_id="a", text="", **fields):
        more = {"continue": fields.pop("more", False)}
        message = REQUEST | {"context_id": context_id, "transcript": text, "voice": "anna"}
        self.dialect.receive(json.dumps(message | more | fields))

    async def heard(self):
        """Messages, without the audio's bytes."""
        lines = []
        for event in await self.stage.events():
            said = [event.message] if isinstance(event, Reply) else self.dialect.translate(event)
            lines += map(json.loads, said)
        return lines


def kinds(lines):
    return [(line["type"], line["context_id"]) for line in lines]


def test_flushes_are_answered_behind_their_audio():
    async def script():
        talk = Talk()
        talk.say(text="One.", more=True, flush=True)
        talk.say(text="Two.", more=True)
        talk.say(more=True, flush=True)
        talk.say(more=True, flush=True)  # nothing to say since
        talk.say(text="Three.")
        for number, turn in enumerate(talk.stage.turns):  # grows meanwhile
            turn.speak(1920 * (number + 1))
            turn.finish()
            await asyncio.sleep(0)
        lines = await talk.heard()
        assert [
            (line["type"], line.get("flush_id"), len(line.get("data", "")) * 3 // 4) for line in lines
        ] == [
            ("chunk", 1, 3840), ("flush_done", 1, 0), ("chunk", 2, 7680), ("flush_done", 2, 0),
            ("flush_done", 3, 0), ("chunk", 4, 11520), ("done", None, 0),
        ]  # fmt: skip
        assert [turn.text for turn in talk.stage.turns] == ["One.", "Two.", "Three."]

    run_at_once(script())


def test_a_flush_after_an_early_end_is_answered_at_once():
    async def script():
        talk = Talk()
        talk.say(text="One two ", more=True)
        talk.stage.turns[0].speak()
        talk.stage.turns[0].finish()
        assert kinds(await talk.heard()) == [("chunk", "a")]
        talk.say(text="three.", more=True, flush=True)  # not spoken: the model has ended it
        assert kinds(await talk.heard()) == [("flush_done", "a")]
        talk.say(text="Four.")
        talk.stage.turns[1].finish()
        assert kinds(await talk.heard()) == [("done", "a")]
        assert talk.stage.turns[1].text == "Four."

    run_at_once(script())


def test_without_buffering_a_sentence_is_complete():
    async def script():
        talk = Talk()
        talk.say(text="It is late. ", more=True, max_buffer_delay_ms=0)
        assert talk.stage.turns[0].ended
        talk.say("b", text="It is", more=True, max_buffer_delay_ms=0)
        talk.say("c", text="It is late. ", more=True)
        assert [turn.ended for turn in talk.stage.turns[1:]] == [False, False]
        talk.say("c")
        assert talk.stage.turns[2].ended

    run_at_once(script())


def test_a_cancel_is_answered_at_once_and_its_id_may_be_used_again():
    async def script():
        talk = Talk()
        talk.say(text="Hello there", more=True)
        talk.stage.turns[0].speak()
        talk.dialect.receive('{"context_id": "a", "cancel": true}')
        talk.dialect.receive('{"context_id": "a", "cancel": true}')  # nothing to stop: no answer
        talk.dialect.receive('{"context_id": "nobody", "cancel": true}')
        talk.say(text="Again.")
        talk.stage.turns[0].speak()
        talk.stage.turns[1].speak()
        talk.stage.turns[1].finish()
        assert talk.stage.turns[0].cancelled
        lines = await talk.heard()
        assert [line["type"] for line in lines] == ["done", "chunk", "done"]

    run_at_once(script())


def test_a_context_keeps_its_voice():
    async def script():
        talk = Talk()
        talk.say(text="One. ", more=True, flush=True, voice="bob", seed=7)
        talk.say(voice="6ccbfb76-1fc6-48f7-b71d-91ac6298247b", more=True)  # Cartesia's SDK says so
        talk.say(text="Two.", voice="anna")
        talk.stage.turns[0].finish()
        await asyncio.sleep(0)
        talk.stage.turns[1].finish()
        assert [turn.options["voice"] for turn in talk.stage.turns] == ["bob", "bob"]
        assert [turn.options["params"].seed for turn in talk.stage.turns] == [7, 8]
        assert kinds(await talk.heard())[-1] == ("done", "a")

    run_at_once(script())


def test_words_have_times_as_their_audio_comes():
    async def script():
        talk = Talk()
        talk.say(text="Hello there, my friend. ", more=True, add_timestamps=True, flush=True)
        turn = talk.stage.turns[0]
        for _ in range(10):
            turn.speak(2400, level=0.5)
        turn.finish()
        await asyncio.sleep(0)
        lines = await talk.heard()
        times = [line["word_timestamps"] for line in lines if line["type"] == "timestamps"]
        assert len(times) >= 2
        words, starts, ends = (
            list(chain.from_iterable(each[name] for each in times)) for name in ("words", "start", "end")
        )
        assert words == ["Hello", "there,", "my", "friend."]
        assert starts == sorted(starts)
        assert all(0 <= start < end for start, end in zip(starts, ends, strict=True))
        assert starts[-1] < 1.0

    run_at_once(script())


@pytest.mark.parametrize(
    ("fields", "code", "done"),
    [
        ({"voice": "nobody"}, "unknown_voice", True),
        ({"language": "klingon"}, "unknown_language", True),
        ({"transcript": "a" * 21}, "text_too_long", True),
        ({"output_format": {"sample_rate": 1}}, "unsupported", True),
    ],
)
def test_a_context_that_cannot_be_spoken_is_over(fields, code, done):
    async def script():
        talk = Talk(max_text_chars=20)
        talk.say(**({"text": fields.pop("transcript", "Hi.")} | fields))
        (line,) = await talk.heard()
        assert (line["type"], line["context_id"], line["error_code"]) == ("error", "a", code)
        assert (line["done"], line["status_code"]) == (done, 400)
        talk.say(text="Hi.")
        talk.stage.turns[-1].finish()
        assert kinds(await talk.heard()) == [("done", "a")]

    run_at_once(script())


def test_a_context_that_is_open_outlives_a_refused_message():
    async def script():
        talk = Talk(max_text_chars=20)
        talk.say(text="Hi.", more=True)
        talk.say(text="a" * 18, more=True)
        talk.say(text="Ho.", speed="fast")
        talk.dialect.receive(b"\0")
        assert [(line["context_id"], line["done"]) for line in await talk.heard()] == [
            ("a", False), ("a", False), (None, True),
        ]  # fmt: skip
        talk.say(text=" Ho.")
        assert talk.stage.turns[0].text == "Hi. Ho."

    run_at_once(script())


@given(st.lists(MESSAGES, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_messages_get_answers_with_codes(messages):
    async def script():
        talk = Talk()
        for message in messages:
            talk.dialect.receive(message)
        for turn in talk.stage.turns:
            turn.speak()
            turn.finish()
        for event in list(talk.stage.session._outbox._entries):
            if isinstance(event, Reply):
                line = json.loads(event.message)
                assert {"type", "context_id", "done", "status_code"} <= line.keys()
                assert line["type"] != "error" or (line["error_code"] and line["message"])
        talk.stage.session.close()

    run_at_once(script())


# --- a real server ----------------------------------------------------------------------------------


@pytest.fixture
def client(demo_server):
    with demo_server.connect(f"{SOCKET}?api_key={DEMO_TOKEN}&cartesia_version=2026-03-01") as client:
        yield client


def speak(client, context_id, text="Good morning.", **fields):
    client.send(json.dumps(REQUEST | {"context_id": context_id, "transcript": text, "seed": 3} | fields))


def hear(client, *context_ids):
    """Messages until all of these contexts are done."""
    lines, left = [], set(context_ids)
    while left:
        lines.append(json.loads(client.recv(timeout=240)))
        if lines[-1]["done"]:
            left.discard(lines[-1]["context_id"])
    return lines


def pcm(lines, context_id):
    return b"".join(
        base64.b64decode(line["data"])
        for line in lines
        if line["type"] == "chunk" and line["context_id"] == context_id
    )


def ask(server, method, path, body=None, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    try:
        body = body if body is None else json.dumps(body)
        connection.request(method, path, body, {"X-API-Key": DEMO_TOKEN} | headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_a_text_is_the_same_as_a_whole_in_pieces_and_as_a_file(demo_server, client):
    speak(client, "whole")
    whole = pcm(hear(client, "whole"), "whole")
    for piece in ("Good ", "morn", "ing."):
        speak(client, "pieces", piece, **{"continue": True})
    speak(client, "pieces", "")
    assert pcm(hear(client, "pieces"), "pieces") == whole
    assert len(whole) > 24_000
    body = REQUEST | {"transcript": "Good morning.", "seed": 3}
    status, headers, data = ask(demo_server, "POST", "/tts/bytes", body)
    assert (status, headers["Content-Type"], data) == (200, "audio/pcm", whole)
    wav = {"container": "wav", "encoding": "pcm_alaw", "sample_rate": 8000}
    status, headers, data = ask(demo_server, "POST", "/tts/bytes", body | {"output_format": wav})
    samples, rate = soundfile.read(io.BytesIO(data))
    assert (headers["Content-Type"], rate, len(samples)) == ("audio/wav", 8000, len(whole) // 6)


@pytest.mark.parametrize(
    ("encoding", "rate", "sample_bytes"),
    slow_after(1, [("pcm_mulaw", 8000, 1), ("pcm_alaw", 16_000, 1), ("pcm_f32le", 44_100, 4)]),
)
def test_formats_are_honoured(client, encoding, rate, sample_bytes):
    speak(client, "plain")
    num_samples = len(pcm(hear(client, "plain"), "plain")) // 2
    output = {"container": "raw", "encoding": encoding, "sample_rate": rate}
    speak(client, "other", output_format=output)
    assert len(pcm(hear(client, "other"), "other")) == num_samples * rate // 24_000 * sample_bytes


def test_several_contexts_speak_at_a_time(client):
    speak(client, "open", "This goes", **{"continue": True})
    for name in ("b", "c"):
        speak(client, name)
    lines = hear(client, "b", "c")
    assert len(pcm(lines, "b")) == len(pcm(lines, "c")) > 24_000
    client.send('{"context_id": "open", "cancel": true}')
    assert hear(client, "open")[-1]["type"] == "done"


def test_a_cancel_stops_the_turn_and_nothing_stale_follows(demo_server, client):
    after = len(demo_server.err)
    speak(client, "long", LONG["text"])
    assert json.loads(client.recv(timeout=240))["type"] == "chunk"
    client.send('{"context_id": "long", "cancel": true}')
    hear(client, "long")
    speak(client, "next")
    assert {line["context_id"] for line in hear(client, "next")} == {"next"}
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    demo_server.wait_until_idle(token=DEMO_TOKEN)


def test_voices_are_listed(demo_server):
    page = json.loads(ask(demo_server, "GET", "/voices?limit=2")[2])
    assert len(page["data"]) == 2
    assert page["has_more"]
    assert json.loads(ask(demo_server, "GET", "/voices/slt")[2])["name"] == "slt"
    status, _, body = ask(demo_server, "GET", "/voices/nobody")
    assert (status, json.loads(body)["error_code"]) == (404, "not_found")
    assert ask(demo_server, "GET", "/voices?limit=x")[0] == 400


def test_refusals_are_cartesias(demo_server):
    for body, code in (
        (REQUEST | {"voice": "nobody"}, "unknown_voice"),
        (REQUEST | {"output_format": {"container": "ogg"}}, "unsupported"),
        ([], "bad_request"),
    ):
        status, _, data = ask(demo_server, "POST", "/tts/bytes", body)
        assert (status, json.loads(data)["error_code"]) == (400, code)
    for path in ("/tts/bytes", "/voices"):
        status, _, data = ask(demo_server, "GET", path, **{"X-API-Key": "wrong"})
        assert (status, json.loads(data)["error_code"]) == (401, "unauthorized")
    assert json.loads(ask(demo_server, "GET", "/tts/bytes")[2])["error_code"] == "method_not_allowed"
    with pytest.raises(InvalidStatus) as refused, demo_server.connect(f"{SOCKET}?api_key=wrong"):
        pass
    assert json.loads(refused.value.response.body)["error_code"] == "unauthorized"


def test_samples_are_speech(client):
    speak(client, "a")
    samples = np.frombuffer(pcm(hear(client, "a"), "a"), "<i2") / 32_768
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5
