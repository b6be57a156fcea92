"""Tags in a text: `<spell>ABC 123</spell>` and `<break time="500ms"/>`. Standard library only.

Tags are found while the text arrives. The result is the same however the text is split.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

MAX_BREAK_S = 10.0
DEFAULT_BREAK_S = 0.5
"""Seconds of a break whose tag names no time."""
MAX_TAG_CHARS = 200
"""A longer `<...>` is text."""
SPELT_SIGNS = frozenset("%‰&@§+#*=")
"""Signs that are spelt, as letters, numbers and currency signs are. Other signs separate groups."""

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
    """The meaning of a tag. An unknown tag is left out of the speech."""

    kind: Literal["spell", "end of spell", "break", "unknown"]
    seconds: float = 0.0
    """Length of a break."""


class TagSplitter:
    """Splits one text into tags and the text around them."""

    def __init__(self) -> None:
        self._held = ""
        """Text that may be the beginning of a tag."""

    def append(self, text: str) -> list[str | Tag]:
        """Add text. Returns the tags and texts that no later text can change."""
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
        """End the text. Returns the rest of it. A tag that has only begun is left out."""
        held, self._held = self._held, ""
        return held if held in ("<", "</") else ""


def _end_of_tag(text: str, start: int) -> int | None:
    """Where the tag that starts at `start` ends; 0 if it is no tag, None if later text decides."""
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
        """Goes between the last character and the next one."""

    def spell(self, text: str) -> str:
        """The spoken form of the next piece of text."""
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
