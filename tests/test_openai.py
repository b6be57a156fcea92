"""OpenAI's speech API: requests as data, and a real server that OpenAI's own client speaks through."""

import base64
import contextlib
import http.client
import io
import json
import time
import wave

import av
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import SOON, LiveServer
from slow_cases import slow_after

from qwen_megakernel.serving import audio_encoding, http_speech
from qwen_megakernel.serving.openai_messages import (
    RESPONSE_FORMATS,
    VOICE_NAMES,
    SpeechRequest,
    error_body,
    find_voice,
    parse_speech,
)
from qwen_megakernel.serving.openai_speech import FORMATS
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.wire import SpeechError
from server import main

SPEECH = "/v1/audio/speech"
TOKEN = "a-secret-for-tests"
TEXT = "Good morning."


def parse(**fields):
    return parse_speech(
        json.dumps({"input": "Hi.", "model": "tts-1", "voice": "alloy"} | fields).encode()
    )


# --- requests as data -------------------------------------------------------------------------------


def test_what_openai_leaves_out_has_openais_defaults():
    assert parse() == SpeechRequest("Hi.", "alloy", None, None, None, "mp3", False)
    assert parse_speech(b'{"input": "Hi."}').voice is None


def test_a_file_is_made_as_fast_as_it_can_be():
    """The server's limit of the lead is for sockets, whose clients play what comes."""
    server = ServerState(None, None, max_lead_s=1.0)
    assert server.lead_limit_s(SessionRules()) == 1.0
    assert server.lead_limit_s(http_speech.RULES) == 3600.0


def test_every_field_is_read():
    request = parse(
        voice={"id": "anna"},
        instructions="Softly.",
        response_format="wav",
        stream_format="sse",
        speed=1.0,
        language="de",
        seed=7,
        unknown=[1],
    )
    assert request == SpeechRequest("Hi.", "anna", "Softly.", "german", 7, "wav", True, speed=1.0)


def test_null_is_absence():
    nothing = dict.fromkeys(
        ("voice", "instructions", "response_format", "stream_format", "speed", "language", "seed")
    )
    assert parse(**nothing) == SpeechRequest("Hi.", None, None, None, None, "mp3", False)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "bad_request"),
        ({"input": " \n"}, "input", "bad_request"),
        ({"input": ["a"]}, "input", "bad_request"),
        ({"input": "\ud800"}, "input", "bad_request"),
        ({"model": 1}, "model", "bad_request"),
        ({"voice": 1}, "voice", "bad_request"),
        ({"voice": {"name": "anna"}}, "voice", "bad_request"),
        ({"instructions": "a" * 1001}, "instructions", "bad_request"),
        ({"response_format": "ogg"}, "response_format", "bad_request"),
        ({"stream_format": "ws"}, "stream_format", "bad_request"),
        ({"speed": 5}, "speed", "bad_request"),
        ({"speed": True}, "speed", "bad_request"),
        ({"seed": -1}, "seed", "bad_request"),
        ({"language": 3}, "language", "bad_request"),
    ],
)
def test_a_wrong_field_is_named(fields, param, code):
    with pytest.raises(SpeechError) as refused:
        parse(**fields)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"{", b'{"input": "a", "input": "b"}', b"[" * 9999]
)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(SpeechError) as refused:
        parse_speech(body)
    assert (refused.value.status, refused.value.param) == (400, None)


def test_openais_voices_are_the_default_voice_unless_one_is_named_for_them():
    known = ("anna", "sage")
    assert [find_voice(name, {}, known) for name in ("alloy", "sage", "anna", "bob", None)] == [
        None, "sage", "anna", "bob", None,
    ]  # fmt: skip
    assert find_voice("sage", {"sage": "anna"}, known) == "anna"
    assert len(VOICE_NAMES) == 13


FIELDS = ("input", "model", "voice", "instructions", "response_format", "stream_format", "speed", "seed")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BODIES = st.binary(max_size=200) | st.dictionaries(
    st.sampled_from(FIELDS), JSON | st.sampled_from([*RESPONSE_FORMATS, "sse", "audio", 1.0]), max_size=8
).map(lambda fields: json.dumps(fields).encode())


@given(BODIES)
@settings(max_examples=200, deadline=None)
def test_any_body_is_a_request_or_an_error_with_a_code(body):
    try:
        request = parse_speech(body)
    except SpeechError as refused:
        answer = error_body(refused.status, str(refused), refused.code, refused.param)["error"]
    else:
        assert request.text.strip()
        return
    assert answer["type"] == "invalid_request_error"
    assert answer["code"]
    assert answer["message"]
    json.dumps(answer).encode()


# --- a server and OpenAI's client -------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The demonstration voice, with a token."""
    options = ["--model", "demo_voice", "--voices", "demo_voice/voices", "--token", TOKEN]
    server = LiveServer(*options, "--openai-voice", "nova=slt", "--max-text-chars", "200")
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key=TOKEN, max_retries=0
    ) as client:
        yield client


