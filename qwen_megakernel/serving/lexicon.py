"""A lexicon: words, and how to write them so that the model says them right. Standard library only.

Only whole words are replaced. A word in lower case stands for any case, and a word with a capital
letter for exactly that spelling. If several words fit, the longest is taken.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache

MAX_WORDS = 500
MAX_WORD_CHARS = 64
MAX_RESPELLING_CHARS = 128
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han."""


def check_lexicon(entries: Mapping[str, str]) -> None:
    """Check words and respellings.

    Raises:
        ValueError: there are too many words, a word or respelling has a wrong length, a word has white
            space around it, or a respelling is blank.
    """
    if len(entries) > MAX_WORDS:
        raise ValueError(f"{len(entries)} words, expected at most {MAX_WORDS}")
    for word, respelling in entries.items():
        if not 1 <= len(word) <= MAX_WORD_CHARS or word != word.strip():
            raise ValueError(
                f"a word of {len(word)} characters, expected 1 to {MAX_WORD_CHARS}, "
                "no white space around them"
            )
        if not respelling.strip() or len(respelling) > MAX_RESPELLING_CHARS:
            raise ValueError(
                f"a respelling of {len(respelling)} characters, "
                f"expected 1 to {MAX_RESPELLING_CHARS}, not all white space"
            )


def read_lexicons(data: bytes, name: str) -> dict[str | None, dict[str, str]]:
    """Read a lexicon file. Returns words and respellings by voice; the key None is for all voices.

    A line is `WORD = RESPELLING`, a comment after `#`, or `[VOICE]`. Words below `[VOICE]` are for that
    voice alone.

    Raises:
        ValueError: the file is malformed. The message names the file and the line.
    """
    lexicons: dict[str | None, dict[str, str]] = {}
    voice: str | None = None
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8") from None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            voice = line[1:-1].strip()
            continue
        word, equals, respelling = line.rpartition(" = ")
        if not equals:
            raise ValueError(f"{name} line {number}: expected WORD = RESPELLING or [VOICE]")
        entries = lexicons.setdefault(voice, {})
        entries[word.strip()] = respelling.strip()
        try:
            check_lexicon(entries)
        except ValueError as error:
            raise ValueError(f"{name} line {number}: {error}") from None
    return lexicons


class Lexicon:
    """Finds its words in a text."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        """`entries` has a respelling for each word, as `check_lexicon` allows them."""
        self._words: dict[str, list[tuple[str, str]]] = {}
        """Words and respellings, longest first, by the word's first character in lower case."""
        for word in sorted(entries, key=len, reverse=True):
            self._words.setdefault(_folded(word[0]), []).append((word, entries[word]))

    def find(self, text: str, start: int, *, ended: bool) -> tuple[int, str] | None:
        """Look for a word of the lexicon that starts at `start`.

        Returns:
            The word's length and respelling; a length of 0 if no word starts there; None if later text
            decides. With `ended` no text follows, and the result is never None.
        """
        for word, respelling in self._words.get(_folded(text[start]), ()):
            found = text[start : start + len(word)]
            expected = word
            if word == _folded(word):
                found = _folded(found)
            end = start + len(word)
            if end < len(text):
                if found == expected and not joined(text[end - 1], text[end]):
                    return len(word), respelling
            elif ended:
                if found == expected:
                    return len(word), respelling
            elif expected.startswith(found):
                return None
        return 0, ""


class LexiconReader:
    """Replaces words in one text as it comes. The result is the same however the text is split."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._held = ""
        """Text that may be the beginning of a word."""
        self._last = " "
        """The character before the held text."""

    def append(self, text: str) -> list[tuple[str, str]]:
        """Add text. Returns the pieces that no later text can change, each as it was written and as it
        is spoken."""
        return self._read(self._held + text, ended=False)

    def end(self) -> list[tuple[str, str]]:
        """End the word. Returns the pieces of the text that was held back."""
        pieces = self._read(self._held, ended=True)
        self._last = " "
        return pieces

    def _read(self, text: str, *, ended: bool) -> list[tuple[str, str]]:
        pieces, position, start = [], 0, 0
        while position < len(text):
            found: tuple[int, str] | None = (0, "")
            if not joined(self._last, text[position]):
                found = self._lexicon.find(text, position, ended=ended)
            if found is None:
                break
            length, respelling = found
            if length:
                pieces += _unchanged(text[start:position])
                pieces.append((text[position : position + length], respelling))
                start = position + length
            position += max(length, 1)
            self._last = text[position - 1]
        self._held = text[position:]
        return pieces + _unchanged(text[start:position])


def _unchanged(text: str) -> list[tuple[str, str]]:
    return [(text, text)] if text else []


def _folded(text: str) -> str:
    """The text in lower case. Characters whose lower case is longer stay, so the length is the same."""
    return "".join([char.lower() if len(char.lower()) == 1 else char for char in text])


def joined(before: str, after: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    if not (_in_word(before) and _in_word(after)):
        return False
    return not (_is_unspaced(before) or _is_unspaced(after)) or unicodedata.category(after)[0] == "M"


@lru_cache(4096)
def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M"


def _is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _UNSPACED)
