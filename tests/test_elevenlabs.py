"""ElevenLabs' speech API of a real server: both WebSockets, files, times, voices, refusals."""

import base64
import http.client
import io
import itertools
import json

import av
import numpy as np
import pytest
from live_server import DEMO_TOKEN, LONG, SOON
from slow_cases import slow_after
from test_elevenlabs_sockets import words_of
from websockets.exceptions import ConnectionClosed, InvalidStatus

VOICE = "/v1/text-to-speech/slt"


@pytest.fixture
def client(demo_server):
    path = f"{VOICE}/multi-stream-input?output_format=pcm_24000&seed=3"
    with demo_server.connect(path, additional_headers={"xi-api-key": DEMO_TOKEN}) as client:
        yield client


def send(client, **fields):
    client.send(json.dumps(fields))


def hear(client, *context_ids):
    """Messages until all of these contexts have ended."""
    lines, left = [], set(context_ids)
    while left:
        lines.append(json.loads(client.recv(timeout=60)))
        assert "error" not in lines[-1], lines[-1]
        if lines[-1]["isFinal"]:
            left.discard(lines[-1].get("contextId"))
    return lines


def pcm(lines, context_id=None):
    return b"".join(
        base64.b64decode(line["audio"] or "") for line in lines if line.get("contextId") == context_id
    )


def speak(client, context_id, *pieces):
    send(client, text=" ", context_id=context_id)
    for piece in pieces:
        send(client, text=piece, context_id=context_id)
    send(client, context_id=context_id, flush=True)
    send(client, context_id=context_id, close_context=True)


