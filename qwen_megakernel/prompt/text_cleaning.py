"""Text cleaning: drops what cannot be spoken and what breaks words. See docs/text.md.

The decision about a character depends only on the characters before it. So the result is the same
however the text is split.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal

_Kind = Literal["word", "sign", "mark", "joiner", "space", "nothing"]

MAX_REPEATS = 3
"""A sign may stand this many times in a row: `.........` is spoken as `...`."""
MAX_MARKS = 4
"""Combining marks that a letter may have. More are decoration."""
MAX_LEAD = 16
"""Signs that may stand before the first word."""

SPOKEN_SIGNS = frozenset("%‰&@§")
"""Signs that are spoken on their own. So are letters, numbers and currency signs."""
SPOKEN_SYMBOLS = frozenset("°©®")
"""Symbols that stay. So do symbols that stand for letters or numbers (№, ℃, ™, ㎏)."""

_IGNORABLE = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5),
    (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164),
    (0xFDD0, 0xFDEF), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB),
    (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Unicode's Default_Ignorable_Code_Point, which Python does not have; noncharacters; annotations."""
_PICTURES = ((0x25A0, 0x25FF), (0x1F3FB, 0x1F3FF))
"""Geometric shapes and skin tones. They are pictures, although Unicode puts some outside category So."""
_JOINING_SCRIPTS = (
    (0x0600, 0x0DFF), (0x0F00, 0x109F), (0x1780, 0x18AF), (0x1A20, 0x1AAF), (0x1B00, 0x1BFF),
    (0x1CD0, 0x1CFF), (0xA800, 0xABFF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE), (0x10A00, 0x11FFF),
)  # fmt: skip
"""Blocks of scripts in which ZWJ and ZWNJ belong to the spelling: Arabic, Syriac, those of India,
others."""

_OPENING = ("Ps", "Pi", "Zs")
"""Categories of signs that may stand before a space: « and similar ones."""
_PARTS = re.compile(r"[A-Za-z0-9]+|.", re.DOTALL)


class TextCleaner:
    """Cleans one text as it comes."""

    def __init__(self) -> None:
        self._begun = False
        """Whether something to say has come."""
        self._lead = ""
        """Signs before the first word. A space drops them unless all are opening signs."""
        self._last = " "
        """The last character of the cleaned text. A space stands for its beginning."""
        self._num_repeats = 0
        """How many times the last sign stands in a row."""
        self._num_marks = 0
        """Marks on the last letter."""

    def clean(self, text: str) -> str:
        """Take more text. Returns what is spoken of it. White space may remain at the end of the whole
        text."""
        return "".join([self._take(part) for part in _PARTS.findall(text)])

    def _take(self, part: str) -> str:
        """The cleaned form of a character, or of a run of ASCII letters and digits."""
        kind = "word" if len(part) > 1 else _kind_of(part)
        if kind == "nothing" or not self._stays(kind, part):
            return ""
        if kind == "space":
            part = " "
        self._last = part[-1]
        if self._begun:
            return part
        if kind == "word":
            self._begun = True
            part, self._lead = self._lead + part, ""
            return part
        self._hold(kind, part)
        return ""

    def _stays(self, kind: _Kind, char: str) -> bool:
        """Whether a character is spoken or shapes what is spoken. Updates the counts."""
        last = self._last
        if kind == "space":
            return last != " "
        if kind == "joiner":
            return _is_in(_JOINING_SCRIPTS, last)
        if kind == "mark":
            self._num_marks += 1
            return self._num_marks <= MAX_MARKS and last != " "
        self._num_marks = 0
        self._num_repeats = self._num_repeats + 1 if kind == "sign" and char == last else 1
        return kind == "word" or self._num_repeats <= MAX_REPEATS

    def _hold(self, kind: _Kind, part: str) -> None:
        """Keep what comes before the first word, in case a word follows."""
        if kind == "space" and any(unicodedata.category(c) not in _OPENING for c in self._lead):
            self._lead = ""
        elif self._lead or kind != "space":
            self._lead = (self._lead + part)[-MAX_LEAD:]


@lru_cache(4096)
def _kind_of(char: str) -> _Kind:
    category = unicodedata.category(char)
    if char in "\u200c\u200d":
        return "joiner"
    if char.isspace():
        return "space"
    if category in ("Cc", "Co", "Cs", "Me") or _is_in(_IGNORABLE, char) or ord(char) & 0xFFFE == 0xFFFE:
        return "nothing"
    if category == "So" or _is_in(_PICTURES, char):
        return "word" if char in SPOKEN_SYMBOLS or _stands_for_word(char) else "space"
    if category[0] in "LN" or category == "Sc" or char in SPOKEN_SIGNS:
        return "word"
    return "mark" if category[0] == "M" else "sign"


def _stands_for_word(char: str) -> bool:
    spelt = unicodedata.normalize("NFKC", char)
    return any(unicodedata.category(c)[0] in "LN" for c in spelt)


def _is_in(ranges: tuple[tuple[int, int], ...], char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)
