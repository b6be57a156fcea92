"""Tags in a text: `<spell>ABC 123</spell>` and `<break time="500ms"/>`. Standard library only.

Tags are told from text as it comes. The result is the same however the text is split.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

MAX_BREAK_S = 10.0
DEFAULT_BREAK_S = 0.5
"""Of a break whose tag does not say."""
MAX_TAG_CHARS = 200
"""A longer `<...>` is text."""
SPELT_SIGNS = frozenset("%‰&@§+#*=")
"""Signs that are spelt, beside letters, numbers and currency signs. Others part groups."""

_ATTRIBUTE = r"""\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*')"""
_OURS = r"</?(?:spell|break)(?:[\s/][^<>]*)?"
_TAG = re.compile(rf"(?:{_OURS}|</?[A-Za-z][\w:-]*(?:{_ATTRIBUTE})*\s*/?)>", re.IGNORECASE)
_BEGINNING = re.compile(
    rf"{_OURS}|</?(?:[A-Za-z][\w:-]*(?:{_ATTRIBUTE})*\s*"
    r"""(?:(?<=\s)[\w:-]+\s*(?:=\s*(?:"[^"<>]*"?|'[^'<>]*'?)?)?)?/?)?""",
    re.IGNORECASE,
)
_TIME = re.compile(r"""\stime\s*=\s*["']?\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)\b""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tag:
    """What a tag means; one that nobody here knows is left out."""

    kind: Literal["spell", "end of spell", "break", "unknown"]
    seconds: float = 0.0
    """Of a break."""


class TagSplitter:
    """Splits one text into tags and the text around them."""

    def __init__(self) -> None:
        self._held = ""
        """May be the beginning of a tag."""

    def append(self, text: str) -> list[str | Tag]:
        """More text; what is decided."""
        text = self._held + text
        found: list[str | Tag] = []
        start = position = 0
        while (position := text.find("<", position)) >= 0:
            end = _end_of_tag(text, position)
            if end == 0:
                position += 1
                continue
            found += [text[start:position]] if position > start else []
            if end is None:
                self._held = text[position:]
                return found
            found.append(_meaning(text[position:end]))
            start = position = end
        self._held = ""
        return found + ([text[start:]] if start < len(text) else [])

    @property
    def holds(self) -> bool:
        """Whether a tag may have begun."""
        return bool(self._held)

    def end(self) -> str:
        """The text ends. What was held back is text, or nothing where a tag has begun."""
        held, self._held = self._held, ""
        return held if held in ("<", "</") else ""


def _end_of_tag(text: str, start: int) -> int | None:
    """Where the tag that starts here ends; 0 for no tag, None if more text decides."""
    head = text[start : start + MAX_TAG_CHARS]
    stop = re.search(r"[<>]", head[1:])
    if stop is not None:
        candidate = head[: stop.end() + 1]
        return start + len(candidate) if _TAG.fullmatch(candidate) else 0
    return None if len(head) < MAX_TAG_CHARS and _BEGINNING.fullmatch(head) else 0


def _meaning(tag: str) -> Tag:
    name = re.match(r"</?([\w:-]+)", tag)
    assert name is not None, "the pattern of a tag has a name"
    closes = tag.startswith("</")
    match name[1].lower():
        case "spell":
            return Tag("end of spell" if closes else "unknown" if tag.endswith("/>") else "spell")
        case "break":
            return Tag("unknown") if closes else Tag("break", _seconds(tag))
    return Tag("unknown")


def _seconds(tag: str) -> float:
    time = _TIME.search(tag)
    if time is None:
        return DEFAULT_BREAK_S
    seconds = float(time[1]) / (1000 if time[2].lower() == "ms" else 1)
    return min(seconds, MAX_BREAK_S)


class Speller:
    """Writes a text so that its characters are said one by one: `AB 12` as `A B, 1 2`."""

    def __init__(self) -> None:
        self._between = ""
        """What parts the next character from the last."""

    def spell(self, text: str) -> str:
        """The spoken form of more text."""
        return "".join([self._spell_one(char) for char in text])

    def _spell_one(self, char: str) -> str:
        category = unicodedata.category(char)
        if category[0] == "M":
            return char
        if not (category[0] in "LN" or category == "Sc" or char in SPELT_SIGNS):
            self._between = ", " if self._between else ""
            return ""
        between, self._between = self._between, " "
        return between + (char.upper() if len(char.upper()) == 1 else char)
