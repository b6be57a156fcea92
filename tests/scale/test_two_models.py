"""Two servers with a model each behind one port: a path chooses, or the `model` of OpenAI's route."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from front_door import HAPROXY, LIMIT_S, free_port
from live_server import ROOT, LiveServer, collect, send
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy: apt-get install haproxy"),
]
NAMES = {"0.6b": "demo_voice", "1.7b": "checkpoint"}
"""Folders of the models that stand in for those of deploy/two_models.cfg."""


class TwoModels:
    """deploy/two_models.cfg with other ports, and the servers that it names."""

    def __init__(self, folder: Path, *options: tuple[str, ...]) -> None:
        self.port, ports = free_port(), [free_port(), free_port()]
        text = (ROOT / "deploy/two_models.cfg").read_text(encoding="utf-8")
        for given, used in ((8080, self.port), (8765, ports[0]), (8766, ports[1])):
            text, count = re.subn(rf"127\.0\.0\.1:{given}\b", f"127.0.0.1:{used}", text)
            assert count == 1, given
        config = folder / "haproxy.cfg"
        config.write_text(text, encoding="utf-8")
        self.process = subprocess.Popen([HAPROXY, "-db", "-f", config])
        self.servers: list[LiveServer] = []
        try:
            for port, each in zip(ports, options, strict=True):
                self.servers.append(LiveServer("--port", str(port), *each))
            for server in self.servers:
                server.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for server in self.servers:
            server.kill()


@pytest.fixture(scope="module")
def door(brief_base, recording, tmp_path_factory) -> Iterator[TwoModels]:
    demo = ("--model", "demo_voice", "--voices", "demo_voice/voices")
    tiny = ("--model", str(brief_base), "--speaker-ref", str(recording))
    door = TwoModels(tmp_path_factory.mktemp("two"), demo, tiny)
    yield door
    door.stop()


def ask(port: int, path: str, body: dict | None = None) -> tuple[int, bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        method = "GET" if body is None else "POST"
        link.request(method, path, None if body is None else json.dumps(body))
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def model_at(port: int, path: str) -> str:
    return Path(json.loads(ask(port, path)[1])["model"]).name


def test_a_path_chooses_a_model(door):
    for name, folder in NAMES.items():
        assert model_at(door.port, f"/models/{name}/ready") == folder
    assert model_at(door.port, "/ready") == "demo_voice"
    status, body = ask(door.port, "/models/9b/ready")
    assert (status, json.loads(body)["error"]) == (404, "this model is not served; known: 0.6b, 1.7b")


def spoken(port: int, path: str, model: str) -> bytes:
    """The sound of a text, which tells the models apart."""
    asked = {
        "model": model,
        "input": "Good evening.",
        "voice": "alloy",
        "seed": 3,
        "response_format": "pcm",
    }
    status, sound = ask(port, path, asked)
    assert status == 200, sound
    return sound


def test_the_openai_route_chooses_by_its_field(door):
    expected = [spoken(server.port, "/v1/audio/speech", "x") for server in door.servers]
    assert expected[0] != expected[1]
    small, large = NAMES
    assert spoken(door.port, "/v1/audio/speech", small) == expected[0]
    assert spoken(door.port, "/v1/audio/speech", large) == expected[1]
    assert spoken(door.port, "/v1/audio/speech", "tts-1") == expected[0]
    assert spoken(door.port, f"/models/{large}/v1/audio/speech", small) == expected[1]


@pytest.mark.parametrize("path", ["/models/{}", "/models/{}/"])
def test_a_websocket_chooses_by_its_path(path, door):
    for name, server in zip(NAMES, door.servers, strict=True):
        heard = []
        for url in (f"ws://127.0.0.1:{door.port}{path.format(name)}", server.url):
            with connect(url, max_size=None, compression=None) as client:
                send(client, text="Good evening.", seed=3, chunk_frames=1)
                chunks, _ = collect(client)
                heard.append(b"".join(chunks))
        assert heard[0] == heard[1] != b""


def test_a_websocket_to_an_unknown_model_is_refused(door):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{door.port}/models/9b")
    assert refused.value.response.status_code == 404
    assert b"known: 0.6b, 1.7b" in refused.value.response.body
