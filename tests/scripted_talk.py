"""Scripted conversations with a server in this process, recorded message by message.

The record leaves out what varies from run to run. A gate before the decoder lets through as many frames
as the script says, so that a cancel meets a turn after the same frame each time. Times are masked.
Audio is recorded as sample counts with a digest (see `golden_records`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from golden_records import Golden, digest, sound_difference, watched_margins
from listener import wait_idle
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from qwen_megakernel import TTSDecoder
from qwen_megakernel.engine.capacity import Capacity
from qwen_megakernel.serving import process
from qwen_megakernel.serving.app import App, ServerSettings

_TIME = re.compile(r'("generation_s": ?|"(?:ttfc_ms|rtf)": ?(?!0\.0[,}]))[\d.e-]+')
"""A zero in one of the last two is not a time: nothing was measured."""
_TIME_IN_LOG = re.compile(r"(ttfc|rtf) \d[\d.]*")
_VERSION = re.compile(r"(qwen-megakernel/)[\w.]+")
FULL = Capacity(num_slots=4, num_free=0, num_queued=23, slot_s=2.0)
"""A turn would begin in 12 s."""
_LIMIT_S = 60.0
_HEADER = struct.Struct("<II")
_DTYPES = {"pcm_s16le": ("<i2", 32_767), "pcm_f32le": ("<f4", 1)}


class GatedBackend:
    """A decoder backend that launches only as many frames as it may."""

    def __init__(self, real) -> None:
        self.real = real
        self.error: Exception | None = None
        """Raised by the next frame."""
        self._allowed: int | None = None
        self._changed = threading.Condition()

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def allow(self, frames: int | None) -> None:
        """Allow so many frames from now on; None is any number."""
        with self._changed:
            self._allowed = frames
            self._changed.notify_all()

    def launch(self, slots: Sequence[int], text_rows: Tensor):
        with self._changed:
            self._changed.wait_for(lambda: self._allowed is None or self._allowed > 0)
            if self._allowed is not None:
                self._allowed -= 1
        if self.error is not None:
            raise self.error
        return self.real.launch(slots, text_rows)


class _Accounts(logging.Handler):
    """Keeps the log's line of each finished turn."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "finish_reason" in getattr(record, "fields", {}):
            self.lines.append(_TIME_IN_LOG.sub(r"\1 <time>", record.getMessage()))


class Server:
    """The application behind a socket of its own, in a thread."""

    def __init__(self, decoder: TTSDecoder | None, **settings) -> None:
        """Without a decoder the server stays in the phase `loading`."""
        self.app = App(ServerSettings(**settings))
        if decoder is None:
            self.app.report("loading")
        listener = process.bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self._server = process._Server(process._uvicorn_config(self.app))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listener,), daemon=True)
        if decoder is not None:
            self.app.start_serving(decoder)
        self._thread.start()

    def _run(self, listener) -> None:
        self._loop.run_until_complete(self._server.serve(sockets=[listener]))
        self._loop.close()

    def drain(self) -> Future[None]:
        """Begin to drain."""
        future = asyncio.run_coroutine_threadsafe(self.app.drain(), self._loop)
        wait_until(lambda: self.app.phase == "draining")
        return future

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


class Stage:
    """A server, the gate of its decoder, and the transcript of its clients' messages."""

    def __init__(self, tts: TTSDecoder, **settings) -> None:
        self.tts, self.gate = tts, tts._engine._backend
        self.lines: list[str] = []
        self.sounds: list[list[str]] = []
        """The digest of each line of audio."""
        self.server = Server(tts, **settings)
        self.sockets = ExitStack()

    def client(self, name: str = "client", hello: dict | None = None) -> Client:
        """Connect a client. If `hello` is given, send it and wait for the answer."""
        client = Client(self, name)
        if hello is not None:
            client.audio_format = hello.get("audio", {})
            client.say(type="hello", protocol=1, **hello)
            client.hear()
        return client

    def handshake(self, path: str = "/", server: Server | None = None, **options) -> None:
        """Record the status and body of a refused handshake."""
        port = (server or self.server).port
        url = f"ws://127.0.0.1:{port}{path}"
        with pytest.raises(InvalidStatus) as refused, connect(url, compression=None, **options):
            pass
        response = refused.value.response
        self.lines.append(f"handshake refused: {response.status_code} {response.body.decode()}")

    def wait_for_cancel(self) -> None:
        """Wait until every turn that has a slot is cancelled, or about to be."""
        wait_until(lambda: all(active.turn.cancelled for active in self.tts._engine._speaking))

    def wait_for_slot(self) -> None:
        """Wait until a turn has a slot and waits at the gate."""
        wait_until(lambda: any(active.num_fed for active in self.tts._engine._speaking))

    def wait_for_contexts(self, count: int) -> None:
        """Wait until the server has opened so many contexts."""
        sessions = self.server.app._sessions._sessions
        wait_until(lambda: sum(len(session._contexts) for session in sessions) == count)

    def close(self) -> None:
        """Hang up, let running turns end, and stop the server."""
        self.sockets.close()
        self.gate.allow(None)
        if self.tts.error is None:
            wait_idle(self.tts)
        self.server.stop()


