"""The native protocol, version 1: every message of both sides, to and from the wire.

Sans-IO and standard library only, so that server, clients and fuzzers share one definition;
docs/PROTOCOL.md says what the messages mean. A message is a frozen dataclass. The declaration of a
field says what it may hold; the parsers and docs/protocol.schema.json follow from the declarations.
`encode` and the two `parse_...` are inverse.

    socket.send(encode(Speak("reply-1", "Hello there.")))
    match parse_server_message(socket.recv()):
        case AudioChunk(stream, sequence, samples): ...
        case Done(context_id="reply-1"): ...
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from qwen_megakernel.serving.wire import (
    ErrorCode,
    ProtocolError,
    get_number,
    get_string,
    kind,
    parse_object,
)

PROTOCOL = 1
ENCODINGS = {"pcm_s16le": 2, "pcm_f32le": 4}
"""Bytes of a sample."""
SAMPLE_RATES = (8_000, 16_000, 24_000, 48_000)
MAX_CHUNK_FRAMES = 8
"""Frames of 80 ms in one audio message."""
MAX_INSTRUCT_CHARS = 1000

FinishReason = Literal["stop", "length", "repeat", "silence", "cancelled", "error"]
State = Literal["queued", "waiting_for_text", "speaking"]

_CONTEXT_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_CLIENT_NAME = re.compile(r"[ -~]{1,100}")
_SEGMENT_ENDS = ("stop", "length", "repeat", "silence")
"""Of a segment that is cancelled or fails only `Done` tells."""
_HEADER = struct.Struct("<II")
_U32 = 2**32 - 1

# --- what a field may hold: `Annotated[type, rule]` ----------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field may hold, to the parsers and to the schema."""

    read: Callable[[dict[str, Any], str], Any]
    """Takes the message's values and the field's name; raises `ProtocolError`."""
    schema: dict[str, Any]
    """JSON Schema."""
    may_be_absent: bool = False


def _or_none(rule: _Rule) -> _Rule:
    def read(values: dict[str, Any], key: str) -> Any:
        return None if values.get(key) is None else rule.read(values, key)

    schema = {**rule.schema, "type": [rule.schema["type"], "null"]}
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return _Rule(read, schema, may_be_absent=True)


def _narrowed(rule: _Rule, **keywords: Any) -> _Rule:
    """The schema asks for more than `read`: another function checks it, or a later server may differ."""
    return replace(rule, schema={**rule.schema, **keywords})


def _matching(pattern: re.Pattern[str], expected: str) -> _Rule:
    def read(values: dict[str, Any], key: str) -> str:
        value = get_string(values, key)
        if not pattern.fullmatch(value):
            raise ProtocolError("bad_request", f"{key} must be {expected}")
        return value

    return _Rule(read, {"type": "string", "pattern": f"^{pattern.pattern}$"})


def _one_of(choices: Iterable[str]) -> _Rule:
    return _narrowed(_string, enum=[*choices])


def _short_string(max_chars: int) -> _Rule:
    def read(values: dict[str, Any], key: str) -> str:
        value = get_string(values, key)
        if len(value) > max_chars:
            raise ProtocolError("bad_request", f"{key} is longer than {max_chars} characters")
        return value

    return _Rule(read, {"type": "string", "maxLength": max_chars})


def _number(kinds: tuple[type[int | float], ...], low: float, high: float) -> _Rule:
    def read(values: dict[str, Any], key: str) -> int | float:
        value: int | float | None = get_number(values, key, kinds, low, high)
        if value is None:
            raise ProtocolError("bad_request", f"{key} is {'null' if key in values else 'missing'}")
        return value

    json_type = "number" if float in kinds else "integer"
    return _Rule(read, {"type": json_type, "minimum": low, "maximum": high})


def _integer(low: int, high: int) -> _Rule:
    return _number((int,), low, high)


def _list(kind_of_item: type, expected: str) -> _Rule:
    def read(values: dict[str, Any], key: str) -> tuple[Any, ...]:
        found = values.get(key)
        # type(): True is no number here.
        if not isinstance(found, list) or any(type(item) is not kind_of_item for item in found):
            raise ProtocolError("bad_request", f"{key} must be {expected}")
        return tuple(found)

    json_type = {str: "string", int: "integer"}[kind_of_item]
    return _Rule(read, {"type": "array", "items": {"type": json_type}})


def _object(cls: type) -> _Rule:
    def read(values: dict[str, Any], key: str) -> Any:
        found = values.get(key)
        if not isinstance(found, dict):
            raise ProtocolError("bad_request", f"{key} is {kind(found)}, expected an object")
        return _build(cls, found)

    return _Rule(read, object_schema(cls))


