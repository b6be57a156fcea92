"""ElevenLabs' two WebSockets on a session: one text in pieces, or contexts (docs/PROTOCOL.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count

import numpy as np

from qwen_megakernel.serving.audio_encoding import AudioEncoder, FileFormat, open_encoder
from qwen_megakernel.serving.connection import Work
from qwen_megakernel.serving.elevenlabs_messages import (
    Alignment,
    Message,
    Output,
    Query,
    encode_audio,
    encode_error,
    encode_final,
    name_context,
    parse_message,
)
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    SegmentDone,
    SessionFailed,
)
from qwen_megakernel.serving.heard_words import HeardWords
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.text_ends import SENTENCE_END
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.serving.word_timing import Pace, TimedWord
from qwen_megakernel.turn import RequestError

RULES = SessionRules(
    max_contexts=8,
    when_full="8 contexts are open on this connection",
    max_lead_s=10.0,
    own_ids=True,
    side_by_side=True,
)


def file_format(output: Output) -> FileFormat:
    """The file whose pieces are the audio of a context."""
    return FileFormat(output.container, output.encoding, output.sample_rate, output.bit_rate)


class _Speech:
    """The audio and the characters of one context that go to the client."""

    def __init__(self, fields: dict[str, str | None], output: Output, pace: Pace) -> None:
        self.fields = fields
        """They name the context in a message."""
        self.flushed = True
        """Whether the client has flushed all its text."""
        self._words = HeardWords(pace)
        self._alignment = Alignment()
        self._file = file_format(output)
        self._pcm = (
            PcmEncoder(output.encoding, output.sample_rate) if output.container == "raw" else None
        )
        self._compressor: AudioEncoder | None = None
        """Opened by the first work, which may still wait when the context ends."""
        self._has_audio = False

    def add(self, spans: list[Span]) -> None:
        """The session has taken text, and reads it as `spans`."""
        self._words.add(spans)

    def close_segment(self) -> None:
        """The session has completed the segment."""
        self._words.complete_segment()

    def audio(self, samples: np.ndarray) -> list[str | bytes | Work]:
        """The messages for a chunk, with the characters of words that have begun in it."""
        self._has_audio = True
        self._words.hear(samples)
        words = self._words.begun()
        if self._pcm is None:
            return [self._compress(samples, words)]
        return [*self._pack(self._pcm.encode(samples), words)]

    def end_segment(self) -> list[str | bytes | Work]:
        """The messages for the rest of a segment. A compressed file has its rest at its end."""
        words = self._words.end_segment()
        return [*self._pack(b"" if self._pcm is None else self._pcm.flush(), words, ends=True)]

    def end(self) -> list[str | bytes | Work]:
        """The last messages of a context that was spoken to its end."""
        rest: list[str | bytes | Work] = []
        if self._pcm is None and self._has_audio:
            rest.append(self._compress(None, []))
        return [*rest, encode_final(self.fields)]

    def _compress(self, samples: np.ndarray | None, words: Sequence[TimedWord]) -> Work:
        """`samples` None ends the file."""
        alignment = self._alignment.align(words)

        def work() -> list[str]:
            if self._compressor is None:  # the first one loads PyAV
                self._compressor = open_encoder(self._file)
            encoder = self._compressor
            data = encoder.finish() if samples is None else encoder.encode(samples)
            return [encode_audio(self.fields, data, alignment)] if data or alignment else []

        return work

    def _pack(self, data: bytes, words: Sequence[TimedWord], *, ends: bool = False) -> list[str]:
        alignment = self._alignment.align(words, ends=ends)
        return [encode_audio(self.fields, data, alignment)] if data or alignment else []


class _Dialect(ABC):
    """What both sockets have in common. The session knows contexts by numbers."""

    multi: bool
    """Whether the socket has several contexts."""

    def __init__(self, session: Session, query: Query, voice: str | None, pace: Pace) -> None:
        """`pace`: the voice's, learned from all clients."""
        self._session, self._query, self._voice, self._pace = session, query, voice, pace
        self._numbers = count(1)
        self._speech: dict[str, _Speech] = {}
        """Contexts by the session's ids, until their end is sent."""

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets an error answer and changes nothing."""
        context_id = None
        try:
            message = parse_message(data, multi=self.multi)
            context_id = message.context_id
            self._follow(message)
        except (RequestError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                context_id = error.context_id
            self._session.reply(encode_error(self._fields(context_id), error.code, str(error)))

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes | Work]:
        """The messages to send for an event."""
        match event:
            case ContextAudio(name, samples):
                return self._speech[name].audio(samples)
            case SegmentDone(name):
                return self._speech[name].end_segment()
            case ContextDone(name, reason):
                speech = self._forget(name)
                return [encode_final(speech.fields)] if reason == "cancelled" else speech.end()
            case ContextFailed(name, code, message):
                fields = self._forget(name, failed=True).fields
                return [encode_error(fields, code, message), encode_final(fields)]
            case SessionFailed(code, message):
                return [encode_error(self._fields(None), code, message)]
        return []

    @abstractmethod
    def _follow(self, message: Message) -> None:
        """Act on a message. Raises `RequestError` for one that is refused."""

    def _forget(self, name: str, *, failed: bool = False) -> _Speech:
        """Drop a context whose end is about to be sent."""
        return self._speech.pop(name)

    def _fields(self, context_id: str | None) -> dict[str, str | None]:
        return name_context(context_id) if self.multi else {}

    def _open(self, message: Message) -> str:
        """Open a context with a message's text. Returns the session's id."""
        name = str(next(self._numbers))
        choices = SpeechOptions(
            voice=self._voice,
            language=self._query.language,
            seed=self._query.seed,
            markup=self._query.markup,
            speed=message.speed,
        )
        speech = _Speech(self._fields(message.context_id), self._query.output, self._pace)
        self._speech[name] = speech
        text = message.text or ""
        try:  # a first text that is blank asks for nothing
            spans = self._session.append(name, text if text.strip() else "", choices)
        except RequestError:
            del self._speech[name]
            raise
        self._note(name, message, spans)
        return name

    def _append(self, name: str, message: Message) -> None:
        """Append a message's text to an open context."""
        spans = self._session.append(name, message.text) if message.text else []
        self._note(name, message, spans)

    def _note(self, name: str, message: Message, spans: list[Span]) -> None:
        """Note what the session has taken, and complete the segment if the message says so."""
        speech = self._speech[name]
        speech.add(spans)
        text = message.text or ""
        speech.flushed = message.flush or (speech.flushed and not text.strip())
        if not self._session.is_open(name):
            return  # it has failed, and its end is on its way
        if message.flush or (self._query.auto_mode and SENTENCE_END.search(text)):
            speech.add(self._session.flush(name))
            speech.close_segment()

    def _end(self, name: str) -> None:
        """Complete a context: all of its text is spoken."""
        if self._session.is_open(name):
            self._speech[name].add(self._session.end(name))
            self._speech[name].close_segment()


