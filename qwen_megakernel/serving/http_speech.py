"""Speech as the answer to an HTTP request, for every dialect. A request is a session of one context.

The answer begins with the first audio, so a refusal can still have its status. Two tasks serve a
request: one waits for the client to hang up, the other speaks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.audio_encoding import AudioEncoder, FileFormat, open_encoder
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextFailed,
    SessionEvent,
    SessionFailed,
    SessionOver,
)
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.wire import SpeechError, error_line
from qwen_megakernel.turn import ErrorCode, RequestError

RULES = SessionRules(max_contexts=1, when_full="a request is one text", max_lead_s=3600.0, file=True)
"""Generation may be an hour ahead of playback: a client gets its file as fast as it reads. Unread
audio of a slow client makes the engine wait."""
_CONTEXT = "speech"
_STATUS: dict[ErrorCode, int] = {"overloaded": 503, "internal": 500}
_RETRY_S = 5


class Framing(Protocol):
    """Pieces of text that carry a file, such as Server-Sent Events."""

    media_type: str

    def begin(self, spans: Sequence[Span]) -> None:
        """The text, as it is read."""

    def hear(self, samples: np.ndarray) -> None:
        """A chunk of the audio that the next bytes come from, float32 [n] at 24 kHz."""

    def delta(self, audio: bytes) -> bytes:
        """A piece with bytes of the file."""

    def done(self) -> bytes:
        """The last piece, for the end of the audio."""

    def error(self, failure: RequestError) -> bytes | None:
        """The last piece of speech that breaks off; None sends none, and the answer has no end."""


@dataclass(frozen=True, slots=True)
class SpokenFile:
    """The speech that a client asks for."""

    text: str
    choices: SpeechOptions
    audio: FileFormat
    headers: Mapping[str, str] = field(default_factory=dict)
    """Additional headers of the answer."""
    framing: Framing | None = None
    """None sends the file itself."""


class ErrorDialect(Protocol):
    """The form of a dialect's error answers."""

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> Any:
        """The JSON body of an error answer."""

    def param_of(self, code: ErrorCode) -> str | None:
        """The field of the request that an error is about; None if it is about none."""


class FileDialect(ErrorDialect, Protocol):
    """The form of a dialect's requests for a file of speech."""

    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        """Parse a request. Raises `SpeechError`."""


class FileAnswer(Response):
    """The answer to one request."""

    def __init__(self, sessions: OpenSessions, dialect: FileDialect) -> None:
        self._sessions, self._dialect = sessions, dialect
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request, and answer it."""
        with self._sessions.admit(client_address(scope["client"]), RULES) as session:
            try:
                body = await _read_body(receive, session.server.max_message_bytes)
                if body is None:
                    return
                file = self._dialect.read(Request(scope), body, session.server)
                _check_encodable(file.audio)
                spans = session.append(_CONTEXT, file.text, file.choices, ended=True)
                if file.framing is not None:
                    file.framing.begin(spans)
            except (SpeechError, RequestError) as error:
                await refusal_of(self._dialect, error)(scope, receive, send)
                return
            speaking = asyncio.create_task(self._speak(session, file, scope, receive, send))
            hanging_up = asyncio.create_task(_until_disconnected(receive))
            tasks = {speaking, hanging_up}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                session.close()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if not speaking.cancelled():
                speaking.result()

    async def _speak(
        self, session: Session, file: SpokenFile, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the speech. If it breaks off, the answer has no end, so that the client notices."""
        encoder = await asyncio.to_thread(open_encoder, file.audio)
        events = await _first_events(session)
        if isinstance(events, RequestError):
            await refusal_of(self._dialect, events)(scope, receive, send)
            return
        framing = file.framing
        media_type = file.audio.media_type if framing is None else framing.media_type
        headers = {"Cache-Control": "no-cache", **file.headers}
        raw_headers = _without_length(Response(None, 200, headers, media_type).raw_headers)
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        hear = _ignore if framing is None else framing.hear
        try:
            async for data in _encoded(session, events, encoder, hear):
                message = data if framing is None else framing.delta(data)
                await send({"type": "http.response.body", "body": message, "more_body": True})
        except RequestError as failure:
            end = None if framing is None else framing.error(failure)
            if end is None:
                return
            last = end
        else:
            last = b"" if framing is None else framing.done()
        await send({"type": "http.response.body", "body": last, "more_body": False})


def refusal_of(dialect: ErrorDialect, error: SpeechError | RequestError) -> Response:
    """The error answer in a dialect's form."""
    message, code, headers = error_line(str(error)), error.code, None
    if isinstance(error, SpeechError):
        status, param = error.status, error.param
    else:
        status, param = _STATUS.get(error.code, 400), dialect.param_of(error.code)
        if status == 503:
            headers = {"Retry-After": str(math.ceil(error.retry_after_s or _RETRY_S))}
    return JSONResponse(dialect.error_body(status, message, code, param), status, headers)


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client has left. Raises `SpeechError` beyond `limit` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise SpeechError(413, f"the body is longer than {limit} bytes", "text_too_long")
        if not message.get("more_body", False):
            return bytes(body)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_encodable(audio: FileFormat) -> None:
    if not audio.encodable:
        raise SpeechError(
            400,
            f"{audio.encoding} needs PyAV, which the server lacks: its operator can `pip install av`; "
            "PCM and WAV work without",
            "unsupported",
            "response_format",
        )


def _without_length(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name != b"content-length"]


async def _first_events(session: Session) -> list[SessionEvent] | RequestError:
    """The events up to the first audio or the end, or the error that comes instead."""
    while True:
        events = await session.take()
        for event in events:
            failure = _failure_of(event)
            if failure is not None:
                return failure
            if isinstance(event, (ContextAudio, ContextDone)):
                return events


async def _encoded(
    session: Session,
    events: Sequence[SessionEvent],
    encoder: AudioEncoder,
    hear: Callable[[np.ndarray], None],
) -> AsyncIterator[bytes]:
    """The bytes of the audio file. `hear` gets each chunk before its bytes are given. Raises
    `RequestError` if the speech breaks off."""
    while True:
        for event in events:
            failure = _failure_of(event)
            if failure is not None:
                raise failure
            samples = event.samples if isinstance(event, ContextAudio) else None
            if samples is None and not isinstance(event, ContextDone):
                continue
            if samples is not None:
                hear(samples)
            if data := await _encode(encoder, samples):
                yield data
            if samples is None:
                return
        events = await session.take()


def _ignore(samples: np.ndarray) -> None:
    pass


async def _encode(encoder: AudioEncoder, samples: np.ndarray | None) -> bytes:
    """Encode a chunk, or end the file if `samples` is None. Returns the bytes that are ready."""
    # Compression takes a millisecond a frame. Other clients' audio must not wait for it.
    if encoder.compresses:
        return await asyncio.to_thread(_encode_now, encoder, samples)
    return _encode_now(encoder, samples)


def _encode_now(encoder: AudioEncoder, samples: np.ndarray | None) -> bytes:
    return encoder.finish() if samples is None else encoder.encode(samples)


def _failure_of(event: SessionEvent) -> RequestError | None:
    """The error of an event that ends the speech too early; None for other events."""
    match event:
        case ContextFailed(code=code, message=message, retry_after_s=retry_after_s):
            return RequestError(code, message, retry_after_s)
        case SessionFailed(code, message):
            return RequestError(code, message)
        case ContextDone(reason="cancelled") | SessionOver():
            return RequestError("overloaded", "the server is shutting down")
    return None
