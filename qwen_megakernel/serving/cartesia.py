"""Cartesia's speech API over WebSocket and HTTP (docs/PROTOCOL.md)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from itertools import count
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.audio_encoding import FileFormat
from qwen_megakernel.serving.cartesia_messages import (
    BYTES_PATH,
    SOCKET_PATH,
    VOICES_PATH,
    Cancel,
    Generate,
    encode_chunk,
    encode_done,
    encode_error,
    encode_flush_done,
    encode_words,
    error_body,
    parse_bytes,
    parse_message,
    voice_object,
    voice_page,
)
from qwen_megakernel.serving.connection import Connection
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    SegmentDone,
    SessionFailed,
)
from qwen_megakernel.serving.heard_words import HeardWords
from qwen_megakernel.serving.http_speech import FileAnswer, SpokenFile
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.text_ends import SENTENCE_END
from qwen_megakernel.serving.wire import ProtocolError, SpeechError
from qwen_megakernel.serving.word_timing import Pace, PaceOf, TimedWord, voice_paces
from qwen_megakernel.turn import ErrorCode, RequestError

RULES = SessionRules(
    max_contexts=8,
    when_full="8 contexts are open on this connection",
    max_lead_s=10.0,
    own_ids=True,
    side_by_side=True,
)


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The routes of the WebSocket, of audio files, and of the voices."""

    pace_of = voice_paces()

    async def speak(websocket: WebSocket) -> None:
        with sessions.admit(client_address(websocket.client), RULES) as session:
            await Connection(websocket, session, CartesiaDialect(session, pace_of)).run()

    async def speak_file(request: Request) -> Response:
        return FileAnswer(sessions, _Bytes())

    async def list_voices(request: Request) -> Response:
        try:
            return JSONResponse(
                voice_page(sessions.get_ready().decoder.voices, dict(request.query_params))
            )
        except SpeechError as error:
            return JSONResponse(error_body(error.status, str(error), error.code), error.status)

    async def get_voice(request: Request) -> Response:
        name = request.path_params["voice"]
        if name not in sessions.get_ready().decoder.voices:
            return JSONResponse(error_body(404, "there is no voice of this id"), 404)
        return JSONResponse(voice_object(name))

    return [
        WebSocketRoute(SOCKET_PATH, speak),
        Route(BYTES_PATH, speak_file, methods=["POST"]),
        Route(VOICES_PATH, list_voices),
        Route(VOICES_PATH + "/{voice}", get_voice),
    ]


class _Bytes:
    """`POST /tts/bytes`."""

    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        asked = parse_bytes(body)
        output = asked.output
        audio = FileFormat(output.container, output.encoding, output.sample_rate, output.bit_rate)
        return SpokenFile(asked.text, _choices(asked), audio)

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> Any:
        return error_body(status, message, code, param)

    def param_of(self, code: ErrorCode) -> str | None:
        return None


class _Context:
    """The audio, words and flushes of one context that go to the client."""

    def __init__(self, first: Generate, context_id: str, pace: Pace) -> None:
        self.context_id = context_id
        """The client's id of the context."""
        self._pcm = PcmEncoder(first.output.encoding, first.output.sample_rate)
        self._words = HeardWords(pace) if first.timestamps else None
        self._sent_at = time.monotonic()
        self._num_flushes = 0
        self._num_closed = 0
        """Segments whose text is complete."""
        self._num_done = 0
        """Segments whose audio is complete."""
        self._flush_ids: list[int] = []
        """The flush id of each segment with something to say."""
        self._unsent_flushes: deque[tuple[int, int]] = deque()
        """For each flush, the number of segments that must be done before its answer, and its id."""

    def append(self, text: str, spans: list[Span]) -> None:
        """Note text that the session has taken and reads as `spans`."""
        self.add(spans)
        if text.strip() and len(self._flush_ids) == self._num_closed:
            self._flush_ids.append(self._num_flushes + 1)

    def add(self, spans: list[Span]) -> None:
        """Note further spans of text that the session took before."""
        if self._words is not None:
            self._words.add(spans)

    def close_segment(self) -> None:
        """Note that the session has completed the segment, if there was something to say."""
        if self._words is not None:
            self._words.complete_segment()
        self._num_closed = len(self._flush_ids)

    def flush(self) -> list[str]:
        """Note a flush of the client. Returns the messages that can answer at once."""
        self._num_flushes += 1
        self._unsent_flushes.append((self._num_closed, self._num_flushes))
        return self._finished_flushes()

    def audio(self, event: ContextAudio) -> list[str]:
        """The messages for a chunk and for the words that have begun in it."""
        messages = self._chunk(self._pcm.encode(event.samples))
        if self._words is not None:
            self._words.hear(event.samples)
            messages += self._times(self._words.begun())
        return messages

    def end_segment(self) -> list[str]:
        """The messages for the rest of a segment."""
        messages = self._chunk(self._pcm.flush())
        if self._words is not None:
            messages += self._times(self._words.end_segment())
        self._num_done += 1
        return messages + self._finished_flushes()

    @property
    def _flush_id(self) -> int:
        return self._flush_ids[self._num_done]

    def _times(self, words: list[TimedWord]) -> list[str]:
        return [encode_words(self.context_id, words, self._flush_id)] if words else []

    def _chunk(self, audio: bytes) -> list[str]:
        if not audio:
            return []
        before, self._sent_at = self._sent_at, time.monotonic()
        step_ms = (self._sent_at - before) * 1000
        return [encode_chunk(self.context_id, audio, self._flush_id, step_ms)]

    def _finished_flushes(self) -> list[str]:
        messages = []
        while self._unsent_flushes and self._unsent_flushes[0][0] <= self._num_done:
            _, flush_id = self._unsent_flushes.popleft()
            messages.append(encode_flush_done(self.context_id, flush_id))
        return messages


