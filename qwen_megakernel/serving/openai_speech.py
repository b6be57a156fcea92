"""OpenAI's speech API over HTTP: a request is a session of one context (docs/PROTOCOL.md).

The answer begins with the first audio, so that a refusal still has its status. Two tasks serve a
request: one waits for the client to hang up, the other speaks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.audio_encoding import (
    MEDIA_TYPES,
    AudioEncoder,
    is_encodable,
    open_encoder,
)
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextFailed,
    SessionEvent,
    SessionFailed,
    SessionOver,
)
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.openai_messages import (
    MODEL_NAMES,
    MODELS_PATH,
    SPEECH_PATH,
    VOICES_PATH,
    SpeechError,
    SpeechRequest,
    delta_event,
    done_event,
    error_body,
    error_event,
    find_voice,
    model_list,
    parse_speech,
)
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.session import Session, SessionRules
from qwen_megakernel.serving.voice_messages import voice_entry
from qwen_megakernel.serving.wire import error_line
from qwen_megakernel.turn import ErrorCode, RequestError

RULES = SessionRules(max_contexts=1, when_full="a request is one text", max_lead_s=3600.0)
"""A client that wants a file need not wait as long as it plays. One that reads slowly holds the
engine by what it leaves unread."""
_CONTEXT = "speech"
_STATUS: dict[ErrorCode, int] = {"overloaded": 503, "internal": 500}
_PARAMS: dict[ErrorCode, str] = {
    "unknown_voice": "voice",
    "unknown_language": "language",
    "text_too_long": "input",
}
_RETRY_S = 5


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The three routes."""

    async def speak(request: Request) -> Response:
        return _Speech(sessions)

    async def list_voices(request: Request) -> Response:
        voices = sessions.get_ready().decoder.voices
        entries = [voice_entry(name, voices[name].mode, voices[name].notes) for name in sorted(voices)]
        return JSONResponse({"voices": entries})

    async def list_models(request: Request) -> Response:
        model = sessions.get_ready().decoder.description["model"]
        return JSONResponse(model_list([model, *MODEL_NAMES]))

    return [
        Route(SPEECH_PATH, speak, methods=["POST"]),
        Route(VOICES_PATH, list_voices),
        Route(MODELS_PATH, list_models),
    ]


def speak_request(sessions: OpenSessions, request: SpeechRequest) -> Response:
    """The answer to a request whose body says nothing: the speech that is asked for here."""
    return _Speech(sessions, request)


class _Speech(Response):
    """The answer to one request."""

    def __init__(self, sessions: OpenSessions, request: SpeechRequest | None = None) -> None:
        """`request` is what to speak where the body does not say it."""
        self._sessions, self._request = sessions, request
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._sessions.admit(client_address(scope["client"]), RULES) as session:
            try:
                body = await _read_body(receive, session.server.max_message_bytes)
                if body is None:
                    return
                request = self._request or parse_speech(body)
                _begin(session, request)
            except (SpeechError, RequestError) as error:
                await refusal_of(error)(scope, receive, send)
                return
            speaking = asyncio.create_task(_answer(session, request, scope, receive, send))
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


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """All of it; None if the client has left. Raises `SpeechError` beyond a limit in bytes."""
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


def _begin(session: Session, request: SpeechRequest) -> None:
    if not is_encodable(request.response_format):
        raise SpeechError(
            400,
            f"response_format {request.response_format} needs PyAV, which the server lacks: "
            "its operator can `pip install av`; wav and pcm work without",
            "unsupported",
            "response_format",
        )
    server = session.server
    choices = SpeechOptions(
        voice=find_voice(request.voice, server.voice_aliases, server.decoder.voices),
        language=request.language,
        instruct=request.instructions,
        seed=request.seed,
    )
    session.append(_CONTEXT, request.text, choices, ended=True)


async def _answer(
    session: Session, request: SpeechRequest, scope: Scope, receive: Receive, send: Send
) -> None:
    """Speak. Speech that breaks off leaves the answer without its end, so that clients notice."""
    encoder = await asyncio.to_thread(open_encoder, request.response_format)
    events = await _first_events(session)
    if isinstance(events, RequestError):
        await refusal_of(events)(scope, receive, send)
        return
    media_type = "text/event-stream" if request.as_events else MEDIA_TYPES[request.response_format]
    headers = Response(None, headers={"Cache-Control": "no-cache"}, media_type=media_type).raw_headers
    await send({"type": "http.response.start", "status": 200, "headers": _without_length(headers)})
    try:
        async for data in _file(session, events, encoder):
            message = delta_event(data) if request.as_events else data
            await send({"type": "http.response.body", "body": message, "more_body": True})
    except RequestError as failure:
        if not request.as_events:
            return
        last = error_event(error_line(str(failure)), failure.code)
    else:
        last = done_event() if request.as_events else b""
    await send({"type": "http.response.body", "body": last, "more_body": False})


def _without_length(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name != b"content-length"]


async def _first_events(session: Session) -> list[SessionEvent] | RequestError:
    """Those with the first audio or the end, or why there is none."""
    while True:
        events = await session.take()
        for event in events:
            failure = _failure_of(event)
            if failure is not None:
                return failure
            if isinstance(event, (ContextAudio, ContextDone)):
                return events


async def _file(
    session: Session, events: Sequence[SessionEvent], encoder: AudioEncoder
) -> AsyncIterator[bytes]:
    """The bytes of the audio file. Raises `RequestError` if the speech breaks off."""
    while True:
        for event in events:
            failure = _failure_of(event)
            if failure is not None:
                raise failure
            if isinstance(event, ContextAudio) and (data := await _encode(encoder, event.samples)):
                yield data
            if isinstance(event, ContextDone):
                if data := await _encode(encoder, None):
                    yield data
                return
        events = await session.take()


async def _encode(encoder: AudioEncoder, samples: np.ndarray | None) -> bytes:
    """Bytes after a chunk; after the last one for None."""
    # Compression takes a millisecond a frame, and other clients' audio must not wait for it.
    if encoder.compresses:
        return await asyncio.to_thread(_encode_now, encoder, samples)
    return _encode_now(encoder, samples)


def _encode_now(encoder: AudioEncoder, samples: np.ndarray | None) -> bytes:
    return encoder.finish() if samples is None else encoder.encode(samples)


def _failure_of(event: SessionEvent) -> RequestError | None:
    """Why speech ends before its time, if it does."""
    match event:
        case ContextFailed(code=code, message=message, retry_after_s=retry_after_s):
            return RequestError(code, message, retry_after_s)
        case SessionFailed(code, message):
            return RequestError(code, message)
        case ContextDone(reason="cancelled") | SessionOver():
            return RequestError("overloaded", "the server is shutting down")
    return None


def refusal_of(error: SpeechError | RequestError) -> Response:
    """The answer that says no, in OpenAI's shape."""
    message, code = error_line(str(error)), error.code
    if isinstance(error, SpeechError):
        return JSONResponse(error_body(error.status, message, code, error.param), error.status)
    status = _STATUS.get(error.code, 400)
    headers = {"Retry-After": str(math.ceil(error.retry_after_s or _RETRY_S))} if status == 503 else None
    return JSONResponse(error_body(status, message, code, _PARAMS.get(error.code)), status, headers)
