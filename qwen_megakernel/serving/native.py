"""The native protocol on the wire: messages to contexts, contexts to messages (docs/PROTOCOL.md)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from qwen_megakernel import __version__
from qwen_megakernel.serving.contexts import Context, ContextOver, OutEvent, SegmentOver
from qwen_megakernel.serving.conversation import MAX_CONTEXTS, Conversation
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
    Segment,
    ServerMessage,
    Speak,
    Started,
    State,
    encode,
    parse_client_message,
)
from qwen_megakernel.serving.observe import log
from qwen_megakernel.serving.pcm import PcmEncoder
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.wire import ProtocolError, error_line
from qwen_megakernel.turn import Audio, RequestError

PROTOCOL_VIOLATED = 1002
"""WebSocket close code."""

Item = str | Context
"""What waits for the writer: a reply, or a context of which something is to be sent."""
Send = Callable[[str | bytes], Awaitable[None]]


class _Stream:
    """The numbered audio of a context."""

    def __init__(self, context: Context, number: int, audio: AudioFormat) -> None:
        self.context, self.number = context, number
        self._sample_bytes = audio.sample_bytes
        self._encoder = PcmEncoder(audio)
        self._sequence = 0

    def chunk(self, event: Audio | SegmentOver) -> AudioChunk | None:
        """Samples to send, if the resampler gives any."""
        data = self._encoder.encode(event.samples) if isinstance(event, Audio) else self._encoder.flush()
        if not data:
            return None
        self.context.mark_audio_sent(len(data) // self._sample_bytes)
        self._sequence += 1
        return AudioChunk(self.number, self._sequence - 1, data)


class NativeDialect:
    """One client's dialogue. `receive` belongs to the reader, `write` to the writer."""

    def __init__(
        self,
        speech: ServerState,
        name: str,
        post: Callable[[Item], None],
        finish: Callable[[int], None],
    ) -> None:
        """Begin.

        Args:
            speech: what all connections share.
            name: of the connection, for the log.
            post: puts an item into the writer's queue.
            finish: closes the socket with a code once all that was posted is sent.
        """
        self._speech, self._name, self._post, self._finish = speech, name, post, finish
        self._conversation = Conversation(speech, name, self)
        self._audio: AudioFormat | None = None
        """None before `Hello`."""
        self._stream: _Stream | None = None
        self._num_streams = 0
        self._refused = False

    @property
    def busy(self) -> bool:
        """Whether a context is open."""
        return self._conversation.busy

    @property
    def unsent_bytes(self) -> int:
        """Audio that waits for the socket."""
        return self._conversation.unsent_bytes

    def receive(self, data: str | bytes) -> None:
        """Follow one message of the client; a refused one is answered and otherwise forgotten."""
        if self._refused:
            return
        context_id = None
        try:
            message = parse_client_message(data)
            context_id = getattr(message, "context_id", None)
            self._follow(message)
        except (ProtocolError, RequestError) as error:
            self._reply(_error(getattr(error, "context_id", None) or context_id, error))
            if error.code == "unsupported_protocol":
                self._refused = True
                self._finish(PROTOCOL_VIOLATED)

    def cancel(self) -> None:
        """Stop all contexts, as if the client had asked."""
        self._conversation.cancel()

    def drain(self) -> None:
        """Refuse what has not begun."""
        self._conversation.drain()

    def close(self) -> None:
        """The client is gone."""
        self._conversation.close()

    def discard(self, item: Item) -> None:
        """Nothing to account for: the conversation keeps its own books."""

    async def write(self, item: Item, send: Send) -> None:
        """Put one posted item on the wire."""
        if isinstance(item, str):
            await send(item)
        elif (event := self._conversation.take(item)) is not None:
            # All is counted before the first await, during which the context may be cancelled.
            for message in list(self._messages(item, event)):
                await send(encode(message))

    # -- what the conversation tells --------------------------------------------------------

    def on_output(self, context: Context) -> None:
        """Let the writer come for it."""
        self._post(context)

    def on_stopped(self, context: Context, reason: FinishReason, error: Exception | None) -> None:
        """Say so ahead of all that waits."""
        if error is not None:
            self._reply(_error(context.context_id, error))
        self._reply(self._done(context, reason))

    def on_quiet(self, context: Context, state: State, queued: int) -> None:
        """Show that the server is alive."""
        self._reply(Progress(context.context_id, state, queued))

    # -- inside -----------------------------------------------------------------------------

    def _follow(self, message: ClientMessage) -> None:
        if isinstance(message, Hello):
            self._greet(message)
        elif self._audio is None:
            raise ProtocolError("bad_request", "hello must come first")
        elif isinstance(message, Speak):
            self._conversation.speak(message)
        elif isinstance(message, Flush):
            self._conversation.flush(message.context_id)
        elif isinstance(message, End):
            self._conversation.end(message.context_id)
        elif isinstance(message, Cancel):
            self._conversation.cancel(message.context_id)

    def _greet(self, hello: Hello) -> None:
        if self._audio is not None:
            raise ProtocolError("bad_request", "hello was said before")
        self._audio = hello.audio
        decoder = self._speech.decoder
        log.info(
            "connection %s: %s at %d Hz for %s",
            self._name,
            hello.audio.encoding,
            hello.audio.sample_rate,
            hello.client or "a client without a name",
        )
        self._reply(
            Ready(
                protocol=PROTOCOL,
                encoding=hello.audio.encoding,
                sample_rate=hello.audio.sample_rate,
                encodings=tuple(ENCODINGS),
                sample_rates=SAMPLE_RATES,
                voices=tuple(decoder.voices),
                default_voice=decoder.default_voice,
                languages=tuple(decoder.languages),
                limits=Limits(self._speech.max_text_chars, MAX_CONTEXTS, self._speech.max_message_bytes),
                server=f"qwen-megakernel/{__version__}",
            )
        )

    def _messages(self, context: Context, event: OutEvent) -> Iterator[ServerMessage]:
        if isinstance(event, ContextOver):
            yield self._done(context, context.reason)
            return
        stream = self._stream
        if stream is None or stream.context is not context:
            self._num_streams += 1
            self._stream = stream = _Stream(context, self._num_streams, self._audio)
            yield Started(context.context_id, stream.number)
        chunk = stream.chunk(event)
        if chunk is not None:
            yield chunk
        if isinstance(event, SegmentOver):
            yield Segment(
                context.context_id,
                event.index,
                round(event.start_s, 4),
                round(event.duration_s, 4),
                event.reason,
            )

    def _done(self, context: Context, reason: FinishReason) -> Done:
        ttfc_s, rtf = context.ttfc_s, context.rtf
        return Done(
            context.context_id,
            reason,
            samples=context.samples_sent,
            duration_s=round(context.samples_sent / self._audio.sample_rate, 4),
            generation_s=round(context.generation_s, 4),
            ttfc_ms=None if ttfc_s is None else round(ttfc_s * 1000, 2),
            rtf=None if rtf is None else round(rtf, 4),
        )

    def _reply(self, message: ServerMessage) -> None:
        self._post(encode(message))


def _error(context_id: str | None, error: Exception) -> Error:
    code = error.code if isinstance(error, (ProtocolError, RequestError)) else "internal"
    return Error(context_id, code, error_line(str(error)))
