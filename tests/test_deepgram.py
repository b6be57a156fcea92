"""Deepgram's speech API: messages as data, the dialect on a session, and a real server."""

import asyncio
import http.client
import io
import json

import av
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import DEMO_TOKEN, LONG, SOON
from session_stage import Stage, run_at_once
from slow_cases import slow_after
from websockets.exceptions import ConnectionClosed, InvalidStatus

from qwen_megakernel.serving.deepgram import RULES, DeepgramDialect
from qwen_megakernel.serving.deepgram_messages import (
    ENCODINGS,
    Close,
    Flush,
    Query,
    Speak,
    error_body,
    parse_message,
    parse_query,
    parse_text,
)
from qwen_megakernel.serving.events import Reply, SessionOver
from qwen_megakernel.serving.wire import ProtocolError, SpeechError
from qwen_megakernel.turn import RequestError

PATH = "/v1/speak"
PLAIN = Query(None, "pcm_s16le", "none", 24_000, None, None, None)


# --- messages as data -------------------------------------------------------------------------------


def test_queries_have_deepgrams_defaults():
    assert parse_query({}, socket=True) == PLAIN
    assert parse_query({}, socket=False) == Query(None, "mp3", "none", 22_050, 48_000, None, None)
    found = {name: parse_query({"encoding": name}, socket=False) for name in ENCODINGS}
    assert {name: (q.container, q.sample_rate, q.bit_rate) for name, q in found.items()} == {
        "linear16": ("wav", 24_000, None),
        "mulaw": ("wav", 8_000, None),
        "alaw": ("wav", 8_000, None),
        "mp3": ("none", 22_050, 48_000),
        "opus": ("ogg", 48_000, 12_000),
        "flac": ("none", 48_000, None),
        "aac": ("none", 22_050, 48_000),
    }


def test_every_field_is_read():
    fields = {
        "model": "slt", "encoding": "mulaw", "container": "none", "sample_rate": "16000",
        "language": "de", "seed": "7", "mip_opt_out": "true", "speed": "1.0", "tag": "x",
    }  # fmt: skip
    for socket in (True, False):
        assert parse_query(fields, socket=socket) == Query(
            "slt", "pcm_mulaw", "none", 16_000, None, "german", 7
        )


@pytest.mark.parametrize(
    ("fields", "socket", "says"),
    [
        ({"encoding": "mp3"}, True, "encoding mp3 .*known: linear16, mulaw, alaw"),
        ({"encoding": "gsm"}, False, "encoding gsm .*aac"),
        ({"container": "wav"}, True, "container wav .*none"),
        ({"container": "ogg", "encoding": "linear16"}, False, "container ogg .*wav, none"),
        ({"sample_rate": "44100"}, True, "sample_rate 44100 .*8000, 16000, 24000, 32000, 48000"),
        ({"sample_rate": "24000"}, False, "sample_rate 24000 .*22050"),
        ({"sample_rate": "x"}, True, "sample_rate must be an integer"),
        ({"seed": "-1"}, True, "seed must be an integer"),
        ({"bit_rate": "64000"}, False, "bit_rate"),
        ({"speed": "1.2"}, True, "speed"),
        ({"callback": "http://localhost/"}, False, "callback"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, socket, says):
    with pytest.raises(SpeechError, match=says) as refused:
        parse_query(fields, socket=socket)
    assert refused.value.status == 400


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b'{"text": " "}', b'{"text": 7}'])
def test_a_body_without_text_is_refused(body):
    with pytest.raises(SpeechError) as refused:
        parse_text(body)
    assert error_body(400, str(refused.value), refused.value.code)["err_code"] == "BAD_REQUEST"


def test_messages():
    assert parse_message('{"type": "Speak", "text": "Hi.", "other": 1}') == Speak("Hi.")
    assert parse_message('{"type": "Flush"}') == Flush()
    assert parse_message('{"type": "Close"}') == Close()
    for data in ('{"type": "Sing"}', '{"type": "Speak"}', '{"text": "Hi."}', "[]", b"\0"):
        with pytest.raises(ProtocolError):
            parse_message(data)


