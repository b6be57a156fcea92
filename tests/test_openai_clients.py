"""OpenAI's SDK, whose files are listened to, and requests of other programs that speak through its API,
replayed as their sources send them."""

import base64
import http.client
import io
import json
import shutil
import subprocess
import wave

import av
import numpy as np
import pytest
from live_server import DEMO_TOKEN
from slow_cases import slow_after

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.openai_messages import RESPONSE_FORMATS
from training.listening import word_errors

SENTENCE = "Good evening, this is the front desk."
MAX_WER = 0.25
"""As in `test_demo_voice`: one of the seven words may be misheard."""

WAV = {"container": "wav"}
BEARER = {"Authorization": f"Bearer {DEMO_TOKEN}", "Content-Type": "application/json"}


def ask(server, method, path, fields=None, headers=BEARER):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    try:
        connection.request(method, path, None if fields is None else json.dumps(fields), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def decode(data, response_format):
    """Float32 samples [n] at 24 kHz, by FFmpeg."""
    raw = {"format": "s16le", "options": {"sample_rate": str(SAMPLE_RATE)}}
    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    with av.open(io.BytesIO(data), **(raw if response_format == "pcm" else {})) as file:
        frames = [*file.decode(audio=0), None]  # the last one flushes
        parts = [part.to_ndarray()[0] for frame in frames for part in resampler.resample(frame)]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def sdk(demo_server):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{demo_server.port}/v1"
    with openai.OpenAI(base_url=url, api_key=DEMO_TOKEN, max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("response_format", "stream_format"),
    slow_after(1, [*((name, "audio") for name in RESPONSE_FORMATS), ("mp3", "sse")]),
)
def test_every_format_of_openais_sdk_is_understood(sdk, listener, response_format, stream_format):
    request = {"input": SENTENCE, "model": "gpt-4o-mini-tts", "voice": "rms", "extra_body": {"seed": 1}}
    formats = {"response_format": response_format, "stream_format": stream_format}
    with sdk.audio.speech.with_streaming_response.create(**request, **formats) as response:
        if stream_format == "sse":
            events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
            data = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
        else:
            data = response.read()
    errors, words = word_errors(SENTENCE, listener.write_down(decode(data, response_format)))
    assert errors / words < MAX_WER


def test_open_webui_lists_and_speaks(demo_server):
    voices = json.loads(ask(demo_server, "GET", "/v1/audio/voices")[2])["voices"]
    assert ("slt", "slt") in [(voice["id"], voice["name"]) for voice in voices]
    models = json.loads(ask(demo_server, "GET", "/v1/audio/models")[2])["models"]
    assert "tts-1" in [model["id"] for model in models]
    assert {model["id"] for model in json.loads(ask(demo_server, "GET", "/v1/models")[2])["data"]} == {
        model["id"] for model in models
    }
    user = {"X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-User-Role": "admin"}
    body = {"input": "Good morning.", "voice": "slt", "model": "tts-1"}
    status, headers, data = ask(demo_server, "POST", "/v1/audio/speech", body, BEARER | user)
    assert (status, headers["Content-Type"]) == (200, "audio/mpeg")  # it keeps the file as .mp3
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.audio[0].codec_context.name.startswith("mp3")
    status, _, data = ask(demo_server, "POST", "/v1/audio/speech", body | {"voice": "nobody"})
    assert status == 400
    assert "nobody" in json.loads(data)["error"]["message"]  # what it shows


@pytest.mark.parametrize("speed", [1, 1.0])
def test_home_assistants_openai_tts_speaks(demo_server, speed):
    body = {
        "model": "tts-1", "input": "Good morning.", "voice": "shimmer", "response_format": "wav",
        "speed": speed,
    }  # fmt: skip
    status, _, data = ask(demo_server, "POST", "/v1/audio/speech", body)
    assert status == 200
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:3] == (1, 2, 24_000)


def test_wyoming_openai_speaks(demo_server):
    """The bridge between Home Assistant and OpenAI's API asks for raw samples as they are made."""
    body = {"model": "tts-1", "input": "Good morning.", "voice": "slt", "response_format": "pcm"}
    status, headers, data = ask(demo_server, "POST", "/v1/audio/speech", body | {"speed": 1.0})
    assert (status, headers["Content-Type"], len(data) % 3840) == (200, "audio/pcm", 0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    ("path", "header", "body", "magic"),
    [
        ("/v1/audio/speech", "Authorization: Bearer", {"input": "Hi."}, b"\xff"),
        ("/v1/speak?model=slt&encoding=linear16", "Authorization: Token", {"text": "Hi."}, b"RIFF"),
        ("/tts/bytes", "X-API-Key:", {"transcript": "Hi.", "output_format": WAV}, b"RIFF"),
    ],
)  # fmt: skip
def test_curl_speaks(demo_server, path, header, body, magic):
    command = ["curl", "--silent", "--fail", f"http://127.0.0.1:{demo_server.port}{path}"]
    options = ["-H", f"{header} {DEMO_TOKEN}", "-d", json.dumps(body)]
    data = subprocess.run([*command, *options], capture_output=True, check=True, timeout=240).stdout
    assert data.startswith(magic)
    assert len(data) > 1000
