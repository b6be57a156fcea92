"""The native protocol: turns messages into calls of a session, and events into messages.

docs/PROTOCOL.md describes the messages.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from qwen_megakernel import __version__
from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.audio_encoding import AudioEncoder, FileFormat, open_encoder
from qwen_megakernel.serving.connection import Work
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    ContextQuiet,
    ContextStarted,
    Figures,
    SegmentDone,
    SessionFailed,
)
from qwen_megakernel.serving.loudness import LevelMeter
from qwen_megakernel.serving.native_messages import (
    ENCODINGS,
    OPUS,
    PROTOCOL,
    SAMPLE_BYTES,
    SAMPLE_RATES,
    AudioChunk,
    AudioFormat,
    Cancel,
    ClientMessage,
    Done,
    End,
    Error,
    FinishReason,
    Flush,
    Hello,
    Limits,
    Progress,
    Ready,
    Sampling,
    Segment,
    Speak,
    Started,
    Word,
    encode,
    parse_client_message,
)
from qwen_megakernel.serving.observe import edge_log
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.wire import ProtocolError, error_line, language_name
from qwen_megakernel.serving.word_timing import Pace, WordClock
from qwen_megakernel.turn import RequestError

OPUS_FILE = FileFormat("ogg", "opus")
RULES = SessionRules(max_contexts=8, when_full="8 contexts are open on this connection", max_lead_s=10.0)


class _Stream:
    """The numbered audio of a context."""

    def __init__(self, number: int, audio: AudioFormat) -> None:
        self.number = number
        self.num_samples = 0
        """Samples that were sent, at the client's rate."""
        self._sequence = count()
        self.meter = LevelMeter(SAMPLE_RATE)
        self._is_opus = audio.encoding == OPUS
        if not self._is_opus:
            self._sample_bytes = audio.sample_bytes
            self._pcm = PcmEncoder(audio.encoding, audio.sample_rate)
        self._compressor: AudioEncoder | None = None

    def audio(self, samples: np.ndarray) -> list[bytes | Work]:
        """The messages for a chunk, float32 [n] at 24 kHz. The resampler may hold all of it back."""
        if not self._is_opus:
            return self._plain(self._pcm.encode(samples))
        self.num_samples += len(samples)
        return [lambda: self._compress(samples)]

    def end_segment(self) -> list[bytes | Work]:
        """The messages for what the resampler has held back."""
        return [] if self._is_opus else self._plain(self._pcm.flush())

    def end(self) -> list[bytes | Work]:
        """The messages for the rest of the file."""
        return [lambda: self._compress(None)] if self._is_opus else []

    def _compress(self, samples: np.ndarray | None) -> list[bytes]:
        if self._compressor is None:  # not in `__init__`: the first one loads PyAV
            self._compressor = open_encoder(OPUS_FILE)
        encoder = self._compressor
        return self._pack(encoder.finish() if samples is None else encoder.encode(samples))

    def _plain(self, data: bytes) -> list[bytes | Work]:
        self.num_samples += len(data) // self._sample_bytes
        return [*self._pack(data)]

    def _pack(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        message = encode(AudioChunk(self.number, next(self._sequence), data))
        assert isinstance(message, bytes)
        return [message]


class NativeDialect:
    """One client's connection: whether it has said hello, and the streams of its contexts."""

    def __init__(self, session: Session) -> None:
        session.rules = RULES
        self._session = session
        self._greeted = False
        self._refused = False
        """Whether the client's version or format was refused. The connection is then about to close."""
        self._audio = AudioFormat()
        self._streams: dict[str, _Stream] = {}
        """Streams of contexts that have started and whose end was not sent."""
        self._clocks: dict[str, WordClock] = {}
        """Clocks of contexts whose end was not sent."""
        self._numbers = count(1)

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets an error and changes nothing."""
        if self._refused:
            return
        context_id = None
        try:
            message = parse_client_message(data)
            context_id = getattr(message, "context_id", None)
            self._follow(message)
        except RequestError as error:
            line = error_line(str(error))
            self._reply(Error(context_id, error.code, line, error.retry_after_s))
        except ProtocolError as error:
            self._reply(Error(error.context_id or context_id, error.code, error_line(str(error))))
            if error.code == "unsupported_protocol":
                self._refused = True
                self._session.finish("protocol_error")

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes | Work]:
        """The messages to send for an event."""
        match event:
            case ContextStarted(context_id):
                stream = self._streams[context_id] = _Stream(next(self._numbers), self._audio)
                return [encode(Started(context_id, stream.number))]
            case ContextAudio(context_id, samples):
                stream = self._streams[context_id]
                self._clocks[context_id].hear(stream.meter.add(samples))
                return [*stream.audio(samples)]
            case SegmentDone(context_id):
                stream = self._streams[context_id]
                stream.meter.end_segment()
                return [*stream.end_segment(), encode(self._segment(event))]
            case ContextQuiet(context_id, state, num_before):
                return [encode(Progress(context_id, state, num_before))]
            case ContextDone(context_id, reason, figures):
                ended = self._streams.pop(context_id, None)
                tail = ended.end() if ended is not None and reason != "cancelled" else []
                return [*tail, encode(self._done(context_id, reason, figures, ended))]
            case ContextFailed(context_id, code, message, figures=figures):
                error = Error(context_id, code, error_line(message), event.retry_after_s)
                ended = self._streams.pop(context_id, None)
                return [encode(error), encode(self._done(context_id, "error", figures, ended))]
            case SessionFailed(code, message):
                return [encode(Error(None, code, error_line(message)))]

    def _follow(self, message: ClientMessage) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif not self._greeted:
            raise ProtocolError("bad_request", "hello must come first")
        elif isinstance(message, Speak):
            self._speak(message)
        elif isinstance(message, Flush):
            self._complete(message.context_id, self._session.flush(message.context_id))
        elif isinstance(message, End):
            self._complete(message.context_id, self._session.end(message.context_id))
        elif isinstance(message, Cancel):
            self._session.cancel(message.context_id)

    def _speak(self, message: Speak) -> None:
        spans = self._session.append(message.context_id, message.text, _choices(message))
        clock = self._clocks.setdefault(message.context_id, WordClock(Pace(), lead_s=0.0))
        clock.add(spans)

    def _complete(self, context_id: str, rest: list[Span]) -> None:
        self._clocks[context_id].add(rest)
        self._clocks[context_id].complete_segment()

    def _greet(self, hello: Hello) -> None:
        if self._greeted:
            raise ProtocolError("bad_request", "hello was said before")
        if hello.audio.encoding not in _encodings():
            known = " or ".join(_encodings())
            raise ProtocolError("unsupported_protocol", f"opus needs PyAV on the server; it has {known}")
        self._greeted, self._audio = True, hello.audio
        server = self._session.server
        edge_log.info(
            "connection %s: %s at %d Hz for %s",
            self._session.name,
            hello.audio.encoding,
            hello.audio.sample_rate,
            hello.client or "a client without a name",
        )
        params = server.decoder.default_params
        talker, predictor = params.talker, params.predictor
        self._reply(
            Ready(
                protocol=PROTOCOL,
                encoding=hello.audio.encoding,
                sample_rate=hello.audio.sample_rate,
                encodings=_encodings(),
                sample_rates=SAMPLE_RATES,
                voices=tuple(server.decoder.voices),
                default_voice=server.decoder.default_voice,
                languages=tuple(server.decoder.languages),
                limits=Limits(server.max_text_chars, RULES.max_contexts, server.max_message_bytes),
                server=f"qwen-megakernel/{__version__}",
                sampling=Sampling(
                    talker.temperature,
                    talker.top_k,
                    talker.top_p,
                    talker.repetition_penalty,
                    predictor.temperature,
                    predictor.top_k,
                ),
                trim_leading_silence=server.trim_leading_silence or None,
                markup=server.markup or None,
            )
        )

    def _segment(self, event: SegmentDone) -> Segment:
        timed = self._clocks[event.context_id].end_segment(event.start_s + event.duration_s)
        words = [Word(word.text, round(word.time_s, 3), round(word.end_s, 3)) for word in timed]
        return Segment(
            event.context_id,
            event.index,
            round(event.start_s, 4),
            round(event.duration_s, 4),
            event.reason,
            tuple(words),
        )

    def _done(
        self, context_id: str, reason: FinishReason, figures: Figures, stream: _Stream | None
    ) -> Done:
        self._clocks.pop(context_id, None)
        samples = stream.num_samples if stream is not None else 0
        ttfc_s = figures.ttfc_s
        rtf = None if ttfc_s is None else figures.rtf  # neither exists if nothing was sent
        return Done(
            context_id,
            reason,
            samples=samples,
            duration_s=round(samples / self._audio.sample_rate, 4),
            generation_s=round(figures.generation_s, 4),
            ttfc_ms=None if ttfc_s is None else round(ttfc_s * 1000, 2),
            rtf=None if rtf is None else round(rtf, 4),
            trimmed_s=None if figures.trimmed_s is None else round(figures.trimmed_s, 4),
        )

    def _reply(self, message: Ready | Error) -> None:
        self._session.reply(encode(message))


def _encodings() -> tuple[str, ...]:
    """The encodings that this server can write."""
    return ENCODINGS if OPUS_FILE.encodable else tuple(SAMPLE_BYTES)


def _choices(message: Speak) -> SpeechOptions:
    return SpeechOptions(
        voice=message.voice,
        language=None if message.language is None else language_name(message.language),
        instruct=message.instruct,
        temperature=message.temperature,
        top_k=message.top_k,
        seed=message.seed,
        chunk_frames=message.chunk_frames,
        top_p=message.top_p,
        repetition_penalty=message.repetition_penalty,
        predictor_temperature=message.predictor_temperature,
        predictor_top_k=message.predictor_top_k,
        min_frames=message.min_frames,
        max_frames=message.max_frames,
        streaming=message.streaming,
        trim_leading_silence=message.trim_leading_silence,
        markup=message.markup,
        lexicon=message.lexicon,
        speed=message.speed,
    )
