"""Deepgram's speech API as data: queries, messages of its WebSocket, errors. Standard library only.

WebSocket /v1/speak?model=...&encoding=...   text in pieces, one utterance after the other
POST /v1/speak?model=...&encoding=...        -> bytes of an audio file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_megakernel.serving.wire import (
    ErrorCode,
    ProtocolError,
    SpeechError,
    error_line,
    get_string,
    language_name,
    parse_object,
)

PATH = "/v1/speak"
_STATUS_CODES = {
    401: "INVALID_AUTH",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    429: "TOO_MANY_REQUESTS",
    503: "UNAVAILABLE",
}


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Deepgram's choices for one encoding. The first of each list is the default."""

    name: str
    """This project's name for the encoding."""
    containers: tuple[str, ...]
    sample_rates: tuple[int, ...]
    bit_rates: tuple[int, int, int] | None = None
    """The default bit rate, the lowest and the highest."""


ENCODINGS = {
    "linear16": _Encoding("pcm_s16le", ("wav", "none"), (24_000, 8_000, 16_000, 32_000, 48_000)),
    "mulaw": _Encoding("pcm_mulaw", ("wav", "none"), (8_000, 16_000)),
    "alaw": _Encoding("pcm_alaw", ("wav", "none"), (8_000, 16_000)),
    "mp3": _Encoding("mp3", ("none",), (22_050,), (48_000, 32_000, 48_000)),
    "opus": _Encoding("opus", ("ogg",), (48_000,), (12_000, 4_000, 256_000)),
    "flac": _Encoding("flac", ("none",), (48_000, 8_000, 16_000, 22_050, 32_000)),
    "aac": _Encoding("aac", ("none",), (22_050,), (48_000, 4_000, 192_000)),
}
SOCKET_ENCODINGS = ("linear16", "mulaw", "alaw")


@dataclass(frozen=True, slots=True)
class Query:
    """The query of a request or a handshake."""

    voice: str | None
    """None is the default voice."""
    encoding: str
    """pcm_s16le, pcm_mulaw, pcm_alaw, mp3, opus, flac or aac."""
    container: str
    """wav, ogg or none."""
    sample_rate: int
    bit_rate: int | None
    language: str | None
    """Lower-case name. An addition to Deepgram's API."""
    seed: int | None
    """An addition to Deepgram's API."""


@dataclass(frozen=True, slots=True)
class Speak:
    """More text."""

    text: str


@dataclass(frozen=True, slots=True)
class Flush:
    """Speak all text so far."""


@dataclass(frozen=True, slots=True)
class Clear:
    """Stop, and forget all text."""


@dataclass(frozen=True, slots=True)
class Close:
    """Speak all text so far, then close."""


Message = Speak | Flush | Clear | Close
_TYPES: dict[str, Message] = {"Flush": Flush(), "Clear": Clear(), "Close": Close()}


def parse_query(fields: Mapping[str, str], *, socket: bool) -> Query:
    """Parse a query. Unknown fields are ignored.

    Args:
        fields: the decoded fields.
        socket: whether the query belongs to a WebSocket, which has raw encodings only.

    Raises:
        SpeechError: 400 if a field has a value that is not allowed.
    """
    known = SOCKET_ENCODINGS if socket else tuple(ENCODINGS)
    name = fields.get("encoding", "linear16" if socket else "mp3").lower()
    if name not in known:
        raise _unsupported("encoding", name, known)
    encoding = ENCODINGS[name]
    containers = ("none",) if socket else encoding.containers
    container = fields.get("container", containers[0]).lower()
    if container not in containers:
        raise _unsupported("container", container, containers)
    sample_rate = _integer(fields, "sample_rate", encoding.sample_rates[0])
    if sample_rate not in encoding.sample_rates:
        raise _unsupported("sample_rate", str(sample_rate), sorted(encoding.sample_rates))
    for field in ("callback", "callback_method"):
        if field in fields:
            raise SpeechError(400, f"{field} is not supported; the answer is the audio", "unsupported")
    if fields.get("speed", "1") not in ("1", "1.0"):
        raise SpeechError(400, "speed other than 1 is not supported; leave it out", "unsupported")
    language = fields.get("language")
    return Query(
        voice=fields.get("model") or None,
        encoding=encoding.name,
        container=container,
        sample_rate=sample_rate,
        bit_rate=_bit_rate(fields, encoding),
        language=None if language is None else language_name(language),
        seed=_integer(fields, "seed", None),
    )


def parse_text(body: bytes) -> str:
    """The text of a request's body.

    Raises:
        SpeechError: 400 if the body is malformed. No bytes raise anything else.
    """
    try:
        text = get_string(parse_object(body.decode()), "text")
    except UnicodeDecodeError:
        raise SpeechError(400, "the body is not UTF-8", "bad_request") from None
    except ProtocolError as error:
        raise SpeechError(400, error_line(str(error)), error.code) from None
    if not text.strip():
        raise SpeechError(400, "text is empty", "bad_request")
    return text


def parse_message(data: str | bytes) -> Message:
    """Parse a client's WebSocket message. Unknown fields are ignored.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else.
    """
    fields = parse_object(data)
    kind = get_string(fields, "type")
    if kind == "Speak":
        return Speak(get_string(fields, "text"))
    if kind not in _TYPES:
        raise ProtocolError("bad_request", f"type is unknown, expected Speak, {', '.join(_TYPES)}")
    return _TYPES[kind]


def encode_metadata(request_id: str, model: str, version: str) -> str:
    """The first message of a connection."""
    return _message(
        "Metadata",
        request_id=request_id,
        model_name=model,
        model_version=version,
        model_uuid=request_id,
    )


def encode_flushed(sequence_id: int) -> str:
    """The message that says that all audio of a flush was sent."""
    return _message("Flushed", sequence_id=sequence_id)


def encode_cleared(sequence_id: int) -> str:
    """The answer to `Clear`: no audio of earlier text follows."""
    return _message("Cleared", sequence_id=sequence_id)


def encode_warning(code: ErrorCode, message: str) -> str:
    """The answer to a refused message; the connection goes on. Clients read one of the two names."""
    line = error_line(message)
    return _message(
        "Warning", description=line, code=code.upper(), warn_msg=line, warn_code=code.upper()
    )


def encode_error(code: ErrorCode, message: str) -> str:
    """The message for text that could not be spoken, or not to its end."""
    line = error_line(message)
    return _message("Error", description=line, code=code.upper(), err_msg=line, err_code=code.upper())


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Any:
    """The body of an error answer, as Deepgram's clients read it."""
    code = code.upper() if code else _STATUS_CODES.get(status, "BAD_REQUEST")
    return {"err_code": code, "err_msg": message}


def _message(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields}, separators=(",", ":"))


def _unsupported(field: str, value: str, known: Any) -> SpeechError:
    listed = ", ".join(map(str, known))
    message = f"{field} {value[:64]} is not supported; known: {listed}"
    return SpeechError(400, error_line(message), "unsupported", field)


def _integer(fields: Mapping[str, str], name: str, default: Any) -> Any:  # int, or what default is
    value = fields.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) < 2**64):
        raise SpeechError(400, f"{name} must be an integer", "bad_request", name)
    return int(value)


def _bit_rate(fields: Mapping[str, str], encoding: _Encoding) -> int | None:
    if encoding.bit_rates is None:
        return None
    default, low, high = encoding.bit_rates
    bit_rate: int = _integer(fields, "bit_rate", default)
    if not low <= bit_rate <= high:
        raise SpeechError(
            400, f"bit_rate is out of range, allowed: {low} to {high}", "unsupported", "bit_rate"
        )
    return bit_rate
