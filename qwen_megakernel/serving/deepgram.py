"""Deepgram's speech API over WebSocket and HTTP (docs/PROTOCOL.md)."""

from __future__ import annotations

import uuid
from itertools import count
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from qwen_megakernel import __version__
from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.audio_encoding import FileFormat
from qwen_megakernel.serving.connection import Connection
from qwen_megakernel.serving.deepgram_messages import (
    PATH,
    Clear,
    Close,
    Flush,
    Message,
    Query,
    Speak,
    encode_cleared,
    encode_error,
    encode_flushed,
    encode_metadata,
    encode_warning,
    error_body,
    parse_message,
    parse_query,
    parse_text,
)
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    SegmentDone,
    SessionFailed,
)
from qwen_megakernel.serving.http_speech import FileAnswer, SpokenFile
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.wire import ProtocolError, SpeechError
from qwen_megakernel.turn import ErrorCode, RequestError

RULES = SessionRules(
    max_contexts=32, when_full="32 flushed texts are waiting", max_lead_s=10.0, own_ids=True
)
_CONTAINERS = {"opus": "ogg", "mp3": "mp3", "flac": "flac", "aac": "adts"}
"""The container of each compressed encoding."""


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The routes of the WebSocket and of audio files."""

    async def speak(websocket: WebSocket) -> None:
        with sessions.admit(client_address(websocket.client), RULES) as session:
            query = parse_query(dict(websocket.query_params), socket=True)
            _check_voice(query, session.server)
            await Connection(websocket, session, DeepgramDialect(session, query)).run()

    async def speak_file(request: Request) -> Response:
        return FileAnswer(sessions, _Rest())

    return [WebSocketRoute(PATH, speak), Route(PATH, speak_file, methods=["POST"])]


class _Rest:
    """`POST /v1/speak`."""

    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        query = parse_query(dict(request.query_params), socket=False)
        text = parse_text(body)
        raw = "raw" if query.container == "none" else query.container
        audio = FileFormat(
            _CONTAINERS.get(query.encoding, raw), query.encoding, query.sample_rate, query.bit_rate
        )
        headers = {
            "dg-request-id": str(uuid.uuid4()),
            "dg-model-name": server.decoder.description["model"],
            "dg-char-count": str(len(text)),
        }
        return SpokenFile(text, _choices(query), audio, headers)

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> Any:
        return error_body(status, message, code)

    def param_of(self, code: ErrorCode) -> str | None:
        return None


class DeepgramDialect:
    """One client's texts. The text between two flushes is a context."""

    def __init__(self, session: Session, query: Query) -> None:
        self._session, self._query = session, query
        self._pcm = self._new_encoder()
        self._numbers = count(1)
        self._sequence = count()
        self._open: str | None = None
        """The context that takes text."""
        self._flushes: dict[str, int] = {}
        """The number of flushes that each context's end answers."""
        self._closing = False
        model = session.server.decoder.description["model"]
        session.reply(encode_metadata(str(uuid.uuid4()), model, __version__))

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets a warning and changes nothing."""
        try:
            self._follow(parse_message(data))
        except (RequestError, ProtocolError) as error:
            self._session.reply(encode_warning(error.code, str(error)))

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes]:
        """The messages to send for an event."""
        match event:
            case ContextAudio(samples=samples):
                return _unless_empty(self._pcm.encode(samples))
            case SegmentDone():
                return _unless_empty(self._pcm.flush())
            case ContextDone(context_id):
                return self._end(context_id)
            case ContextFailed(context_id, code, message):
                self._pcm = self._new_encoder()
                return [encode_error(code, message), *self._end(context_id)]
            case SessionFailed(code, message):
                return [encode_error(code, message)]
        return []

    def _follow(self, message: Message) -> None:
        match message:
            case Speak(text):
                self._speak(text)
            case Flush():
                self._flush()
            case Clear():
                self._clear()
            case Close():
                self._closing = True
                self._complete()
                if not self._session.busy:
                    self._session.finish("closed")

    def _speak(self, text: str) -> None:
        if self._open is not None and self._session.is_open(self._open):
            try:
                self._session.append(self._open, text)
                return
            except RequestError as error:
                if error.code != "text_too_long":
                    raise
            self._complete()  # the next text is a context of its own
        context_id = str(next(self._numbers))
        self._session.append(context_id, text, _choices(self._query))
        self._open, self._flushes[context_id] = context_id, 0

    def _flush(self) -> None:
        waiting = self._complete() or next(reversed(self._flushes), None)
        if waiting is None:
            self._session.reply(encode_flushed(next(self._sequence)))
        else:
            self._flushes[waiting] += 1

    def _clear(self) -> None:
        self._flushes.clear()
        self._open = None
        self._session.cancel()
        self._pcm = self._new_encoder()
        self._session.reply(encode_cleared(next(self._sequence)))

    def _complete(self) -> str | None:
        """Mark the text as complete. Returns the context's id; None if there was no context."""
        context_id, self._open = self._open, None
        if context_id is not None and self._session.is_open(context_id):
            self._session.end(context_id)
        return context_id

    def _end(self, context_id: str) -> list[str | bytes]:
        """End a context. Returns the answers to its flushes."""
        if self._open == context_id:
            self._open = None
        num_flushes = self._flushes.pop(context_id, 0)
        if self._closing and not self._session.busy:
            self._session.finish("closed")
        return [encode_flushed(next(self._sequence)) for _ in range(num_flushes)]

    def _new_encoder(self) -> PcmEncoder:
        return PcmEncoder(self._query.encoding, self._query.sample_rate)


def _unless_empty(data: bytes) -> list[str | bytes]:
    return [data] if data else []


def _check_voice(query: Query, server: ServerState) -> None:
    """Refuse a handshake whose voice or language the server cannot speak."""
    language = query.language or "auto"
    try:
        server.decoder.check(server.voice_name(query.voice), language, instruct=None)
    except RequestError as error:
        raise SpeechError(400, str(error), error.code) from None


def _choices(query: Query) -> SpeechOptions:
    return SpeechOptions(voice=query.voice, language=query.language, seed=query.seed)