TEXTS = st.text(max_size=20)
MESSAGES = (
    TEXTS
    | st.binary(max_size=50)
    | st.sampled_from(["Flush", "Clear", "Close", "Sing"]).map(lambda kind: json.dumps({"type": kind}))
    | TEXTS.map(lambda text: json.dumps({"type": "Speak", "text": text}))
)
FIELDS = st.dictionaries(
    st.sampled_from(
        ["model", "encoding", "container", "sample_rate", "bit_rate", "speed", "language", "seed"]
    ),
    TEXTS | st.sampled_from([*ENCODINGS, "none", "wav", "8000", "48000", "1"]),
)


@given(FIELDS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_query_is_one_or_an_error_with_a_code(fields, socket):
    try:
        query = parse_query(fields, socket=socket)
    except SpeechError as refused:
        answer = error_body(refused.status, str(refused), refused.code)
    else:
        assert query.sample_rate >= 8000
        return
    assert answer["err_code"]


@given(st.binary(max_size=50) | st.dictionaries(st.just("text"), TEXTS | st.integers() | st.none()))
@settings(max_examples=200, deadline=None)
def test_any_body_is_a_text_or_an_error_with_a_code(body):
    try:
        text = parse_text(body if isinstance(body, bytes) else json.dumps(body).encode())
    except SpeechError as refused:
        answer = error_body(refused.status, str(refused), refused.code)
    else:
        assert text.strip()
        return
    assert answer["err_code"]
    assert answer["err_msg"]


# --- the dialect on a session -----------------------------------------------------------------------


class Talk:
    """The dialect on a fake session, and the messages that it has sent."""

    def __init__(self, **limits):
        self.stage = Stage(RULES, max_messages_per_s=500.0, **limits)
        self.dialect = DeepgramDialect(self.stage.session, PLAIN)

    def say(self, *texts, then=None):
        for text in texts:
            self.dialect.receive(json.dumps({"type": "Speak", "text": text}))
        if then is not None:
            self.dialect.receive(json.dumps({"type": then}))

    async def heard(self):
        """Kinds of messages, bytes of audio, and the end of the session."""
        found = []
        for event in await self.stage.events():
            if isinstance(event, SessionOver):
                found.append(event.reason)
                continue
            said = [event.message] if isinstance(event, Reply) else self.dialect.translate(event)
            found += [json.loads(one)["type"] if isinstance(one, str) else len(one) for one in said]
        return found


def test_a_flush_is_answered_behind_its_audio():
    async def script():
        talk = Talk()
        talk.say("Hello ", "there. ", then="Flush")
        talk.say("Next.", then="Flush")
        talk.say(then="Flush")  # nothing to say since
        assert [turn.text for turn in talk.stage.turns] == ["Hello there. "]
        assert await talk.heard() == ["Metadata"]
        for number in range(2):
            talk.stage.turns[number].speak(1920 + number)
            talk.stage.turns[number].finish()
            await asyncio.sleep(0)
        assert await talk.heard() == [3840, "Flushed", 3842, "Flushed", "Flushed"]
        talk.say(then="Flush")
        assert await talk.heard() == ["Flushed"]

    run_at_once(script())


def test_after_a_clear_nothing_of_before_is_heard():
    async def script():
        talk = Talk()
        talk.say("Hello there. ", then="Flush")
        talk.say("Next.", then="Flush")
        talk.say("And then")
        talk.stage.turns[0].speak()
        talk.stage.turns[0].speak()
        talk.say(then="Clear")
        talk.stage.turns[0].speak()
        assert await talk.heard() == ["Metadata", "Cleared"]
        assert talk.stage.turns[0].cancelled
        talk.say("Again.", then="Flush")
        talk.stage.turns[0].finish("cancelled")
        talk.stage.turns[1].speak()
        talk.stage.turns[1].finish()
        assert talk.stage.turns[1].text == "Again."
        assert await talk.heard() == [3840, "Flushed"]

    run_at_once(script())


def test_a_close_waits_for_what_there_is_to_say():
    async def script():
        talk = Talk()
        talk.say("Bye.", then="Close")
        talk.stage.turns[0].speak()
        talk.stage.turns[0].finish()
        assert await talk.heard() == ["Metadata", 3840]
        assert await talk.heard() == ["closed"]
        talk = Talk()
        talk.say(then="Close")
        assert await talk.heard() == ["Metadata", "closed"]

    run_at_once(script())


def test_a_long_conversation_without_a_flush_goes_on():
    async def script():
        talk = Talk(max_text_chars=20)
        talk.say("Twelve chars.", "Twelve chars.", "a" * 21)
        assert await talk.heard() == ["Metadata", "Warning"]
        talk.stage.turns[0].speak()
        talk.stage.turns[0].finish()
        await asyncio.sleep(0)
        talk.say(then="Flush")
        talk.stage.turns[1].finish()
        assert await talk.heard() == [3840, "Flushed"]

    run_at_once(script())


def test_what_fails_is_told_and_flushed():
    async def script():
        talk = Talk()
        talk.stage.decoder.refusal = RequestError("overloaded", "too many turns", 2.0)
        talk.say("Hello.", then="Flush")
        assert await talk.heard() == ["Metadata", "Error", "Flushed"]
        talk.say("Hello ")
        talk.stage.decoder.refusal = None
        talk.say("there.", then="Flush")  # the failure of the first was not told yet
        assert [turn.text for turn in talk.stage.turns] == ["there."]
        talk.stage.turns.pop().finish()
        assert await talk.heard() == ["Error", "Flushed"]
        talk.say("Hello.", then="Flush")
        talk.stage.turns[0].finish("error", "it broke")
        assert await talk.heard() == ["Error", "Flushed"]

    run_at_once(script())


@given(st.lists(MESSAGES, max_size=10))
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
                assert line["type"] in ("Metadata", "Flushed", "Cleared") or line["code"]
        talk.stage.session.close()

    run_at_once(script())


# --- a real server ----------------------------------------------------------------------------------


def connect(server, query="model=slt&encoding=linear16&sample_rate=24000&seed=3", token=DEMO_TOKEN):
    return server.connect(f"{PATH}?{query}", additional_headers={"Authorization": f"Token {token}"})


def send(client, kind, **fields):
    client.send(json.dumps({"type": kind, **fields}))


def hear(client, last="Flushed"):
    """The audio, and the other messages up to the last."""
    audio, lines = b"", []
    while not lines or lines[-1]["type"] != last:
        message = client.recv(timeout=240)
        if isinstance(message, bytes):
            audio += message
        else:
            lines.append(json.loads(message))
    return audio, lines


def post(server, query, text="Good morning.", token=DEMO_TOKEN):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    try:
        headers = {"Authorization": f"Token {token}", "Content-Type": "application/json"}
        connection.request("POST", f"{PATH}?{query}", json.dumps({"text": text}), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def speech(demo_server):
    """The raw samples of `Good morning.`"""
    status, headers, data = post(
        demo_server, "model=slt&seed=3&encoding=linear16&container=none&sample_rate=24000"
    )
    assert (status, headers["Content-Type"]) == (200, "audio/pcm")
    assert headers["dg-char-count"] == "13"
    return data


def test_text_in_pieces_is_the_same_speech(demo_server, speech):
    with connect(demo_server) as client:
        for piece in ("Good ", "morn", "ing."):
            send(client, "Speak", text=piece)
        send(client, "Flush")
        audio, lines = hear(client)
        assert [line["type"] for line in lines] == ["Metadata", "Flushed"]
        assert audio == speech
        send(client, "Close")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == 1000


def test_a_page_sends_its_token_as_a_protocol(demo_server, speech):
    with demo_server.connect(f"{PATH}?model=slt&seed=3", subprotocols=["token", DEMO_TOKEN]) as client:
        assert client.subprotocol == "token"
        send(client, "Speak", text="Good morning.")
        send(client, "Flush")
        assert hear(client)[0] == speech


@pytest.mark.parametrize(
    ("encoding", "rate"), slow_after(1, [("mulaw", 8000), ("alaw", 16_000), ("linear16", 48_000)])
)
def test_formats_of_the_socket(demo_server, speech, encoding, rate):
    with connect(demo_server, f"model=slt&seed=3&encoding={encoding}&sample_rate={rate}") as client:
        send(client, "Speak", text="Good morning.")
        send(client, "Flush")
        audio, _ = hear(client)
    assert len(audio) == len(speech) // 2 * rate // 24_000 * (2 if encoding == "linear16" else 1)


@pytest.mark.parametrize("name", slow_after(2, list(ENCODINGS)))
def test_files_have_the_length_of_the_speech(demo_server, speech, name):
    status, headers, data = post(demo_server, f"model=slt&seed=3&encoding={name}")
    assert status == 200
    assert headers["Content-Type"].split(";")[0] in (
        "audio/wav", "audio/mpeg", "audio/ogg", "audio/flac", "audio/aac",
    )  # fmt: skip
    with av.open(io.BytesIO(data)) as file:
        rate = file.streams.audio[0].rate
        seconds = sum(frame.samples for frame in file.decode(audio=0)) / rate
    assert rate == parse_query({"encoding": name}, socket=False).sample_rate
    assert 0 <= seconds - len(speech) / 48_000 < 0.12
    if name in ("linear16", "mulaw", "alaw"):
        assert len(soundfile.read(io.BytesIO(data))[0]) == len(speech) // 2 * rate // 24_000


def test_a_clear_stops_the_turn_and_nothing_stale_follows(demo_server, speech):
    with connect(demo_server) as client:
        after = len(demo_server.err)
        send(client, "Speak", text=LONG["text"])
        send(client, "Flush")
        assert isinstance(client.recv(timeout=240), str)
        assert isinstance(client.recv(timeout=240), bytes)
        send(client, "Clear")
        hear(client, "Cleared")
        send(client, "Speak", text="Good morning.")
        send(client, "Flush")
        assert hear(client)[0] == speech
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    demo_server.wait_until_idle(token=DEMO_TOKEN)


@pytest.mark.parametrize(
    ("query", "token", "status", "code"),
    [
        ("encoding=mp3", DEMO_TOKEN, 400, "UNSUPPORTED"),
        ("sample_rate=11025", DEMO_TOKEN, 400, "UNSUPPORTED"),
        ("model=nobody", DEMO_TOKEN, 400, "UNKNOWN_VOICE"),
        ("language=klingon", DEMO_TOKEN, 400, "UNKNOWN_LANGUAGE"),
        ("model=slt", "wrong", 401, "INVALID_AUTH"),
    ],
)
def test_a_handshake_is_refused_by_name(demo_server, query, token, status, code):
    with pytest.raises(InvalidStatus) as refused, connect(demo_server, query, token):
        pass
    response = refused.value.response
    assert response.status_code == status
    assert json.loads(response.body)["err_code"] == code


@pytest.mark.parametrize(
    ("query", "text", "token", "status", "code"),
    [
        ("encoding=gsm", "Hi.", DEMO_TOKEN, 400, "UNSUPPORTED"),
        ("model=nobody", "Hi.", DEMO_TOKEN, 400, "UNKNOWN_VOICE"),
        ("", " ", DEMO_TOKEN, 400, "BAD_REQUEST"),
        ("", "a" * 4097, DEMO_TOKEN, 400, "TEXT_TOO_LONG"),
        ("", "Hi.", "wrong", 401, "INVALID_AUTH"),
    ],
)
def test_a_request_is_refused_by_name(demo_server, query, text, token, status, code):
    answer = post(demo_server, query, text, token)
    assert (answer[0], json.loads(answer[2])["err_code"]) == (status, code)