class Client:
    """One connection whose messages, both ways, go into the transcript."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name = stage, name
        self.audio_format: dict | None = None
        """The native protocol's format; None is the simple protocol."""
        url = f"ws://127.0.0.1:{stage.server.port}/"
        connection = connect(url, max_size=None, compression=None, close_timeout=5)
        self.socket = stage.sockets.enter_context(connection)
        self._audio: list[bytes] = []

    def say(self, data: str | bytes | None = None, **fields) -> None:
        """Send a message: as it is, or an object with these fields."""
        data = json.dumps(fields) if data is None else data
        self._write(f"> {data!r}" if isinstance(data, bytes) else f"> {data}")
        self.socket.send(data)

    def hear(self, texts: int = 1) -> None:
        """Write down all messages up to the last of so many text messages."""
        while texts:
            message = self._receive()
            if isinstance(message, bytes):
                self._audio.append(message)
            else:
                self._write_audio()
                self._write_text(message)
                texts -= 1

    def hear_audio(self, messages: int) -> None:
        """Write down so many audio messages; nothing else may come."""
        while len(self._audio) < messages:
            message = self._receive()
            assert isinstance(message, bytes), message
            self._audio.append(message)
        self._write_audio()

    def hear_progress(self, kinds: int) -> None:
        """Write down so many different messages of progress, sorted; nothing else may come."""
        found: set[str] = set()
        while len(found) < kinds:
            message = self.socket.recv(timeout=_LIMIT_S)
            assert _is_progress(message), message
            found.add(message)
        for message in sorted(found):
            self._write_text(message)

    def hear_close(self) -> None:
        """Write down how the server closes; nothing else may come."""
        with pytest.raises(ConnectionClosed) as closed:
            self._receive()
        close = closed.value.rcvd  # its reason is the WebSocket library's
        self._write(f"< closed: {close.code}" if close else "< cut")

    def hang_up(self) -> None:
        self.socket.close()
        self._write("> closes")

    def _receive(self) -> str | bytes:
        """The next message that is not progress, which can come anywhere on a slow machine."""
        while _is_progress(message := self.socket.recv(timeout=_LIMIT_S)):
            pass
        return message

    def _write(self, line: str) -> None:
        if len(line) > 600:
            line = f"{line[:60]} ... ({len(line)} characters)"
        self._stage.lines.append(f"{self._name} {line}")

    def _write_text(self, message: str) -> None:
        self._write("< " + _VERSION.sub(r"\1<version>", _TIME.sub(r"\1<time>", message)))

    def _write_audio(self) -> None:
        if not self._audio:
            return
        label, chunks = "audio", self._audio
        if self.audio_format is not None:
            label, chunks = self._without_headers()
        dtype, scale = _DTYPES[self._encoding]
        arrays = [np.frombuffer(chunk, dtype) for chunk in chunks]
        self._write(f"< {label}: {' '.join(str(len(array)) for array in arrays)}")
        self._stage.sounds.append(digest(np.concatenate(arrays) / scale))
        self._audio = []

    @property
    def _encoding(self) -> str:
        if self.audio_format is None:
            return "pcm_f32le"
        return self.audio_format.get("encoding", "pcm_s16le")

    def _without_headers(self) -> tuple[str, list[bytes]]:
        """The stream and the first number of consecutive chunks, and their samples."""
        headers = [_HEADER.unpack_from(message) for message in self._audio]
        stream, first = headers[0]
        assert headers == [(stream, first + i) for i in range(len(headers))]
        return f"audio {stream} from {first}", [message[_HEADER.size :] for message in self._audio]


def _is_progress(message: str | bytes) -> bool:
    return isinstance(message, str) and '"type":"progress"' in message


Script = Callable[[Stage], None]


@contextmanager
def gated(tts: TTSDecoder) -> Iterator[TTSDecoder]:
    """A decoder with a gate before its backend."""
    tts._engine._backend = GatedBackend(tts._engine._backend)
    with tts:
        yield tts


def play(script: Script, tts: TTSDecoder, num_accounts: int | None, **settings) -> dict:
    """Play a script. Returns the record of the conversation.

    Args:
        script: the conversation.
        tts: a decoder with a gate (`gated`).
        num_accounts: lines of the log to wait for; None waits for half a second.
        settings: of the server.
    """
    logger, accounts = logging.getLogger("qwen_megakernel"), _Accounts()
    logger.addHandler(accounts)
    level = logger.level
    logger.setLevel(logging.INFO)
    stage = Stage(tts, **settings)
    try:
        script(stage)
    finally:
        stage.close()
        deadline = time.monotonic() + (0.5 if num_accounts is None else 5.0)
        while len(accounts.lines) != num_accounts and time.monotonic() < deadline:
            time.sleep(0.005)
        logger.setLevel(level)
        logger.removeHandler(accounts)
    return {"lines": stage.lines, "accounts": sorted(accounts.lines), "sounds": stage.sounds}


def check(golden: Golden, script: Script, tts: TTSDecoder, **settings) -> None:
    """Play a script, and compare it with its record or record it."""
    name = script.__name__.removeprefix("script_")
    if golden.recording:
        with watched_margins(tts._engine._backend.real) as margins:
            found = play(script, tts, None, **settings)
        margins.check(name)
        golden.write(name, found)
        pytest.skip("recorded")
    record = golden.case(name)
    found = play(script, tts, len(record["accounts"]), **settings)
    if different := difference(record, found):
        golden.fail(name, different)


def difference(record: dict, found: dict) -> str | None:
    """The first line, or sound, that differs from the record."""
    for part in ("lines", "accounts"):
        expected, came = record[part], found[part]
        for number in range(max(len(expected), len(came))):
            one, other = (
                lines[number] if number < len(lines) else "nothing" for lines in (expected, came)
            )
            if one != other:
                return f"{part}, {number}:\n  recorded: {one}\n  found:    {other}"
    for number, sounds in enumerate(zip(record["sounds"], found["sounds"], strict=True)):
        if different := sound_difference(*sounds):
            return f"audio line {number}: {different}"
    return None
