"""Messages of the original dialect: JSON text in, float32 audio and JSON text out.

Sans-IO and standard library only: bytes and strings in, values out, so that servers, clients
and fuzzers share one definition.

Client to server, one JSON object per text message:

    {"text": "...", "language", "temperature", "top_k", "speaker_ref", "chunk_tokens", "seed"}
        Speak. Only `text` is required; null means absent; unknown keys are ignored. While a turn
        runs on the connection, the next ones wait in a queue and are spoken in order.
    {"text": "...", "more": true}
        Live text. Opens a turn whose text is not complete; further messages append to it (their
        other keys are ignored), and the first one without `more` ends it: {"text": "", "more": false}.
    {"cancel": true}
        Stop the running turn at the next frame and forget the queued ones.

Server to client:

    binary     raw float32 little-endian samples, mono, 24 kHz
    {"done": true, "duration_s", "generation_s", "ttfc_ms", "rtf", "samples", "finish_reason"}
        A turn is over; one for each turn, cancelled ones included. A `cancel` that finds nothing to
        stop is answered with an empty one, so that a client never waits in vain.
    {"error": "...", "code": "..."}
        A message was refused; the connection lives on. With "done": true beside it, a turn that had
        begun failed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

ErrorCode = Literal[
    "bad_request",
    "unknown_voice",
    "unknown_language",
    "text_too_long",
    "overloaded",
    "unsupported",
    "internal",
]

VOICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
LANGUAGE_CODES = {
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "pt": "portuguese",
    "ru": "russian",
    "zh": "chinese",
}
_MAX_ERROR_CHARS = 300


class ProtocolError(ValueError):
    """A message that cannot be followed; `str()` of it is one line, fit for the client."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Speak:
    """Text to speak; None leaves a choice to the server."""

    text: str
    more: bool = False
    """The turn's text goes on in a later message."""
    language: str = "auto"
    """Lower-case name."""
    voice: str | None = None
    """`speaker_ref` on the wire: a name the server knows, never a path."""
    temperature: float | None = None
    """Of the talker; 0 takes the most likely code."""
    top_k: int | None = None
    """Of the talker; 0 keeps all."""
    seed: int | None = None
    chunk_frames: int | None = None
    """`chunk_tokens` on the wire: frames of 80 ms in one binary message."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop what is being spoken."""


def parse_client_message(data: str | bytes) -> Speak | Cancel:
    """The meaning of one WebSocket message.

    Raises:
        ProtocolError: anything else than a well-formed message, whatever the bytes.
    """
    fields = parse_object(data)
    if _flag(fields, "cancel"):
        return Cancel()
    if "text" not in fields:
        raise ProtocolError("bad_request", 'neither "text" nor "cancel": true in the message')
    return Speak(
        text=_string(fields, "text"),
        more=_flag(fields, "more"),
        language=_language(fields),
        voice=_voice(fields),
        temperature=_number(fields, "temperature", (int, float), 0, 10),
        top_k=_number(fields, "top_k", (int,), 0, 1 << 16),
        seed=_number(fields, "seed", (int,), 0, 2**64 - 1),
        chunk_frames=_number(fields, "chunk_tokens", (int,), 1, 64),
    )


def parse_object(data: str | bytes) -> dict[str, Any]:
    """A JSON object, strictly: no repeated keys, no NaN or Infinity, no binary message."""
    if not isinstance(data, str):
        raise ProtocolError("bad_request", "binary message; expected a JSON object as text")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ProtocolError:
        raise
    except RecursionError:
        raise ProtocolError("bad_request", "JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "number out of range"
        raise ProtocolError("bad_request", f"not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ProtocolError("bad_request", f"expected a JSON object, got {_kind(value)}")
    return value


def encode_done(
    *, finish_reason: str, samples: int, generation_s: float, ttfc_s: float | None, rtf: float | None
) -> str:
    """The last message of a turn; figures that do not exist (nothing was spoken) are 0."""
    return json.dumps(_done_fields(finish_reason, samples, generation_s, ttfc_s, rtf))


def encode_failed(message: str, *, samples: int, generation_s: float) -> str:
    """The last message of a turn that broke off: an error that is also a `done`."""
    done = _done_fields("error", samples, generation_s, None, None)
    return json.dumps({**_error_fields("internal", message), **done})


def encode_error(code: str, message: str) -> str:
    """A refusal."""
    return json.dumps(_error_fields(code, message))


def _error_fields(code: str, message: str) -> dict[str, Any]:
    line = " ".join(message.split())
    return {"error": line[:_MAX_ERROR_CHARS], "code": code}


def _done_fields(
    finish_reason: str, samples: int, generation_s: float, ttfc_s: float | None, rtf: float | None
) -> dict[str, Any]:
    return {
        "done": True,
        "duration_s": round(samples / 24_000, 4),
        "generation_s": round(generation_s, 4),
        "ttfc_ms": round((ttfc_s or 0.0) * 1000, 2),
        "rtf": round(rtf or 0.0, 4),
        "samples": samples,
        "finish_reason": finish_reason,
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        # Two readers of such a message could each believe another value.
        raise ProtocolError("bad_request", "a key is repeated in a JSON object")
    return fields


def _no_constant(name: str) -> Any:
    raise ProtocolError("bad_request", f"not valid JSON: {name}")


def _kind(value: Any) -> str:
    # Never repr(): the value may be nested to the recursion limit, or be the user's text.
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _string(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise ProtocolError("bad_request", f"{key} is {_kind(value)}, expected a string")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ProtocolError("bad_request", f"{key} holds half of a surrogate pair")
    return value


def _flag(fields: dict[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise ProtocolError("bad_request", f"{key} is {_kind(value)}, expected true or false")
    return bool(value)


def _number(
    fields: dict[str, Any], key: str, kinds: tuple[type, ...], low: int, high: int
) -> Any:  # int | float | None, as `kinds` says
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a number" if float in kinds else "an integer"
        got = "a fraction" if isinstance(value, float) else _kind(value)
        raise ProtocolError("bad_request", f"{key} is {got}, expected {expected}")
    if not low <= value <= high:
        raise ProtocolError("bad_request", f"{key} is out of range, allowed: {low} to {high}")
    return float(value) if float in kinds else value


def _language(fields: dict[str, Any]) -> str:
    if fields.get("language") is None:
        return "auto"
    name = _string(fields, "language").strip().lower()
    if len(name) > 40:
        raise ProtocolError("unknown_language", "language is longer than any name of a language")
    return LANGUAGE_CODES.get(name, name) or "auto"


def _voice(fields: dict[str, Any]) -> str | None:
    if fields.get("speaker_ref") is None:
        return None
    name = _string(fields, "speaker_ref")
    if not name:
        return None
    if not VOICE_NAME.fullmatch(name):
        raise ProtocolError(
            "unknown_voice",
            "speaker_ref must be the name of a voice on the server (letters, digits, _ and -), "
            "not a path, an address or audio",
        )
    return name