_string = _Rule(get_string, {"type": "string"})
_maybe_string = _or_none(_string)
_strings = _list(str, "a list of strings")
_context_id = _matching(_CONTEXT_ID, "1 to 64 characters of A-Z a-z 0-9 . _ : -")
_seconds = _number((int, float), 0, 1e12)
_count = _integer(0, 2**63)

# --- client to server --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """How a client wants its samples; mono always."""

    encoding: Annotated[str, _or_none(_one_of(ENCODINGS))] = "pcm_s16le"
    sample_rate: Annotated[int, _or_none(_narrowed(_count, enum=[*SAMPLE_RATES]))] = 24_000

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return ENCODINGS[self.encoding]


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a connection."""

    protocol: Annotated[int, _narrowed(_integer(0, _U32), const=PROTOCOL)] = PROTOCOL
    audio: Annotated[
        AudioFormat, _or_none(_narrowed(_object(AudioFormat), additionalProperties=False))
    ] = AudioFormat()
    client: Annotated[
        str | None, _or_none(_matching(_CLIENT_NAME, "1 to 100 visible ASCII characters"))
    ] = None
    """Name and version of the client, for the server's log."""


@dataclass(frozen=True, slots=True)
class Speak:
    """Text for a context; a field that is None keeps its earlier value, at first the server's."""

    context_id: Annotated[str, _context_id]
    text: Annotated[str, _string]
    voice: Annotated[str | None, _maybe_string] = None
    """A name the server knows, never a path."""
    language: Annotated[str | None, _maybe_string] = None
    """A name the server knows, or a two-letter code."""
    instruct: Annotated[str | None, _or_none(_short_string(MAX_INSTRUCT_CHARS))] = None
    """How to speak, for checkpoints that take it."""
    temperature: Annotated[float | None, _or_none(_number((int, float), 0, 10))] = None
    """Of the talker; 0 takes the most likely code."""
    top_k: Annotated[int | None, _or_none(_integer(0, 1 << 16))] = None
    """Of the talker; 0 keeps all."""
    seed: Annotated[int | None, _or_none(_integer(0, 2**64 - 1))] = None
    chunk_frames: Annotated[int | None, _or_none(_integer(1, MAX_CHUNK_FRAMES))] = None
    """Frames of 80 ms in one audio message; None begins with one and grows."""


@dataclass(frozen=True, slots=True)
class Flush:
    """The segment's text is complete."""

    context_id: Annotated[str, _context_id]


