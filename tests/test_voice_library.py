"""The voice library of a real server: good and bad recordings, and speech that goes on meanwhile."""

import io
import json
import random
import shutil
import time
import urllib.error
import urllib.request
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from live_server import LONG, VOICES_OFTEN, LiveServer, collect, first_chunk, send

from qwen_megakernel.prompt.voice import Voice

VOICES = "/v1/audio/voices"
TOKEN = "a-secret-for-tests"
RATE = 24_000
CONSENT = "my own voice"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, recording):
    """A folder with a voice of the operator."""
    folder = tmp_path_factory.mktemp("library") / "voices"
    folder.mkdir()
    shutil.copy(recording, folder / "rms.wav")
    return folder


@pytest.fixture(scope="module")
def server(brief_base, folder):
    server = start(brief_base, folder, program=VOICES_OFTEN)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def start(model, folder, **options):
    arguments = ["--model", str(model), "--voices", str(folder), "--token", TOKEN]
    return LiveServer(*arguments, **options)


def ask(server, method, path, body=None, token=TOKEN, **headers):
    """Status, headers, body."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, method=method)
    for name, value in {"Authorization": f"Bearer {token}", **headers}.items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def form_of(content, **fields):
    """A multipart body; a field that is None is left out."""
    fields = {"name": "anna", "consent": CONSENT} | fields
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
        if value is not None
    ]
    if content is not None:
        header = 'Content-Disposition: form-data; name="recording"; filename="a.wav"'
        parts.append(f"--b\r\n{header}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join([*parts, b"--b--\r\n"])


def add(server, content, token=TOKEN, **fields):
    """Status and body of an upload."""
    return add_form(server, form_of(content, **fields), token)


def add_form(server, body, token=TOKEN):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, _, answer = ask(server, "POST", VOICES, body, token, **headers)
    return status, json.loads(answer)


def buzz(seconds=2.0, level=0.2, channels=1):
    """Something like a voice, [samples, channels] at 24 kHz."""
    times = np.arange(round(seconds * RATE)) / RATE
    tone = sum(np.sin(2 * np.pi * 120 * k * times) / k for k in range(1, 20))
    return np.repeat((level * tone * (0.6 + 0.4 * np.sin(6 * np.pi * times)))[:, None], channels, 1)


def file_of(samples, kind="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind)
    return file.getvalue()


GOOD = file_of(buzz())


def entries(server):
    return {entry["name"]: entry for entry in json.loads(ask(server, "GET", VOICES)[2])["voices"]}


def test_a_recording_becomes_a_voice_until_it_is_deleted(server, folder):
    status, entry = add(server, GOOD, name="bert")
    assert (status, entry["name"], entry["kind"], entry["removable"]) == (201, "bert", "x_vector", True)
    assert entries(server)["bert"] == entry
    assert json.loads(ask(server, "GET", f"{VOICES}/bert")[2]) == entry
    assert Voice.load(folder / "bert.safetensors").notes["consent"] == CONSENT
    assert "bert" in json.loads(ask(server, "GET", "/ready")[2])["voices"]

    status, headers, sound = ask(server, "POST", f"{VOICES}/bert/preview", b"")
    assert (status, headers["Content-Type"]) == (200, "audio/wav")
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getframerate() == RATE
    assert len(sound) > 2000

    assert ask(server, "DELETE", f"{VOICES}/bert")[0] == 200
    assert "bert" not in entries(server)
    assert not (folder / "bert.safetensors").exists()
    assert ask(server, "DELETE", f"{VOICES}/bert")[0] == 404
    assert ask(server, "POST", f"{VOICES}/bert/preview", b"")[0] == 404


def test_a_transcript_makes_a_closer_clone_and_stereo_is_mixed(server):
    stereo = file_of(buzz(channels=2), "FLAC")
    status, entry = add(server, stereo, name="carl", transcript="A buzz.")
    assert (status, entry["kind"]) == (201, "icl")


def test_the_operators_voices_stay(server, folder):
    assert entries(server)["rms"]["removable"] is False
    status, _, body = ask(server, "DELETE", f"{VOICES}/rms")
    assert (status, json.loads(body)["error"]["code"]) == (403, "unsupported")
    assert (folder / "rms.wav").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (file_of(buzz(0.5)), "0.50 s long, allowed: 1 to 30 s"),
        (file_of(buzz(31)), "31.00 s long, allowed: 1 to 30 s"),
        (file_of(buzz(level=0)), "is silent"),
        (file_of(np.clip(buzz(level=3.0), -1, 1)), "is clipped"),
        (file_of(np.hstack([buzz(), np.clip(buzz(level=5.0), -1, 1)])), "is clipped"),
        (file_of(buzz(channels=3)), "has 3 channels, allowed: 1 or 2"),
        (file_of(buzz(), "MP3"), "allowed: WAV or FLAC files"),
        (file_of(buzz(), "OGG"), "allowed: WAV or FLAC files"),
        (GOOD[:30_000], "is cut off"),
        (b"", "has 0 bytes"),
    ],
)
def test_a_bad_recording_gets_a_sentence(server, folder, content, sentence):
    status, body = add(server, content)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "bad_request", "recording")
    assert sentence in body["error"]["message"]
    assert sorted(path.stem for path in folder.iterdir()) == sorted({"rms", *entries(server)})


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"consent": None}, 400, "consent", "bad_request"),
        ({"name": "../anna"}, 400, "name", "bad_request"),
        ({"name": "RMS"}, 409, "name", "bad_request"),
        ({"transcript": "x" * 2001}, 400, "recording", "bad_request"),
        ({"transcript": "x" * 20_000}, 400, None, "bad_request"),
        ({f"field{number}": "x" for number in range(9)}, 400, None, "bad_request"),
    ],
)
def test_a_bad_field_gets_a_sentence(server, fields, status, param, code):
    answer, body = add(server, GOOD, **fields)
    error = body["error"]
    assert (answer, error["param"], error["code"]) == (status, param, code)
    assert error["message"]


def test_a_description_needs_another_checkpoint(server):
    status, body = add(server, None, consent=None, description="a warm voice")
    assert (status, body["error"]["code"]) == (400, "unsupported")
    assert "only voice_design can" in body["error"]["message"]


def test_what_is_no_form_is_refused(server):
    for kind in ("application/json", "text/plain", ""):
        assert ask(server, "POST", VOICES, b"{}", **{"Content-Type": kind})[0] == 400
    broken = ask(server, "POST", VOICES, b"no parts", **{"Content-Type": "multipart/form-data"})
    assert broken[0] == 400
    assert json.loads(broken[2])["error"]["message"]


def test_any_form_is_answered(server):
    draw = random.Random(0)
    whole = form_of(b"RIFF no recording", transcript="Hello.")
    for _ in range(100):
        start = draw.randrange(len(whole))
        end = start + draw.randrange(40)
        status, body = add_form(server, whole[:start] + draw.randbytes(draw.randrange(20)) + whole[end:])
        assert status == 400
        assert body["error"]["message"]
    assert not [line for line in server.err if "Traceback" in line]


def test_a_body_that_is_too_long_is_refused(server):
    status, body = add(server, bytes(21 << 20))
    assert (status, body["error"]["code"]) == (413, "bad_request")


def test_strangers_add_nothing(server):
    assert add(server, GOOD, token="another")[0] == 401
    for method in ("DELETE", "GET"):
        assert ask(server, method, f"{VOICES}/rms", token="another")[0] == 401
    foreign = ask(server, "DELETE", f"{VOICES}/rms", Origin="https://evil.example")
    assert foreign[0] == 403


def test_a_folder_that_cannot_be_written_is_told(server, folder):
    folder.rename(folder.with_name("away"))
    try:
        status, body = add(server, GOOD)
    finally:
        folder.with_name("away").rename(folder)
    assert status == 507
    assert "cannot write to its folder of voices" in body["error"]["message"]
    assert "anna" not in entries(server)


def test_one_of_many_that_take_a_name_gets_it(server):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: add(server, GOOD, name="dora")[0], range(4)))
    assert sorted(answers) == [201, 409, 409, 409]


@pytest.mark.slow
def test_cloning_stalls_nobodys_speech(server, report):
    """Sound keeps coming while each of two recordings is encoded."""
    recording = file_of(buzz(29))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    arrivals, clones = [], []

    def listen(client):
        while not isinstance(client.recv(timeout=240), str):
            arrivals.append(time.monotonic())

    for _ in range(2):  # each with a turn of its own, whose speech may end first
        with server.connect(additional_headers=headers) as client, ThreadPoolExecutor(1) as pool:
            send(client, **LONG, speaker_ref="rms")
            first_chunk(client)
            listening = pool.submit(listen, client)
            begun = time.monotonic()
            assert add(server, recording, name="eve", transcript="A buzz.")[0] == 201
            clones.append((begun, time.monotonic()))
            assert ask(server, "DELETE", f"{VOICES}/eve")[0] == 200
            send(client, cancel=True)
            listening.result(240)
    meanwhile = [sum(begun < at < end for at in arrivals) for begun, end in clones]
    times = ", ".join(f"{end - begun:.1f} s" for begun, end in clones)
    report(f"cloned in {times}; {meanwhile} chunks meanwhile")
    assert min(meanwhile) >= 2


@pytest.mark.slow
def test_voices_survive_a_restart(server, brief_base, folder):
    assert add(server, GOOD, name="fred")[0] == 201
    before = entries(server)["fred"]
    again = start(brief_base, folder).wait_until_ready()
    try:
        assert entries(again)["fred"] == before
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with again.connect(additional_headers=headers) as client:
            send(client, text="Hello.", speaker_ref="fred")
            assert collect(client)[0]
        assert ask(again, "DELETE", f"{VOICES}/fred")[0] == 200
    finally:
        again.kill()


def test_without_a_folder_there_is_no_library(live_server):
    status, body = add(live_server, GOOD)
    assert (status, body["error"]["code"]) == (403, "unsupported")
    assert "--voices" in body["error"]["message"]
    assert live_server.ready()["voice_uploads"] is False


def test_a_voice_is_designed_and_kept(tiny_voice_design, tmp_path):
    server = LiveServer("--model", str(tiny_voice_design), "--voices", str(tmp_path))
    try:
        server.wait_until_ready()
        status, entry = add(server, None, name="warm", consent=None, description="a warm voice")
        assert (status, entry["kind"]) == (201, "designed")
        assert Voice.load(tmp_path / "warm.safetensors").description == "a warm voice"
        status, body = add(server, GOOD)
        assert (status, body["error"]["code"]) == (400, "unsupported")
        assert "cannot clone voices" in body["error"]["message"]
    finally:
        server.kill()
