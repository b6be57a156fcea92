"""Rules for the fields of messages, for the parsers and for JSON Schema. Standard library only.

A message is a frozen dataclass whose fields are declared as `Annotated[type, rule]`. `build` reads
one from a JSON object, and `object_schema` describes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import Any, get_type_hints

from qwen_megakernel.serving.lexicon import (
    MAX_RESPELLING_CHARS,
    MAX_WORD_CHARS,
    MAX_WORDS,
    check_lexicon,
)
from qwen_megakernel.serving.wire import ProtocolError, get_flag, get_number, get_string, kind

MIN_SPEED, MAX_SPEED = 0.25, 4.0
"""Slowest and fastest rate of speech, as multiples of the model's own."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The values that a field may have: how to read them, and their schema."""

    read: Callable[[dict[str, Any], str], Any]
    """(the message's values, the field's name) -> the field's value. Raises `ProtocolError`."""
    schema: dict[str, Any]
    """The field's JSON Schema."""
    may_be_absent: bool = False


def or_none(rule: Rule) -> Rule:
    """A rule that also allows null and absence."""

    def read(values: dict[str, Any], key: str) -> Any:
        return None if values.get(key) is None else rule.read(values, key)

    schema = {**rule.schema, "type": [rule.schema["type"], "null"]}
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return Rule(read, schema, may_be_absent=True)


def narrowed(rule: Rule, **keywords: Any) -> Rule:
    """A rule with a stricter schema: another function checks that, or a later server may differ."""
    return replace(rule, schema={**rule.schema, **keywords})


def matching(pattern: re.Pattern[str], expected: str) -> Rule:
    """A string that matches a whole pattern."""

    def read(values: dict[str, Any], key: str) -> str:
        value = get_string(values, key)
        if not pattern.fullmatch(value):
            raise ProtocolError("bad_request", f"{key} must be {expected}")
        return value

    return Rule(read, {"type": "string", "pattern": f"^{pattern.pattern}$"})


def one_of(choices: Iterable[str]) -> Rule:
    """One of some strings. Only the schema says so; `read` takes any string."""
    return narrowed(STRING, enum=[*choices])


def short_string(max_chars: int) -> Rule:
    """A string of at most `max_chars` characters."""

    def read(values: dict[str, Any], key: str) -> str:
        value = get_string(values, key)
        if len(value) > max_chars:
            raise ProtocolError("bad_request", f"{key} is longer than {max_chars} characters")
        return value

    return Rule(read, {"type": "string", "maxLength": max_chars})


def number(kinds: tuple[type[int | float], ...], low: float, high: float) -> Rule:
    """A number of these kinds in a range, both ends included."""

    def read(values: dict[str, Any], key: str) -> int | float:
        value: int | float | None = get_number(values, key, kinds, low, high)
        if value is None:
            raise ProtocolError("bad_request", f"{key} is {'null' if key in values else 'missing'}")
        return value

    json_type = "number" if float in kinds else "integer"
    return Rule(read, {"type": json_type, "minimum": low, "maximum": high})


def integer(low: int, high: int) -> Rule:
    """An integer in a range, both ends included."""
    return number((int,), low, high)


def words(values: dict[str, Any], key: str) -> dict[str, str]:
    """An object whose values are strings, as a lexicon takes them."""
    found = values.get(key)
    if not isinstance(found, dict):
        raise ProtocolError("bad_request", f"{key} is {kind(found)}, expected an object")
    entries = {word: get_string(found, word) for word in found if isinstance(found[word], str)}
    if len(entries) < len(found):
        raise ProtocolError("bad_request", f"{key} must have strings as values")
    try:
        check_lexicon(entries)
    except ValueError as error:
        raise ProtocolError("bad_request", f"{key} has {error}") from None
    return entries


LEXICON = Rule(
    words,
    {
        "type": "object",
        "maxProperties": MAX_WORDS,
        "propertyNames": {"minLength": 1, "maxLength": MAX_WORD_CHARS},
        "additionalProperties": {"type": "string", "minLength": 1, "maxLength": MAX_RESPELLING_CHARS},
    },
)


def list_of(kind_of_item: type, expected: str) -> Rule:
    """A list of strings or of integers."""

    def read(values: dict[str, Any], key: str) -> tuple[Any, ...]:
        found = values.get(key)
        # type() and not isinstance(): True is not a number here.
        if not isinstance(found, list) or any(type(item) is not kind_of_item for item in found):
            raise ProtocolError("bad_request", f"{key} must be {expected}")
        return tuple(found)

    json_type = {str: "string", int: "integer"}[kind_of_item]
    return Rule(read, {"type": "array", "items": {"type": json_type}})


def object_of(cls: type) -> Rule:
    """An object of a dataclass."""

    def read(values: dict[str, Any], key: str) -> Any:
        found = values.get(key)
        if not isinstance(found, dict):
            raise ProtocolError("bad_request", f"{key} is {kind(found)}, expected an object")
        return build(cls, found)

    return Rule(read, object_schema(cls))


def objects_of(cls: type) -> Rule:
    """A list of objects of a dataclass."""

    def read(values: dict[str, Any], key: str) -> tuple[Any, ...]:
        found = values.get(key)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ProtocolError("bad_request", f"{key} must be a list of objects")
        return tuple(build(cls, item) for item in found)

    return Rule(read, {"type": "array", "items": object_schema(cls)})


@cache
def rules_of(cls: type) -> dict[str, Rule]:
    """The rules of a message's fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def object_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of a message without its `type`, or of an object in a message."""
    rules = rules_of(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING or not rules[f.name].may_be_absent]
    properties = {name: rule.schema for name, rule in rules.items()}
    return {"type": "object", "properties": properties, "required": required}


def build(cls: type, values: dict[str, Any]) -> Any:
    """Build a message of a class from a JSON object. Fields of other names are ignored.

    Raises:
        ProtocolError: a rule does not allow the value of its field.
    """
    found = {}
    for each in fields(cls):
        value = rules_of(cls)[each.name].read(values, each.name)
        if value is not None or each.default is MISSING:
            found[each.name] = value
    return cls(**found)


def refuse_unknown(cls: type, values: dict[str, Any], *more: str) -> None:
    """Raise `ProtocolError` if a JSON object has a field that is neither the class's nor in `more`."""
    allowed = [each.name for each in fields(cls)]
    if not values.keys() <= {*allowed, *more}:
        # The unknown name is the client's text, so the error does not repeat it.
        raise ProtocolError("bad_request", f"a field is unknown, expected {', '.join(allowed)}")


STRING = Rule(get_string, {"type": "string"})
MAYBE_STRING = or_none(STRING)
SPEED = number((int, float), MIN_SPEED, MAX_SPEED)
FLAG = Rule(get_flag, {"type": "boolean"})
STRINGS = list_of(str, "a list of strings")
SECONDS = number((int, float), 0, 1e12)
COUNT = integer(0, 2**63)