def ask(server, method, path, body=None, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        body = body if body is None else json.dumps(body)
        connection.request(method, path, body, {"xi-api-key": DEMO_TOKEN} | headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_a_text_is_the_same_in_pieces_in_both_sockets_and_as_a_file(demo_server, client):
    speak(client, "whole", "Good morning.")
    lines = hear(client, "whole")
    whole = pcm(lines, "whole")
    assert len(whole) > 24_000
    samples = np.frombuffer(whole, "<i2") / 32_768
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5
    speak(client, "pieces", "Good ", "morn", "ing.")
    assert pcm(hear(client, "pieces"), "pieces") == whole
    headers = {"authorization": f"Bearer {DEMO_TOKEN}"}
    path = f"{VOICE}/stream-input?output_format=pcm_24000&seed=3"
    with demo_server.connect(path, additional_headers=headers) as other:
        for text in (" ", "Good ", "morning.", ""):
            send(other, text=text)
        assert pcm(hear(other, None)) == whole
        with pytest.raises(ConnectionClosed) as closed:
            other.recv(timeout=60)
        assert closed.value.rcvd.code == 1000
    for end in ("", "/stream"):
        path = f"{VOICE}{end}?output_format=pcm_24000"
        status, found, data = ask(demo_server, "POST", path, {"text": "Good morning.", "seed": 3})
        assert (status, found["Content-Type"], data) == (200, "audio/pcm", whole)


def test_there_is_a_default_voice(demo_server):
    assert "default" not in demo_server.ready(DEMO_TOKEN)["voices"]
    path = "/v1/text-to-speech/default/stream-input?output_format=pcm_24000"
    with demo_server.connect(path, additional_headers={"xi-api-key": DEMO_TOKEN}) as client:
        for text in ("Good morning. ", ""):
            send(client, text=text)
        assert len(pcm(hear(client, None))) > 24_000


def test_words_have_times_over_both_wires(demo_server, client):
    text = "Good morning, my friend."
    speak(client, "a", text)
    lines = hear(client, "a")
    found = words_of(lines)
    assert [word for word, _ in found] == text.split()
    starts = [start for _, start in found]
    assert starts == sorted(starts)
    assert starts[-1] < len(pcm(lines, "a")) / 48
    path = f"{VOICE}/stream/with-timestamps?output_format=pcm_24000"
    status, headers, body = ask(demo_server, "POST", path, {"text": text, "seed": 3})
    assert (status, headers["Content-Type"]) == (200, "application/json")
    answers = [json.loads(line) for line in body.splitlines()]
    assert b"".join(base64.b64decode(a["audio_base64"]) for a in answers) == pcm(lines, "a")
    aligned = [a["alignment"] for a in answers if a["alignment"]]
    characters = list(itertools.chain.from_iterable(a["characters"] for a in aligned))
    assert "".join(characters) == text + " "
    times = [t for a in aligned for t in a["character_start_times_seconds"]]
    assert times == sorted(times)
    assert times[-1] > 0.5


def test_several_contexts_speak_at_a_time(client):
    send(client, text="This goes ", context_id="open")
    for name in ("b", "c"):
        speak(client, name, "Good morning.")
    lines = hear(client, "b", "c")
    assert len(pcm(lines, "b")) == len(pcm(lines, "c")) > 24_000
    send(client, context_id="open", close_context=True)
    hear(client, "open")


def test_a_close_stops_the_turn_and_nothing_stale_follows(demo_server, client):
    after = len(demo_server.err)
    send(client, text=LONG["text"], context_id="long")
    assert json.loads(client.recv(timeout=60))["audio"]
    send(client, context_id="long", close_context=True)
    hear(client, "long")
    speak(client, "next", "Good morning.")
    assert {line["contextId"] for line in hear(client, "next")} == {"next"}
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    demo_server.wait_until_idle(token=DEMO_TOKEN)


@pytest.mark.parametrize(("name", "num_bytes"), [("ulaw_8000", 8000), ("pcm_44100", 88_200)])
def test_formats_are_honoured(demo_server, name, num_bytes):
    body = {"text": "Good morning.", "seed": 3}
    plain = ask(demo_server, "POST", f"{VOICE}?output_format=pcm_24000", body)[2]
    path = f"{VOICE}/multi-stream-input?output_format={name}&seed=3&authorization=Bearer%20{DEMO_TOKEN}"
    with demo_server.connect(path) as client:
        speak(client, "a", "Good morning.")
        assert len(pcm(hear(client, "a"), "a")) == len(plain) // 2 * num_bytes // 24_000


@pytest.mark.parametrize(
    ("name", "magic"), slow_after(1, [("mp3_44100_128", b"\xff"), ("opus_48000_32", b"OggS")])
)
def test_files_are_compressed(demo_server, name, magic):
    path = f"{VOICE}/multi-stream-input?output_format={name}"
    with demo_server.connect(path, additional_headers={"xi-api-key": DEMO_TOKEN}) as client:
        speak(client, "a", "Good morning.")
        data = pcm(hear(client, "a"), "a")
    file = ask(demo_server, "POST", f"{VOICE}?output_format={name}", {"text": "Good morning."})[2]
    for each in (data, file):
        assert each.startswith(magic)
        with av.open(io.BytesIO(each)) as opened:
            assert sum(frame.samples for frame in opened.decode(audio=0)) > 20_000


def test_a_silent_socket_is_closed_when_the_client_says(demo_server):
    path = f"{VOICE}/multi-stream-input?inactivity_timeout=1"
    with demo_server.connect(path, additional_headers={"xi-api-key": DEMO_TOKEN}) as client:
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == 1001


def test_voices_are_listed(demo_server):
    voices = json.loads(ask(demo_server, "GET", "/v1/voices")[2])["voices"]
    assert {"slt", "rms"} <= {voice["voice_id"] for voice in voices}
    page = json.loads(ask(demo_server, "GET", "/v2/voices?page_size=1")[2])
    assert (len(page["voices"]), page["has_more"]) == (1, True)
    assert json.loads(ask(demo_server, "GET", "/v1/voices/slt")[2])["name"] == "slt"
    status, _, body = ask(demo_server, "GET", "/v1/voices/nobody")
    assert (status, json.loads(body)["detail"]["status"]) == (404, "not_found")
    assert ask(demo_server, "GET", "/v2/voices?page_size=x")[0] == 400


def test_refusals_are_elevenlabs(demo_server):
    for path, body, code in (
        ("/v1/text-to-speech/nobody", {"text": "Hi."}, "unknown_voice"),
        (f"{VOICE}?output_format=gsm", {"text": "Hi."}, "unsupported"),
        (f"{VOICE}/stream/with-timestamps", [], "bad_request"),
        (VOICE, {"text": "Hi.", "language_code": "xx"}, "unknown_language"),
    ):
        status, _, data = ask(demo_server, "POST", path, body)
        assert (status, json.loads(data)["detail"]["status"]) == (400, code)
    for path in (VOICE, "/v1/voices", f"{VOICE}/stream/with-timestamps"):
        status, _, data = ask(demo_server, "GET", path, **{"xi-api-key": "wrong"})
        assert (status, json.loads(data)["detail"]["status"]) == (401, "invalid_api_key")
    assert json.loads(ask(demo_server, "GET", VOICE)[2])["detail"]["status"] == "method_not_allowed"
    for path, key, code in (
        (f"{VOICE}/stream-input", "wrong", "invalid_api_key"),
        ("/v1/text-to-speech/nobody/multi-stream-input", DEMO_TOKEN, "unknown_voice"),
        (f"{VOICE}/multi-stream-input?single_use_token=x", DEMO_TOKEN, "unsupported"),
        (f"{VOICE}/stream-input?language_code=xx", DEMO_TOKEN, "unknown_language"),
    ):
        with pytest.raises(InvalidStatus) as refused:
            demo_server.connect(path, additional_headers={"xi-api-key": key}).__enter__()
        assert json.loads(refused.value.response.body)["detail"]["status"] == code