class CartesiaDialect:
    """One client's contexts. The session gets numbers as ids, so that a client may use an id again."""

    def __init__(self, session: Session, pace_of: PaceOf) -> None:
        """`pace_of`: a voice's pace by its name, learned from all clients."""
        self._session = session
        self._numbers = count(1)
        self._names: dict[str, str] = {}
        """The session's ids of open contexts, by the client's ids."""
        self._contexts: dict[str, _Context] = {}
        """Contexts by the session's ids, until their end is sent."""
        self._pace_of = pace_of

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets an error answer and changes nothing."""
        context_id = None
        try:
            message = parse_message(data)
            context_id = message.context_id
            if isinstance(message, Cancel):
                self._cancel(message.context_id)
            else:
                if context_id is None:  # no later message could continue it
                    context_id = f"context-{next(self._numbers)}"
                    message = replace(message, more=False)
                self._generate(message, context_id)
        except (RequestError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                context_id = error.context_id
            done = context_id not in self._names
            self._session.reply(encode_error(context_id, error.code, str(error), done=done))

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes]:
        """The messages to send for an event."""
        match event:
            case ContextAudio(name):
                return [*self._contexts[name].audio(event)]
            case SegmentDone(name):
                return [*self._contexts[name].end_segment()]
            case ContextDone(name):
                return [encode_done(self._forget(name))]
            case ContextFailed(name, code, message):
                return [encode_error(self._forget(name), code, message, done=True)]
            case SessionFailed(code, message):
                return [encode_error(None, code, message, done=True)]
        return []

    def _generate(self, message: Generate, context_id: str) -> None:
        name = self._names.get(context_id)
        if name is None:
            name = str(next(self._numbers))
            self._names[context_id] = name
            self._contexts[name] = _Context(message, context_id, self._pace_of(message.voice))
            try:
                spans = self._session.append(name, message.text, _choices(message))
            except RequestError:
                self._forget(name)
                raise
        else:  # voice and language are those of the context's first message
            spans = self._session.append(name, message.text)
        context = self._contexts[name]
        context.append(message.text, spans)
        if not self._session.is_open(name):  # it has failed, and its end is on its way
            del self._names[context_id]
            return
        if not message.more:
            context.add(self._session.end(name))
            context.close_segment()
        elif message.flush or (message.unbuffered and SENTENCE_END.search(message.text)):
            context.add(self._session.flush(name))
            context.close_segment()
        if message.flush:
            for line in context.flush():
                self._session.reply(line)

    def _cancel(self, context_id: str) -> None:
        # A context may have ended while the client still plays it. Then there is nothing to stop.
        name = self._names.pop(context_id, None)
        if name is not None and self._session.is_open(name):
            self._session.cancel(name)

    def _forget(self, name: str) -> str:
        """Drop a context. Returns the client's id for it."""
        context_id = self._contexts.pop(name).context_id
        if self._names.get(context_id) == name:
            del self._names[context_id]
        return context_id


def _choices(message: Generate) -> SpeechOptions:
    return SpeechOptions(voice=message.voice, language=message.language, seed=message.seed)
