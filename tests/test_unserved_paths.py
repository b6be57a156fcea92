"""For a path that the server does not serve, the answer names the paths that it serves."""

import asyncio
import json

import pytest
from live_server import LiveServer
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from pipecat_client.handshake import ServerError, open_connection

ADVICE = (
    "this path is not served; a WebSocket connects to /, /tts/websocket, /v1/speak, "
    "/v1/text-to-speech/{voice}/stream-input, /v1/text-to-speech/{voice}/multi-stream-input, "
    "/v1/audio/speech/stream, and HTTP has /health, /ready, /metrics, /v1/audio/speech, "
    "/v1/audio/voices, /v1/models, /v1/audio/models, /tts/bytes, /voices, /v1/voices, /v2/voices, "
    "/openapi.json, /docs"
)


@pytest.mark.parametrize("path", ["/tts", "/ws/", "//", "/health", "/v1/audio/speech?voice=default"])
def test_websocket_on_an_unserved_path_is_told_where_to_go(live_server, path):
    with pytest.raises(InvalidStatus) as refused, live_server.connect(path):
        pass
    response = refused.value.response
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(response.body) == {"error": ADVICE}


@pytest.mark.parametrize("path", ["/nothing", "/ready/nothing", "//", "/favicon.ico?x=1"])
def test_http_on_an_unserved_path_is_told_where_to_go(live_server, path):
    status, body = live_server.get(path)
    assert status == 404
    assert json.loads(body) == {"error": ADVICE}


def test_unserved_paths_tell_strangers_nothing(tiny_base):
    server = LiveServer("--model", str(tiny_base), "--token", "a-secret-for-tests")
    try:
        with pytest.raises(InvalidStatus) as refused, server.connect("/tts"):
            pass
        assert refused.value.response.status_code == 401
        assert server.get("/nothing")[0] == 401
    finally:
        server.kill()


def test_client_with_a_wrong_path_is_told_where_to_go(live_server):
    with pytest.raises(ServerError, match=r"HTTP 404: .*a WebSocket connects to /") as refused:
        asyncio.run(open_connection(connect, f"{live_server.url}/tts", None, 24_000))
    assert refused.value.status_code == 404  # Pipecat does not try again