@dataclass(frozen=True, slots=True)
class End:
    """The context's text is complete."""

    context_id: Annotated[str, _context_id]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a context; without one, all."""

    context_id: Annotated[str | None, _or_none(_context_id)] = None


ClientMessage = Hello | Speak | Flush | End | Cancel

# --- server to client --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes of one connection."""

    max_text_chars: Annotated[int, _narrowed(_count, minimum=1)]
    """Of a context."""
    max_contexts: Annotated[int, _narrowed(_count, minimum=1)]
    """Open at a time."""
    max_message_bytes: Annotated[int, _narrowed(_count, minimum=1)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the talker draws with where a client chooses nothing."""

    temperature: Annotated[float, _number((int, float), 0, 10)]
    top_k: Annotated[int, _integer(0, 1 << 16)]


@dataclass(frozen=True, slots=True)
class Ready:
    """The answer to `Hello`."""

    protocol: Annotated[int, _narrowed(_count, const=PROTOCOL)]
    encoding: Annotated[str, _one_of(ENCODINGS)]
    sample_rate: Annotated[int, _narrowed(_count, enum=[*SAMPLE_RATES])]
    encodings: Annotated[tuple[str, ...], _narrowed(_strings, minItems=1)]
    sample_rates: Annotated[tuple[int, ...], _narrowed(_list(int, "a list of integers"), minItems=1)]
    voices: Annotated[tuple[str, ...], _strings]
    default_voice: Annotated[str | None, _maybe_string]
    languages: Annotated[tuple[str, ...], _narrowed(_strings, minItems=1)]
    limits: Annotated[Limits, _object(Limits)]
    server: Annotated[str, _string]
    sampling: Annotated[Sampling | None, _or_none(_object(Sampling))] = None
    """An earlier server does not say."""


@dataclass(frozen=True, slots=True)
class Started:
    """A context's audio follows, under this stream number."""

    context_id: Annotated[str, _context_id]
    stream: Annotated[int, _narrowed(_integer(0, _U32), minimum=1)]


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Samples of a stream; `sequence` counts its chunks from 0."""

    stream: int
    sequence: int
    samples: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """A context is open, and nothing else was sent for it recently."""

    context_id: Annotated[str, _context_id]
    state: Annotated[State, _one_of(get_args(State))]
    queued: Annotated[int, _count]
    """Contexts before it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """All audio of a segment was sent; times are seconds of the context's audio."""

    context_id: Annotated[str, _context_id]
    index: Annotated[int, _count]
    start_s: Annotated[float, _seconds]
    duration_s: Annotated[float, _seconds]
    finish_reason: Annotated[FinishReason, _one_of(_SEGMENT_ENDS)]


@dataclass(frozen=True, slots=True)
class Done:
    """The last message of a context."""

    context_id: Annotated[str, _context_id]
    finish_reason: Annotated[FinishReason, _one_of(get_args(FinishReason))]
    samples: Annotated[int, _count]
    duration_s: Annotated[float, _seconds]
    generation_s: Annotated[float, _seconds]
    ttfc_ms: Annotated[float | None, _or_none(_seconds)]
    rtf: Annotated[float | None, _or_none(_seconds)]


@dataclass(frozen=True, slots=True)
class Error:
    """Something was refused or failed; if that ends a context, `Done` says so."""

    context_id: Annotated[str | None, _or_none(_narrowed(_string, **_context_id.schema))]
    code: Annotated[str, _one_of(get_args(ErrorCode))]
    message: Annotated[str, _narrowed(_string, maxLength=300)]
    """One line; `wire.error_line` cuts it."""
    retry_after_s: Annotated[float | None, _or_none(_seconds)] = None
    """Seconds after which it may be tried again, where that is known."""


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
    """The meaning of a client's WebSocket message; a field that is not known is a mistake.

    Raises:
        ProtocolError: anything else than a well-formed message, whatever the bytes. Its
            `context_id` is the message's, if that much could be read.
    """
    values = parse_object(data)
    try:
        cls = _find(CLIENT_TYPES, values)
        if cls is Hello:
            _check_protocol(values)  # first: another version may have other fields
        _refuse_unknown(cls, values, "type")
        message: ClientMessage = _build(cls, values)
        if isinstance(message, Hello):
            _refuse_unknown(AudioFormat, values.get("audio") or {})
            _check_format(message.audio)
        return message
    except ProtocolError as error:
        error.context_id = _readable_context_id(values)
        raise


def parse_server_message(data: str | bytes) -> ServerMessage:
    """The meaning of a server's WebSocket message; fields that are not known are left alone.

    Raises:
        ProtocolError: a malformed message; `unsupported` for a type that is not known, which a
            client should pass over.
    """
    if not isinstance(data, str):
        return _unpack_audio(data)
    values = parse_object(data)
    if get_string(values, "type") not in SERVER_TYPES:
        raise ProtocolError("unsupported", "a message of a type that this client does not know")
    message: ServerMessage = _build(_find(SERVER_TYPES, values), values)
    return message


def check_values(cls: type, values: dict[str, Any]) -> None:
    """Raise `ProtocolError` where a message of this class could not hold a value."""
    for name in values:
        _rules(cls)[name].read(values, name)


def encode(message: ClientMessage | ServerMessage) -> str | bytes:
    """What to send: text, or bytes for audio."""
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


@cache
def _rules(cls: type) -> dict[str, _Rule]:
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def object_schema(cls: type) -> dict[str, Any]:
    """JSON Schema of a message, without its `type`, or of an object in one."""
    rules = _rules(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING or not rules[f.name].may_be_absent]
    properties = {name: rule.schema for name, rule in rules.items()}
    return {"type": "object", "properties": properties, "required": required}


def _build(cls: type, values: dict[str, Any]) -> Any:
    found = {}
    for each in fields(cls):
        value = _rules(cls)[each.name].read(values, each.name)
        if value is not None or each.default is MISSING:
            found[each.name] = value
    return cls(**found)


def _refuse_unknown(cls: type, values: dict[str, Any], *more: str) -> None:
    allowed = [each.name for each in fields(cls)]
    if not values.keys() <= {*allowed, *more}:
        # The name of the stranger is the client's text: it is not repeated.
        raise ProtocolError("bad_request", f"a field is unknown, expected {', '.join(allowed)}")


def _check_protocol(values: dict[str, Any]) -> None:
    version = _integer(0, _U32).read(values, "protocol")
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


def _readable_context_id(values: dict[str, Any]) -> str | None:
    try:
        context_id: str = _context_id.read(values, "context_id")
    except ProtocolError:
        return None
    return context_id