class StreamDialect(_Dialect):
    """`stream-input`: one text. An empty text ends it, and the socket closes behind its audio."""

    multi = False

    def __init__(self, session: Session, query: Query, voice: str | None, pace: Pace) -> None:
        super().__init__(session, query, voice, pace)
        self._name: str | None = None
        self._ended = False

    def _follow(self, message: Message) -> None:
        if self._ended:
            raise RequestError("bad_request", "the text has ended")
        if self._name is None:
            if message.text is None:
                return  # a flush of nothing
            self._name = self._open(message)
        elif self._session.is_open(self._name):
            self._append(self._name, message)
        if message.text == "" and not message.flush:
            self._ended = True
            self._end(self._name)

    def _forget(self, name: str, *, failed: bool = False) -> _Speech:
        self._session.finish("refused" if failed else "closed")
        return super()._forget(name)


class MultiDialect(_Dialect):
    """`multi-stream-input`: contexts that the client names. An id may be used again after its close."""

    multi = True

    def __init__(self, session: Session, query: Query, voice: str | None, pace: Pace) -> None:
        super().__init__(session, query, voice, pace)
        self._open_names: dict[str | None, str] = {}
        """The session's ids of contexts that take text, by the client's ids."""
        self._closing_names: dict[str | None, str] = {}
        """The same of contexts that are closed and still speak what was flushed."""
        self._closing = False

    def _follow(self, message: Message) -> None:
        if message.close_socket:
            self._close_socket()
        elif message.close_context:
            self._close(message.context_id)
        elif self._closing:
            raise RequestError("bad_request", "the socket is closing")
        else:
            self._speak(message)

    def _speak(self, message: Message) -> None:
        name = self._open_names.get(message.context_id)
        if name is not None and self._session.is_open(name):
            self._append(name, message)
        elif message.text:  # otherwise it keeps a context alive, or flushes it, that has no text
            self._open_names[message.context_id] = self._open(message)

    def _close(self, context_id: str | None) -> None:
        """Let a context speak what the client has flushed; stop it if that is not all of its text.

        A client that closes a context twice has been interrupted while it was speaking the rest.
        """
        name = self._open_names.pop(context_id, None)
        if name is None:
            name = self._closing_names.pop(context_id, None)
        elif self._speech[name].flushed:
            self._closing_names[context_id] = name
            self._end(name)
            return
        if name is not None and self._session.is_open(name):
            self._session.cancel(name)

    def _close_socket(self) -> None:
        if self._closing:
            self._session.cancel()
        self._closing = True
        for context_id in list(self._open_names):
            self._close(context_id)
        if not self._session.busy:
            self._session.finish("closed")

    def _forget(self, name: str, *, failed: bool = False) -> _Speech:
        if self._closing and not self._session.busy:
            self._session.finish("closed")
        speech = super()._forget(name)
        context_id = speech.fields["contextId"]
        for names in (self._open_names, self._closing_names):
            if names.get(context_id) == name:
                del names[context_id]
        return speech