def speak(client, response_format, **fields):
    """The bytes of an audio file. The speech is always the same."""
    request = {"input": TEXT, "model": "tts-1", "voice": "alloy", "extra_body": {"seed": 3}} | fields
    return client.audio.speech.create(response_format=response_format, **request)


@pytest.fixture(scope="module")
def samples(client):
    """The number of samples in the speech."""
    return len(speak(client, "pcm").content) // 2


def num_decoded(data):
    """The number of samples that FFmpeg decodes, at 24 kHz."""
    with av.open(io.BytesIO(data)) as file:
        rate = file.streams.audio[0].rate
        return sum(frame.samples for frame in file.decode(audio=0)) * 24_000 // rate


def test_wav_is_pcm_behind_a_header(client, samples):
    pcm, wav = speak(client, "pcm").content, speak(client, "wav").content
    assert samples > 12_000
    assert wav[44:] == pcm
    assert wav[:4] + wav[8:12] == b"RIFFWAVE"
    decoded, rate = soundfile.read(io.BytesIO(wav))
    assert (len(decoded), rate) == (samples, 24_000)
    assert num_decoded(wav) == samples
    with wave.open(io.BytesIO(wav)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        assert len(file.readframes(file.getnframes())) == len(pcm)


@pytest.mark.parametrize("name", slow_after(1, ["mp3", "opus", "aac", "flac"]))
def test_compressed_speech_has_its_length(client, samples, name):
    response = speak(client, name)
    assert response.response.headers["Content-Type"] == FORMATS[name].media_type
    # MP3 and AAC add blocks of about 50 ms before and after.
    assert samples <= num_decoded(response.content) <= samples + 0.1 * 24_000


def test_mp3_is_the_default(client, samples):
    response = client.audio.speech.create(input=TEXT, model="any", voice="alloy", extra_body={"seed": 3})
    assert response.response.headers["Content-Type"] == "audio/mpeg"
    assert num_decoded(response.content) >= samples


@pytest.mark.parametrize("name", slow_after(1, ["mp3", "pcm"]))
def test_events_carry_the_same_file(client, name):
    with client.audio.speech.with_streaming_response.create(
        input=TEXT,
        model="gpt-4o-mini-tts",
        voice="alloy",
        response_format=name,
        stream_format="sse",
        extra_body={"seed": 3},
    ) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.done"
    assert set(events[-1]["usage"]) == {"input_tokens", "output_tokens", "total_tokens"}
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert audio == speak(client, name).content


def test_a_voice_of_openai_speaks_with_the_voice_that_is_named_for_it(client, server):
    for voice, name in (("nova", "slt"), ("slt", "slt"), ({"id": "slt"}, "slt")):
        after = len(server.err)
        speak(client, "pcm", voice=voice)
        server.wait_for_line(rf"turn \S+: stop, .*voice {name}", after=after)


def test_voices_and_models_are_listed(client, server):
    names = [model.id for model in client.models.list()]
    assert names[1:] == ["tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
    status, _, body = ask(server, "GET", "/v1/audio/voices")
    assert status == 200
    voices = {voice["id"]: voice for voice in json.loads(body)["voices"]}
    assert voices["slt"]["name"] == "slt"
    assert sorted(voices) == sorted(server_state(server)["voices"])


def test_refusals_are_openais(client):
    import openai

    for fields, param, code in (
        ({"voice": "nobody"}, "voice", "unknown_voice"),
        ({"extra_body": {"language": "klingon"}}, "language", "unknown_language"),
        ({"input": "a" * 201}, "input", "text_too_long"),
        ({"speed": 9}, "speed", "bad_request"),
        ({"instructions": "Softly."}, None, "unsupported"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            speak(client, "pcm", **fields)
        assert (refused.value.param, refused.value.code) == (param, code)
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError) as stranger:
        speak(client.with_options(api_key="wrong"), "pcm")
    assert stranger.value.code == "invalid_api_key"


def test_names_for_openais_voices_are_checked(tiny_base, recording, capsys):
    with pytest.raises(SystemExit):
        main(["--openai-voice", "bob=default"])
    assert "--openai-voice: expected NAME=VOICE with a NAME of alloy, " in capsys.readouterr().err
    server = LiveServer(
        *("--model", str(tiny_base), "--speaker-ref", str(recording), "--openai-voice", "nova=anna")
    )
    try:
        assert server.wait(240) == 1
        server.wait_for_line(
            "cannot load: .*--openai-voice nova=anna: the voice is unknown; known: default"
        )
    finally:
        server.kill()


def ask(server, method, path, body=None, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"} | headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def server_state(server):
    return json.loads(ask(server, "GET", "/ready")[2])


def until(server, limit_s=60.0, **figures):
    """Wait until `/ready` has these figures."""
    deadline = time.monotonic() + limit_s
    while not figures.items() <= (state := server_state(server)).items():
        assert time.monotonic() < deadline, state
        time.sleep(0.01)


def until_idle(server):
    """Wait until no turn speaks or waits, and no client is left."""
    until(server, active=0, waiting=0, connections=0)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", SPEECH, None, 405),
        ("POST", "/v1/models", "{}", 405),
        ("POST", SPEECH, "{", 400),
        ("POST", SPEECH, "a" * 70_000, 413),
    ],
)
def test_every_refusal_has_openais_shape(server, method, path, body, status):
    answer = ask(server, method, path, body)
    assert answer[0] == status
    assert set(json.loads(answer[2])["error"]) == {"message", "type", "param", "code"}


@given(BODIES.filter(lambda body: len(body) < 150))
@settings(max_examples=40, deadline=None)
def test_any_body_gets_audio_or_an_error_with_a_code(server, body):
    status, headers, answer = ask(server, "POST", SPEECH, body)
    assert status in (200, 400)
    if status == 400:
        assert json.loads(answer)["error"]["code"]
    else:
        assert headers["Content-Type"].split(";")[0] in {
            *(audio.media_type for audio in FORMATS.values()),
            "text/event-stream",
        }


def test_without_pyav_the_plain_formats_are_left(server, monkeypatch):
    monkeypatch.setattr(audio_encoding, "pyav_is_installed", lambda: False)
    assert [name for name in FORMATS if FORMATS[name].encodable] == ["wav", "pcm"]


# --- a server whose speech does not end -------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tiny_base, recording):
    """A server with one slot that trusts every client's `X-Forwarded-For`."""
    server = LiveServer(
        *("--model", str(tiny_base), "--speaker-ref", str(recording), "--token", TOKEN),
        *("--num-slots", "1", "--max-queue-s", "3600", "--trusted-proxy", "127.0.0.1"),
        *(
            "--max-turns-per-address",
            "1",
            "--max-connections-per-address",
            "2",
            "--max-connections",
            "3",
        ),
    )
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


class Listening:
    """A client that has asked for speech. It hangs up at the end of the block."""

    def __init__(self, server, address, *, hears=True, **fields):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
        headers = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": address}
        body = json.dumps({"input": TEXT, "response_format": "pcm", "seed": 0} | fields)
        self.connection.request("POST", SPEECH, body, headers)
        self.response = None
        if hears:
            self.response = self.connection.getresponse()
            assert self.response.status == 200
            self.response.read(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.response is not None:
            self.response.close()
        self.connection.close()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream_format", ["audio", "sse"])
def test_speech_is_heard_before_its_end_and_a_hang_up_stops_it(endless, name, stream_format):
    after = len(endless.err)
    with Listening(endless, "203.0.113.1", response_format=name, stream_format=stream_format):
        pass
    assert endless.frames_of_cancelled_turn(after) < SOON
    until_idle(endless)


@pytest.mark.slow
def test_hang_ups_leave_nothing_behind(endless):
    with Listening(endless, "203.0.113.1", response_format="mp3"):
        pass
    until_idle(endless)
    before = endless.num_fds()
    for number in range(30):
        name = RESPONSE_FORMATS[number % len(RESPONSE_FORMATS)]
        with Listening(endless, f"203.0.113.{number}", response_format=name):
            pass
    until_idle(endless)
    assert endless.num_fds() <= before + 1
    assert not [line for line in endless.err if "Traceback" in line]


def test_a_client_that_hangs_up_while_it_waits_is_forgotten(endless):
    with Listening(endless, "203.0.113.1"):
        with Listening(endless, "203.0.113.2", hears=False):
            until(endless, active=1, waiting=1, connections=2)
        until(endless, active=1, waiting=0, connections=1)
    until_idle(endless)


@pytest.mark.parametrize(
    ("others", "address", "status", "code"),
    [
        (["203.0.113.1"], "203.0.113.1", 503, "overloaded"),
        (["203.0.113.1", "ws 203.0.113.1"], "203.0.113.1", 429, "rate_limit_exceeded"),
        (["203.0.113.1", "ws 203.0.113.2", "ws 203.0.113.3"], "203.0.113.4", 503, None),
    ],
)
def test_a_full_server_says_when_to_come_back(endless, others, address, status, code):
    with contextlib.ExitStack() as stack:
        for other in others:
            name = other.removeprefix("ws ")
            headers = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": name}
            stack.enter_context(
                endless.connect(additional_headers=headers)
                if other != name
                else Listening(endless, name)
            )
        body = json.dumps({"input": TEXT})
        answer = ask(endless, "POST", SPEECH, body, **{"X-Forwarded-For": address})
        assert answer[0] == status
        assert int(answer[1]["Retry-After"]) >= 1
        assert json.loads(answer[2])["error"]["code"] == code
    until_idle(endless)


def test_a_drain_breaks_speech_off(tiny_base, recording):
    options = ["--model", str(tiny_base), "--speaker-ref", str(recording), "--drain-s", "0.2"]
    server = LiveServer(*options, "--token", TOKEN).wait_until_ready()
    try:
        with (
            Listening(server, "203.0.113.1") as heard,
            Listening(server, "203.0.113.2", stream_format="sse") as events,
        ):
            server.process.terminate()
            with pytest.raises(http.client.IncompleteRead):
                heard.response.read()
            last = events.response.read().decode().split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "overloaded"
        assert server.wait() == 0
    finally:
        server.kill()
