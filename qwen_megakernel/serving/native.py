"""The native protocol on the wire: messages to contexts, events to messages (docs/PROTOCOL.md)."""

from __future__ import annotations

from itertools import count

from qwen_megakernel import __version__
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
from qwen_megakernel.serving.native_messages import (
    ENCODINGS,
    PROTOCOL,
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
    ServerMessage,
    Speak,
    Started,
    encode,
    parse_client_message,
)
from qwen_megakernel.serving.observe import log
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.session import Session, SessionRules
from qwen_megakernel.serving.wire import ProtocolError, error_line, language_name
from qwen_megakernel.turn import RequestError

RULES = SessionRules(max_contexts=8, when_full="8 contexts are open on this connection", max_lead_s=10.0)


class _Stream:
    """The numbered audio of a context."""

    def __init__(self, number: int, audio: AudioFormat) -> None:
        self.number = number
        self.num_samples = 0
        """Sent, at the client's rate."""
        self._sample_bytes = audio.sample_bytes
        self._encoder = PcmEncoder(audio.encoding, audio.sample_rate)
        self._sequence = 0

    def chunks(self, event: ContextAudio | SegmentDone) -> list[AudioChunk]:
        """Samples to send, if the resampler gives any."""
        if isinstance(event, ContextAudio):
            data = self._encoder.encode(event.samples)
        else:
            data = self._encoder.flush()
        if not data:
            return []
        self.num_samples += len(data) // self._sample_bytes
        self._sequence += 1
        return [AudioChunk(self.number, self._sequence - 1, data)]


class NativeDialect:
    """One client's dialogue."""

    def __init__(self, session: Session) -> None:
        session.rules = RULES
        self._session = session
        self._greeted = False
        self._refused = False
        """The client speaks another version, and the connection is about to be closed."""
        self._audio = AudioFormat()
        self._streams: dict[str, _Stream] = {}
        """Of contexts that have started and whose end was not told."""
        self._numbers = count(1)

    def receive(self, data: str | bytes) -> None:
        """Follow one message of the client; a refused one is answered and otherwise forgotten."""
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

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes]:
        """What to send for an event."""
        return [encode(message) for message in self._messages(event)]

    def _follow(self, message: ClientMessage) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif not self._greeted:
            raise ProtocolError("bad_request", "hello must come first")
        elif isinstance(message, Speak):
            self._session.append(message.context_id, message.text, _choices(message))
        elif isinstance(message, Flush):
            self._session.flush(message.context_id)
        elif isinstance(message, End):
            self._session.end(message.context_id)
        elif isinstance(message, Cancel):
            self._session.cancel(message.context_id)

    def _greet(self, hello: Hello) -> None:
        if self._greeted:
            raise ProtocolError("bad_request", "hello was said before")
        self._greeted, self._audio = True, hello.audio
        server = self._session.server
        log.info(
            "connection %s: %s at %d Hz for %s",
            self._session.name,
            hello.audio.encoding,
            hello.audio.sample_rate,
            hello.client or "a client without a name",
        )
        talker = server.decoder.default_params.talker
        self._reply(
            Ready(
                protocol=PROTOCOL,
                encoding=hello.audio.encoding,
                sample_rate=hello.audio.sample_rate,
                encodings=tuple(ENCODINGS),
                sample_rates=SAMPLE_RATES,
                voices=tuple(server.decoder.voices),
                default_voice=server.decoder.default_voice,
                languages=tuple(server.decoder.languages),
                limits=Limits(server.max_text_chars, RULES.max_contexts, server.max_message_bytes),
                server=f"qwen-megakernel/{__version__}",
                sampling=Sampling(talker.temperature, talker.top_k),
            )
        )

    def _messages(self, event: ContextEvent | SessionFailed) -> list[ServerMessage]:
        match event:
            case ContextStarted(context_id):
                stream = self._streams[context_id] = _Stream(next(self._numbers), self._audio)
                return [Started(context_id, stream.number)]
            case ContextAudio(context_id):
                return [*self._streams[context_id].chunks(event)]
            case SegmentDone(context_id, index, start_s, duration_s, reason):
                segment = Segment(context_id, index, round(start_s, 4), round(duration_s, 4), reason)
                return [*self._streams[context_id].chunks(event), segment]
            case ContextQuiet(context_id, state, num_before):
                return [Progress(context_id, state, num_before)]
            case ContextDone(context_id, reason, figures):
                return [self._done(context_id, reason, figures)]
            case ContextFailed(context_id, code, message, figures=figures):
                error = Error(context_id, code, error_line(message), event.retry_after_s)
                return [error, self._done(context_id, "error", figures)]
            case SessionFailed(code, message):
                return [Error(None, code, error_line(message))]

    def _done(self, context_id: str, reason: FinishReason, figures: Figures) -> Done:
        stream = self._streams.pop(context_id, None)
        samples = stream.num_samples if stream is not None else 0
        ttfc_s = figures.ttfc_s
        rtf = None if ttfc_s is None else figures.rtf  # neither, where nothing was sent
        return Done(
            context_id,
            reason,
            samples=samples,
            duration_s=round(samples / self._audio.sample_rate, 4),
            generation_s=round(figures.generation_s, 4),
            ttfc_ms=None if ttfc_s is None else round(ttfc_s * 1000, 2),
            rtf=None if rtf is None else round(rtf, 4),
        )

    def _reply(self, message: Ready | Error) -> None:
        self._session.reply(encode(message))


def _choices(message: Speak) -> SpeechOptions:
    return SpeechOptions(
        voice=message.voice,
        language=None if message.language is None else language_name(message.language),
        instruct=message.instruct,
        temperature=message.temperature,
        top_k=message.top_k,
        seed=message.seed,
        chunk_frames=message.chunk_frames,
    )
