"""The native protocol, version 1: every message of both sides, to and from the wire.

This module does no input or output and needs only the standard library, so that server, clients and
fuzzers share one definition. docs/PROTOCOL.md says what the messages mean. A message is a frozen
dataclass. The declaration of a field says which values it may have. The parsers and
docs/protocol.schema.json follow from the declarations. `encode` is the inverse of the two `parse_...`
functions.

    socket.send(encode(Speak("reply-1", "Hello there.")))
    match parse_server_message(socket.recv()):
        case AudioChunk(stream, sequence, samples): ...
        case Done(context_id="reply-1"): ...
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from qwen_megakernel.serving.message_rules import (
    COUNT,
    FLAG,
    LEXICON,
    MAYBE_STRING,
    SECONDS,
    SPEED,
    STRING,
    STRINGS,
    build,
    integer,
    list_of,
    matching,
    narrowed,
    number,
    object_of,
    objects_of,
    one_of,
    or_none,
    refuse_unknown,
    rules_of,
    short_string,
)
from qwen_megakernel.serving.wire import ErrorCode, ProtocolError, get_string, parse_object

PROTOCOL = 1
SAMPLE_BYTES = {"pcm_s16le": 2, "pcm_f32le": 4, "pcm_mulaw": 1, "pcm_alaw": 1}
OPUS = "opus"
"""Opus in Ogg, at 24 kHz. All audio messages of a context together are one file."""
ENCODINGS = (*SAMPLE_BYTES, OPUS)
SAMPLE_RATES = (8_000, 16_000, 24_000, 48_000)
MAX_CHUNK_FRAMES = 8
"""The most frames of 80 ms in one audio message."""
MAX_INSTRUCT_CHARS = 1000
MAX_FRAMES = 1 << 20
"""The highest limit in frames that a client can set for a segment: 23 hours."""

FinishReason = Literal["stop", "length", "repeat", "silence", "cancelled", "error"]
State = Literal["queued", "waiting_for_text", "speaking"]

_CONTEXT_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_CLIENT_NAME = re.compile(r"[ -~]{1,100}")
_SEGMENT_ENDS = ("stop", "length", "repeat", "silence")
"""Reasons in `Segment`. For a segment that is cancelled or fails, only `Done` has the reason."""
_HEADER = struct.Struct("<II")
_U32 = 2**32 - 1

CONTEXT_ID = matching(_CONTEXT_ID, "1 to 64 characters of A-Z a-z 0-9 . _ : -")

# --- client to server --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """The format in which a client wants its samples. It is always mono."""

    encoding: Annotated[str, or_none(one_of(ENCODINGS))] = "pcm_s16le"
    sample_rate: Annotated[int, or_none(narrowed(COUNT, enum=[*SAMPLE_RATES]))] = 24_000

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample. Raises `KeyError` for Opus."""
        return SAMPLE_BYTES[self.encoding]


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a connection."""

    protocol: Annotated[int, narrowed(integer(0, _U32), const=PROTOCOL)] = PROTOCOL
    audio: Annotated[
        AudioFormat, or_none(narrowed(object_of(AudioFormat), additionalProperties=False))
    ] = AudioFormat()
    client: Annotated[
        str | None, or_none(matching(_CLIENT_NAME, "1 to 100 visible ASCII characters"))
    ] = None
    """The client's name and version, for the server's log."""


@dataclass(frozen=True, slots=True)
class Speak:
    """Text for a context. A field that is None keeps its earlier value, at first the server's."""

    context_id: Annotated[str, CONTEXT_ID]
    text: Annotated[str, STRING]
    voice: Annotated[str | None, MAYBE_STRING] = None
    """The name of a voice of the server, never a path."""
    language: Annotated[str | None, MAYBE_STRING] = None
    """The name of a language of the server, or its two-letter code."""
    instruct: Annotated[str | None, or_none(short_string(MAX_INSTRUCT_CHARS))] = None
    """How to speak, for checkpoints that accept instructions."""
    temperature: Annotated[float | None, or_none(number((int, float), 0, 10))] = None
    """Temperature of the talker; 0 takes the most likely code."""
    top_k: Annotated[int | None, or_none(integer(0, 1 << 16))] = None
    """Top-k of the talker; 0 keeps all codes."""
    seed: Annotated[int | None, or_none(integer(0, 2**64 - 1))] = None
    chunk_frames: Annotated[int | None, or_none(integer(1, MAX_CHUNK_FRAMES))] = None
    """Frames of 80 ms in one audio message; None begins with one frame and grows."""
    top_p: Annotated[float | None, or_none(number((int, float), 0.01, 1))] = None
    """Top-p of the talker; 1 keeps all codes."""
    repetition_penalty: Annotated[float | None, or_none(number((int, float), 0.1, 10))] = None
    """Repetition penalty of the talker; 1 is no penalty."""
    predictor_temperature: Annotated[float | None, or_none(number((int, float), 0, 10))] = None
    """Temperature of the code predictor; 0 takes the most likely codes."""
    predictor_top_k: Annotated[int | None, or_none(integer(0, 1 << 16))] = None
    """Top-k of the code predictor; 0 keeps all codes."""
    min_frames: Annotated[int | None, or_none(integer(0, MAX_FRAMES))] = None
    """Frames of 80 ms before which the model cannot end a segment."""
    max_frames: Annotated[int | None, or_none(integer(1, MAX_FRAMES))] = None
    """Frames of 80 ms after which a segment is cut off."""
    streaming: Annotated[bool | None, or_none(FLAG)] = None
    """Text layout of the prompt; None is the checkpoint's own."""
    trim_leading_silence: Annotated[bool | None, or_none(FLAG)] = None
    """Whether the silence before the context's first sound is left out. Its first segment decides."""
    markup: Annotated[bool | None, or_none(FLAG)] = None
    """Whether `<spell>` and `<break>` are followed."""
    lexicon: Annotated[dict[str, str] | None, or_none(LEXICON)] = None
    """Words, and how they are spelt for the model."""
    speed: Annotated[float | None, or_none(SPEED)] = None
    """Rate at the same pitch; 2 takes half as long."""


