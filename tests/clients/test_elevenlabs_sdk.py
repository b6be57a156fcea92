"""ElevenLabs' own SDK speaks through this server. Only its URL, key and voice are changed.

For `convert_realtime` the SDK allows no WebSocket without TLS, so a proxy ends TLS before the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("elevenlabs", reason="make test-clients has it")

from elevenlabs.client import ElevenLabs
from elevenlabs.core.api_error import ApiError
from live_server import DEMO_TOKEN, LONG, SOON, LiveServer

TEXT = "Good morning, my friend."
PCM = "pcm_24000"


@pytest.fixture
def client(demo_server, http_url):
    return ElevenLabs(api_key=DEMO_TOKEN, base_url=http_url)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return certificate, key


class TlsFront:
    """Ends TLS on a port of its own, and passes all bytes to a server."""

    def __init__(self, server_port: int, certificate: Path, key: Path) -> None:
        self._server_port = server_port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate, key)
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        """Stop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        serving = asyncio.start_server(self._serve, "localhost", 0, ssl=self._context)
        self.port = self._loop.run_until_complete(serving).sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        await asyncio.gather(_pass(reader, inner_writer), _pass(inner_reader, writer))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def secure_client(
    demo_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ElevenLabs]:
    """The SDK behind TLS."""
    certificate, key = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    front = TlsFront(demo_server.port, certificate, key)
    try:
        yield ElevenLabs(api_key=DEMO_TOKEN, base_url=f"https://localhost:{front.port}")
    finally:
        front.close()


def test_voices_are_listed(client):
    assert {"slt", "rms"} <= {voice.voice_id for voice in client.voices.get_all().voices}
    assert [voice.name for voice in client.voices.search(search="slt").voices] == ["slt"]
    assert client.voices.get("slt").name == "slt"


def test_a_file_is_spoken(client):
    kinds = {"mp3_44100_128": b"\xff", "opus_48000_32": b"OggS"}
    for output_format, magic in kinds.items():
        data = b"".join(client.text_to_speech.convert("slt", text=TEXT, output_format=output_format))
        assert data.startswith(magic)
        assert len(data) > 1000
    with pytest.raises(ApiError) as refused:
        b"".join(client.text_to_speech.convert("nobody", text="Hi."))
    assert refused.value.body["detail"]["status"] == "unknown_voice"
    stranger = ElevenLabs(api_key="wrong", base_url=str(client._client_wrapper.get_base_url()))
    with pytest.raises(ApiError) as refused:
        stranger.voices.get_all()
    assert refused.value.status_code == 401


def test_lines_have_times(client):
    lines = list(
        client.text_to_speech.stream_with_timestamps("slt", text=TEXT, output_format=PCM, seed=3)
    )
    characters = [c for line in lines if line.alignment for c in line.alignment.characters]
    assert "".join(characters) == TEXT + " "
    assert sum(len(line.audio_base_64) for line in lines) > 32_000


def test_it_speaks_is_interrupted_and_speaks_again(client, demo_server):
    after = len(demo_server.err)
    stream = client.text_to_speech.stream("slt", text=LONG["text"], output_format=PCM)
    assert next(stream)
    stream.close()
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    whole = b"".join(client.text_to_speech.stream("slt", text=TEXT, output_format=PCM, seed=3))
    assert len(whole) > 24_000


def test_text_in_pieces_speaks_is_interrupted_and_speaks_again(secure_client, demo_server):
    after = len(demo_server.err)
    speak = secure_client.text_to_speech.convert_realtime
    stream = speak("slt", text=iter([LONG["text"]]), output_format=PCM)
    assert next(stream)
    stream.close()
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    pieces = iter(["Good ", "morning, ", "my ", "friend."])
    assert len(b"".join(speak("slt", text=pieces, output_format=PCM))) > 24_000
    demo_server.wait_until_idle(token=DEMO_TOKEN)
