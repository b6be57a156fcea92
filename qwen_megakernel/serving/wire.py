"""Parsing that all dialects share: strict JSON, typed fields, coded errors. Standard library only."""

from __future__ import annotations

import json
from typing import Any, Literal

ErrorCode = Literal[
    "bad_request",
    "unknown_context",
    "unknown_voice",
    "unknown_language",
    "text_too_long",
    "overloaded",
    "unsupported",
    "unsupported_protocol",
    "internal",
]

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
    """A message is malformed or not supported. `str()` is one line, fit for the client."""

    context_id: str | None = None
    """The context that the message names, if known."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class SpeechError(Exception):
    """An HTTP request gets an error answer. `str()` is one line, fit for the client."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        """`status` is HTTP's. `param` is the wrong field; None if no single field is wrong."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def parse_object(data: str | bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: no repeated keys, no NaN or Infinity, no binary message.

    Raises:
        ProtocolError: it is anything else. No bytes raise another error.
    """
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
        raise ProtocolError("bad_request", f"expected a JSON object, got {kind(value)}")
    return value


def error_line(message: str) -> str:
    """A message for the client, as one line of bounded length."""
    return " ".join(message.split())[:_MAX_ERROR_CHARS]


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    # Never repr(): the value may be nested to the recursion limit, or be the user's text.
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def get_string(fields: dict[str, Any], key: str) -> str:
    """A string of valid Unicode. An absent field counts as null, which is not a string."""
    value = fields.get(key)
    if not isinstance(value, str):
        what = f"is {kind(value)}" if key in fields else "is missing"
        raise ProtocolError("bad_request", f"{key} {what}, expected a string")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ProtocolError("bad_request", f"{key} holds half of a surrogate pair")
    return value


def get_flag(fields: dict[str, Any], key: str) -> bool:
    """A boolean; False if the field is absent or null."""
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise ProtocolError("bad_request", f"{key} is {kind(value)}, expected true or false")
    return bool(value)


def get_number(
    fields: dict[str, Any], key: str, kinds: tuple[type[int | float], ...], low: float, high: float
) -> Any:  # int | float | None, as `kinds` says
    """A number in a range; None if the field is absent or null."""
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a number" if float in kinds else "an integer"
        got = "a fraction" if isinstance(value, float) else kind(value)
        raise ProtocolError("bad_request", f"{key} is {got}, expected {expected}")
    if not low <= value <= high:
        raise ProtocolError("bad_request", f"{key} is out of range, allowed: {low} to {high}")
    return float(value) if float in kinds else value


def language_name(given: str) -> str:
    """The lower-case name of a language, from its name or its two-letter code."""
    name = given.strip().lower()
    return LANGUAGE_CODES.get(name, name) or "auto"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        # Two readers of such a message could each take a different value.
        raise ProtocolError("bad_request", "a key is repeated in a JSON object")
    return fields


def _no_constant(name: str) -> Any:
    raise ProtocolError("bad_request", f"not valid JSON: {name}")