@dataclass(frozen=True, slots=True)
class Flush:
    """The segment's text is complete."""

    context_id: Annotated[str, CONTEXT_ID]


@dataclass(frozen=True, slots=True)
class End:
    """The context's text is complete."""

    context_id: Annotated[str, CONTEXT_ID]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a context, or all contexts if none is named."""

    context_id: Annotated[str | None, or_none(CONTEXT_ID)] = None


ClientMessage = Hello | Speak | Flush | End | Cancel

# --- server to client --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits for one connection."""

    max_text_chars: Annotated[int, narrowed(COUNT, minimum=1)]
    """Characters in the text of a context."""
    max_contexts: Annotated[int, narrowed(COUNT, minimum=1)]
    """Contexts that may be open at a time."""
    max_message_bytes: Annotated[int, narrowed(COUNT, minimum=1)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling parameters for a client that chooses none. Those without `predictor` in their name
    are the talker's."""

    temperature: Annotated[float, number((int, float), 0, 10)]
    top_k: Annotated[int, integer(0, 1 << 16)]
    top_p: Annotated[float | None, or_none(number((int, float), 0, 1))] = None
    repetition_penalty: Annotated[float | None, or_none(number((int, float), 0.1, 10))] = None
    predictor_temperature: Annotated[float | None, or_none(number((int, float), 0, 10))] = None
    """Temperature of the code predictor. Earlier servers leave out all fields that may be None."""
    predictor_top_k: Annotated[int | None, or_none(integer(0, 1 << 16))] = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The answer to `Hello`."""

    protocol: Annotated[int, narrowed(COUNT, const=PROTOCOL)]
    encoding: Annotated[str, one_of(ENCODINGS)]
    sample_rate: Annotated[int, narrowed(COUNT, enum=[*SAMPLE_RATES])]
    encodings: Annotated[tuple[str, ...], narrowed(STRINGS, minItems=1)]
    sample_rates: Annotated[tuple[int, ...], narrowed(list_of(int, "a list of integers"), minItems=1)]
    voices: Annotated[tuple[str, ...], STRINGS]
    default_voice: Annotated[str | None, MAYBE_STRING]
    languages: Annotated[tuple[str, ...], narrowed(STRINGS, minItems=1)]
    limits: Annotated[Limits, object_of(Limits)]
    server: Annotated[str, STRING]
    sampling: Annotated[Sampling | None, or_none(object_of(Sampling))] = None
    """Earlier servers leave this field out."""
    trim_leading_silence: Annotated[bool | None, or_none(FLAG)] = None
    """Whether the server does this for a context that does not choose; None is no."""
    markup: Annotated[bool | None, or_none(FLAG)] = None
    """Whether the server does this for a segment that does not choose; None is no."""


@dataclass(frozen=True, slots=True)
class Started:
    """A context's audio follows under this stream number."""

    context_id: Annotated[str, CONTEXT_ID]
    stream: Annotated[int, narrowed(integer(0, _U32), minimum=1)]


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Samples of a stream. `sequence` counts its chunks from 0."""

    stream: int
    sequence: int
    samples: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """A context is open, and no other message was sent for it recently."""

    context_id: Annotated[str, CONTEXT_ID]
    state: Annotated[State, one_of(get_args(State))]
    queued: Annotated[int, COUNT]
    """Contexts before it."""


@dataclass(frozen=True, slots=True)
class Word:
    """The estimated time of a word, in seconds of the context's audio."""

    text: Annotated[str, STRING]
    start_s: Annotated[float, SECONDS]
    end_s: Annotated[float, SECONDS]


@dataclass(frozen=True, slots=True)
class Segment:
    """All audio of a segment was sent. Times are seconds of the context's audio."""

    context_id: Annotated[str, CONTEXT_ID]
    index: Annotated[int, COUNT]
    start_s: Annotated[float, SECONDS]
    duration_s: Annotated[float, SECONDS]
    finish_reason: Annotated[FinishReason, one_of(_SEGMENT_ENDS)]
    estimated_words: Annotated[tuple[Word, ...] | None, or_none(objects_of(Word))] = None
    """Earlier servers leave this field out."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last message of a context."""

    context_id: Annotated[str, CONTEXT_ID]
    finish_reason: Annotated[FinishReason, one_of(get_args(FinishReason))]
    samples: Annotated[int, COUNT]
    duration_s: Annotated[float, SECONDS]
    generation_s: Annotated[float, SECONDS]
    ttfc_ms: Annotated[float | None, or_none(SECONDS)]
    rtf: Annotated[float | None, or_none(SECONDS)]
    trimmed_s: Annotated[float | None, or_none(SECONDS)] = None
    """Seconds of silence that were left out before the first sound; None if the silence is kept."""


@dataclass(frozen=True, slots=True)
class Error:
    """Something was refused or failed. If that ends a context, its `Done` says so."""

    context_id: Annotated[str | None, or_none(narrowed(STRING, **CONTEXT_ID.schema))]
    code: Annotated[str, one_of(get_args(ErrorCode))]
    message: Annotated[str, narrowed(STRING, maxLength=300)]
    """One line, cut by `wire.error_line`."""
    retry_after_s: Annotated[float | None, or_none(SECONDS)] = None
    """Seconds after which the client may try again, if known."""


ServerMessage = Ready | Started | AudioChunk | Progress | Segment | Done | Error

CLIENT_TYPES: dict[str, type] = {
    "hello": Hello,
    "speak": Speak,
    "flush": Flush,
    "end": End,
    "cancel": Cancel,
}
SERVER_TYPES: dict[str, type] = {
    "ready": Ready,
    "started": Started,
    "progress": Progress,
    "segment": Segment,
    "done": Done,
    "error": Error,
}
_NAMES = {cls: name for types in (CLIENT_TYPES, SERVER_TYPES) for name, cls in types.items()}

# --- to and from the wire ----------------------------------------------------------------------


def parse_client_message(data: str | bytes) -> ClientMessage:
    """Parse a client's WebSocket message. An unknown field is an error.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else. Its `context_id` is the
            message's, if that could be read.
    """
    values = parse_object(data)
    try:
        cls = _find(CLIENT_TYPES, values)
        if cls is Hello:
            _check_protocol(values)  # first: another version may have other fields
        refuse_unknown(cls, values, "type")
        message: ClientMessage = build(cls, values)
        if isinstance(message, Hello):
            refuse_unknown(AudioFormat, values.get("audio") or {})
            _check_format(message.audio)
        return message
    except ProtocolError as error:
        error.context_id = _readable_context_id(values)
        raise


def parse_server_message(data: str | bytes) -> ServerMessage:
    """Parse a server's WebSocket message. Unknown fields are ignored.

    Raises:
        ProtocolError: the message is malformed, or its type is unknown. The code is `unsupported` for
            an unknown type, which a client should ignore.
    """
    if not isinstance(data, str):
        return _unpack_audio(data)
    values = parse_object(data)
    if get_string(values, "type") not in SERVER_TYPES:
        raise ProtocolError("unsupported", "a message of a type that this client does not know")
    message: ServerMessage = build(_find(SERVER_TYPES, values), values)
    return message


def check_values(cls: type, values: dict[str, Any]) -> None:
    """Raise `ProtocolError` if a message of this class cannot hold one of the values."""
    for name in values:
        rules_of(cls)[name].read(values, name)


def encode(message: ClientMessage | ServerMessage) -> str | bytes:
    """The message on the wire: text, or bytes for audio."""
    if isinstance(message, AudioChunk):
        return _HEADER.pack(message.stream, message.sequence & _U32) + message.samples
    values = asdict(message)
    for each in fields(message):
        if each.default is None and values[each.name] is None:
            del values[each.name]
    return json.dumps({"type": _NAMES[type(message)], **values}, separators=(",", ":"))


def _unpack_audio(data: bytes) -> AudioChunk:
    if len(data) < _HEADER.size:
        raise ProtocolError("bad_request", f"audio of {len(data)} bytes, shorter than its header")
    stream, sequence = _HEADER.unpack_from(data)
    return AudioChunk(stream, sequence, data[_HEADER.size :])


def _find(types: dict[str, type], values: dict[str, Any]) -> type:
    name = get_string(values, "type")
    if name not in types:
        raise ProtocolError("bad_request", f"type is unknown, expected {', '.join(types)}")
    return types[name]


def _check_protocol(values: dict[str, Any]) -> None:
    version = integer(0, _U32).read(values, "protocol")
    if version != PROTOCOL:
        raise ProtocolError("unsupported_protocol", f"protocol {version}, expected {PROTOCOL}")


def _check_format(audio: AudioFormat) -> None:
    if audio.encoding not in ENCODINGS:
        raise ProtocolError(
            "unsupported_protocol", f"encoding is unknown, expected {' or '.join(ENCODINGS)}"
        )
    if audio.sample_rate not in SAMPLE_RATES:
        rates = ", ".join(map(str, SAMPLE_RATES))
        raise ProtocolError("unsupported_protocol", f"sample_rate is none of {rates}")
    if audio.encoding == OPUS and audio.sample_rate != 24_000:
        raise ProtocolError("unsupported_protocol", "opus has the sample_rate 24000 only")


def _readable_context_id(values: dict[str, Any]) -> str | None:
    try:
        context_id: str = CONTEXT_ID.read(values, "context_id")
    except ProtocolError:
        return None
    return context_id
