"""ElevenLabs' speech API over WebSockets and HTTP (docs/PROTOCOL.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.connection import Connection
from qwen_megakernel.serving.elevenlabs_messages import (
    SPEECH_PATH,
    VOICE_PAGES_PATH,
    VOICES_PATH,
    Alignment,
    Query,
    encode_line,
    error_body,
    parse_query,
    parse_request,
    voice_object,
    voice_page,
)
from qwen_megakernel.serving.elevenlabs_sockets import (
    RULES,
    MultiDialect,
    StreamDialect,
    file_format,
)
from qwen_megakernel.serving.heard_words import HeardWords
from qwen_megakernel.serving.http_speech import FileAnswer, SpokenFile
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.wire import SpeechError
from qwen_megakernel.serving.word_timing import Pace, PaceOf, TimedWord, voice_paces
from qwen_megakernel.turn import ErrorCode, RequestError

_VOICE_PATH = SPEECH_PATH + "/{voice}"


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The routes of the WebSockets, of audio files, and of the voices."""

    pace_of = voice_paces()

    async def stream(websocket: WebSocket) -> None:
        await _serve(sessions, websocket, StreamDialect, pace_of)

    async def multi_stream(websocket: WebSocket) -> None:
        await _serve(sessions, websocket, MultiDialect, pace_of)

    async def speak_file(request: Request) -> Response:
        return FileAnswer(sessions, _Files(pace_of))

    async def speak_lines(request: Request) -> Response:
        return FileAnswer(sessions, _Files(pace_of, with_times=True))

    async def list_voices(request: Request) -> Response:
        voices = sorted(sessions.get_ready().decoder.voices)
        return JSONResponse({"voices": [voice_object(name) for name in voices]})

    async def get_voice(request: Request) -> Response:
        name = request.path_params["voice"]
        if name not in sessions.get_ready().decoder.voices:
            return JSONResponse(error_body(404, "there is no voice of this id"), 404)
        return JSONResponse(voice_object(name))

    async def page_voices(request: Request) -> Response:
        names = sessions.get_ready().decoder.voices
        try:
            return JSONResponse(voice_page(names, dict(request.query_params)))
        except SpeechError as error:
            return JSONResponse(error_body(error.status, str(error), error.code), error.status)

    return [
        WebSocketRoute(_VOICE_PATH + "/stream-input", stream),
        WebSocketRoute(_VOICE_PATH + "/multi-stream-input", multi_stream),
        Route(_VOICE_PATH, speak_file, methods=["POST"]),
        Route(_VOICE_PATH + "/stream", speak_file, methods=["POST"]),
        Route(_VOICE_PATH + "/stream/with-timestamps", speak_lines, methods=["POST"]),
        Route(VOICES_PATH, list_voices),
        Route(VOICES_PATH + "/{voice}", get_voice),
        Route(VOICE_PAGES_PATH, page_voices),
    ]


async def _serve(
    sessions: OpenSessions,
    websocket: WebSocket,
    dialect: type[StreamDialect] | type[MultiDialect],
    pace_of: PaceOf,
) -> None:
    query = parse_query(dict(websocket.query_params))
    rules = replace(RULES, idle_s=query.inactivity_s)
    with sessions.admit(client_address(websocket.client), rules) as session:
        voice = _check(websocket.path_params["voice"], query, session.server)
        await Connection(websocket, session, dialect(session, query, voice, pace_of(voice))).run()


def _check(given: str, query: Query, server: ServerState) -> str | None:
    """The voice's name here. Refuses a handshake whose voice, language or format cannot be served."""
    try:
        voice = server.voice_name(_name(given, server))
        server.decoder.check(voice, query.language or "auto", instruct=None)
    except RequestError as error:
        raise SpeechError(400, str(error), error.code) from None
    if not file_format(query.output).encodable:
        message = f"{query.output.encoding} needs PyAV, which the server lacks; PCM works without"
        raise SpeechError(400, message, "unsupported", "output_format")
    return voice


def _name(given: str, server: ServerState) -> str | None:
    """The voice that a path names; None is the default voice."""
    return None if given == "default" and given not in server.decoder.voices else given


class _Files:
    """The requests for a file. With times, the answer is lines of JSON."""

    def __init__(self, pace_of: PaceOf, *, with_times: bool = False) -> None:
        self._pace_of, self._with_times = pace_of, with_times

    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        query = parse_query(dict(request.query_params))
        asked = parse_request(body)
        choices = SpeechOptions(
            voice=_name(request.path_params["voice"], server),
            language=asked.language or query.language,
            seed=asked.seed if asked.seed is not None else query.seed,
            markup=query.markup,
            speed=asked.speed,
        )
        framing = _Lines(self._pace_of(choices.voice)) if self._with_times else None
        return SpokenFile(asked.text, choices, file_format(query.output), framing=framing)

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> Any:
        return error_body(status, message, code)

    def param_of(self, code: ErrorCode) -> str | None:
        return None


class _Lines:
    """Lines of JSON with audio and the characters that begin in it."""

    media_type = "application/json"

    def __init__(self, pace: Pace) -> None:
        self._words, self._alignment = HeardWords(pace), Alignment()

    def begin(self, spans: Sequence[Span]) -> None:
        self._words.add(spans)
        self._words.complete_segment()

    def hear(self, samples: np.ndarray) -> None:
        self._words.hear(samples)

    def delta(self, audio: bytes) -> bytes:
        return self._line(audio, self._words.begun())

    def done(self) -> bytes:
        words = self._words.end_segment()
        return self._line(b"", words, ends=True) if words else b""

    def error(self, failure: RequestError) -> bytes | None:
        return None

    def _line(self, audio: bytes, words: Sequence[TimedWord], *, ends: bool = False) -> bytes:
        return encode_line(audio, self._alignment.align_in_seconds(words, ends=ends))
