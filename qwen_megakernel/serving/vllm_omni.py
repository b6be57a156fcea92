"""vLLM-Omni's speech over a WebSocket (docs/PROTOCOL.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.audio_encoding import AudioEncoder, FileFormat, open_encoder
from qwen_megakernel.serving.connection import Connection, Work
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    SegmentDone,
    SessionFailed,
)
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.openai_messages import find_voice
from qwen_megakernel.serving.openai_speech import FORMATS
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.text_ends import CLAUSE_END, SENTENCE_END
from qwen_megakernel.serving.vllm_omni_messages import (
    PATH,
    Close,
    Config,
    Done,
    Message,
    Place,
    Text,
    encode_done,
    encode_error,
    encode_session_done,
    encode_start,
    parse_message,
)
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.turn import RequestError

RULES = SessionRules(max_contexts=8, when_full="8 utterances are waiting", max_lead_s=10.0, own_ids=True)
_ENDS = {"sentence": SENTENCE_END, "clause": CLAUSE_END}


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The route of the WebSocket."""

    async def speak(websocket: WebSocket) -> None:
        with sessions.admit(client_address(websocket.client), RULES) as session:
            await Connection(websocket, session, VllmOmniDialect(session)).run()

    return [WebSocketRoute(PATH, speak)]


class _Sentence:
    """The file of one sentence."""

    def __init__(self, audio: FileFormat) -> None:
        self._audio = audio
        self._encoder: AudioEncoder | None = None
        self._num_bytes = 0
        """Made so far."""

    def make(self, samples: np.ndarray | None) -> list[bytes]:
        """The message for a chunk, float32 [n] at 24 kHz, or for the end of the file."""
        if self._encoder is None:  # the first one loads PyAV
            self._encoder = open_encoder(self._audio)
        data = self._encoder.finish() if samples is None else self._encoder.encode(samples)
        self._num_bytes += len(data)
        return [data] if data else []

    def end(self, place: Place, *, failed: bool) -> list[str | bytes]:
        """The last messages. A sentence that failed has no end of its file."""
        rest = [] if failed or self._encoder is None else self.make(None)
        return [*rest, encode_done(place, self._num_bytes, failed=failed)]


class _Utterance:
    """The sentences of one utterance."""

    def __init__(self, number: int, config: Config) -> None:
        self.number = number
        self._format = config.response_format
        self._audio = FORMATS[self._format]
        self._texts = deque([""])
        """Of the sentence that is spoken, and of those that wait."""
        self._num_done = 0
        self._sentence: _Sentence | None = None
        """The one that is spoken."""

    def append(self, text: str) -> None:
        """The session has taken text."""
        self._texts[-1] += text

    def complete_sentence(self) -> None:
        """The session has completed a sentence, if there was something to say."""
        if self._texts[-1].strip():
            self._texts.append("")

    def audio(self, samples: np.ndarray) -> list[str | bytes | Work]:
        """The messages for a chunk."""
        started, sentence = self._start()
        return [*started, *self._do(lambda: sentence.make(samples))]

    def end_sentence(self, *, failed: bool = False) -> list[str | bytes | Work]:
        """The messages for the end of a sentence."""
        place, (started, sentence) = self._place, self._start()
        self._sentence = None
        self._num_done += 1
        if len(self._texts) > 1:
            self._texts.popleft()
        return [*started, *self._do(lambda: sentence.end(place, failed=failed))]

    def end(self) -> str:
        """The last message."""
        return encode_session_done(self.number, self._num_done)

    def fail(self, failure: RequestError) -> list[str | bytes | Work]:
        """The messages for an utterance that breaks off."""
        error = encode_error(failure.code, str(failure), partial=self._sentence is not None)
        return [*self._start()[0], error, *self.end_sentence(failed=True), self.end()]

    def _start(self) -> tuple[list[str], _Sentence]:
        """The message that begins the sentence, if it has not begun, and the sentence."""
        if self._sentence is not None:
            return [], self._sentence
        self._sentence = _Sentence(self._audio)
        start = encode_start(self._place, self._texts[0], self._format, self._audio.sample_rate)
        return [start], self._sentence

    def _do(self, work: Work) -> Sequence[str | bytes | Work]:
        """Make messages now, or later if that needs compression."""
        return work() if self._audio.container in ("raw", "wav") else [work]

    @property
    def _place(self) -> Place:
        return Place(self.number, self._num_done)


class VllmOmniDialect:
    """One client's utterances. Each is a context, which the session knows by its number."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._config: Config | None = None
        self._open: _Utterance | None = None
        """The one that takes text."""
        self._utterances: dict[str, _Utterance] = {}
        """Those whose end was not sent."""
        self._num_utterances = 0
        self._closing = False

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets an error answer and changes nothing."""
        try:
            self._follow(parse_message(data))
        except (RequestError, ProtocolError) as error:
            self._session.reply(encode_error(error.code, str(error)))

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes | Work]:
        """The messages to send for an event."""
        match event:
            case ContextAudio(name, samples):
                return self._utterances[name].audio(samples)
            case SegmentDone(name):
                return self._utterances[name].end_sentence()
            case ContextDone(name):
                return [self._forget(name).end()]
            case ContextFailed(name, code, message):
                return self._forget(name).fail(RequestError(code, message))
            case SessionFailed(code, message):
                return [encode_error(code, message)]
        return []

    def _follow(self, message: Message) -> None:
        if self._closing:
            raise RequestError("bad_request", "the session is closing")
        match message:
            case Config():
                if self._open is not None:
                    raise RequestError("bad_request", "send input.done before another session.config")
                self._config = message
            case Text(text):
                self._append(self._config_now(), text)
            case Done():
                self._complete(self._config_now())
            case Close():
                self._closing = True
                if self._open is not None:
                    self._complete(self._config_now())
                if not self._session.busy:
                    self._session.finish("closed")

    def _config_now(self) -> Config:
        if self._config is None:
            raise RequestError("bad_request", "send session.config first")
        return self._config

    def _append(self, config: Config, text: str) -> None:
        if self._open is None:
            if not text:
                return
            self._begin(config, text)
        elif self._session.is_open(name := str(self._open.number)):
            self._session.append(name, text)
            self._open.append(text)
        else:
            return  # it has failed, and its end is on its way
        end = _ENDS.get(config.split)
        if end is not None and end.search(text) and self._open is not None:
            self._session.flush(str(self._open.number))
            self._open.complete_sentence()

    def _begin(self, config: Config, text: str) -> None:
        """Open an utterance."""
        server, utterance = self._session.server, _Utterance(self._num_utterances, config)
        name = str(utterance.number)
        choices = SpeechOptions(
            voice=find_voice(config.voice, server.voice_aliases, server.decoder.voices),
            language=config.language,
            instruct=config.instructions,
            seed=config.seed,
            speed=config.speed,
        )
        self._utterances[name] = utterance
        try:
            self._session.append(name, text, choices)
        except RequestError:
            del self._utterances[name]
            raise
        utterance.append(text)
        self._open = utterance
        self._num_utterances += 1

    def _complete(self, config: Config) -> None:
        """Mark the utterance's text as complete. One without text keeps its place among the others."""
        if self._open is None:
            self._begin(config, "")
        utterance, self._open = self._open, None
        if utterance is not None and self._session.is_open(str(utterance.number)):
            self._session.end(str(utterance.number))

    def _forget(self, name: str) -> _Utterance:
        """Drop an utterance whose end is about to be sent."""
        if self._closing and not self._session.busy:
            self._session.finish("closed")
        return self._utterances.pop(name)
