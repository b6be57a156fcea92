"""Turns the text that a client writes into the text that the model gets: respellings, spelt codes,
pauses.

Word times name words as the client wrote them, without tags. So each piece of text has two forms,
written and spoken. Both are the same however the text is split. Without a lexicon and without markup
they are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_megakernel.serving.lexicon import Lexicon, LexiconReader, joined
from qwen_megakernel.serving.markup import Speller, Tag, TagSplitter
from qwen_megakernel.surrogates import SurrogateJoiner


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of text."""

    written: str
    """As the client wrote it, without tags."""
    spoken: str
    """As the model gets it."""

    @property
    def blank(self) -> bool:
        """Whether it is white space alone. A tag that is left out is empty, but not blank."""
        return self.written.isspace()


@dataclass(frozen=True, slots=True)
class Pause:
    """Silence."""

    seconds: float
    blank = False


Span = Said | Pause
_NOTHING = Said("", "")
"""Stands for a tag that is left out."""


class TextReader:
    """Reads one segment's text as it comes."""

    def __init__(self, lexicon: Lexicon | None = None, *, markup: bool = False) -> None:
        """Read without a lexicon if it is None, and follow tags if `markup` is true."""
        self._words = None if lexicon is None else LexiconReader(lexicon)
        self._tags = TagSplitter() if markup else None
        self._surrogates = SurrogateJoiner()
        self._speller: Speller | None = None
        """Spells the text within `<spell>`; None elsewhere."""
        self._last = " "
        """The last written character."""
        self._parted_by: str | None = None
        """After a tag, the text that is spoken between two words which only the tag separates; it is
        empty after a pause. None elsewhere."""

    def append(self, text: str) -> list[Span]:
        """Add text. Returns the spans that no later text can change."""
        if self._words is None and self._tags is None:
            return [Said(text, text)] if text else []
        return self._read(self._surrogates.join(text))

    def end(self) -> list[Span]:
        """End the text. Returns the spans of the text that was held back."""
        spans = self._read(half) if (half := self._surrogates.end()) else []
        if self._tags is not None and self._tags.holds:
            spans += self._say(self._tags.end()) or [_NOTHING]
        return spans + self._end_word()

    def _read(self, text: str) -> list[Span]:
        spans: list[Span] = []
        for part in [text] if self._tags is None else self._tags.append(text):
            if isinstance(part, str):
                spans += self._say(part)
                continue
            spans += self._end_word()
            spans += self._follow(part)
            paused = self._parted_by == "" or isinstance(spans[-1], Pause)
            self._parted_by = "" if paused else " "
        return spans

    def _follow(self, tag: Tag) -> list[Span]:
        if tag.kind == "spell":
            self._speller = Speller()
        elif tag.kind == "end of spell":
            self._speller = None
        return [Pause(tag.seconds)] if tag.kind == "break" and tag.seconds > 0 else [_NOTHING]

    def _say(self, text: str) -> list[Span]:
        gap: list[Span] = []
        if text and self._parted_by is not None:
            parts = joined(self._last, text[0])
            if self._parted_by == "":  # a pause
                parts = not (self._last.isspace() or text[0].isspace())
            gap = [Said(" ", self._parted_by)] if parts else []
            self._parted_by = None
        if not text:
            return []
        self._last = text[-1:] or self._last
        if self._speller is not None:
            return [*gap, Said(text, self._speller.spell(text))]
        if self._words is None:
            return [*gap, Said(text, text)]
        return gap + [Said(*piece) for piece in self._words.append(text)]

    def _end_word(self) -> list[Span]:
        return [] if self._words is None else [Said(*piece) for piece in self._words.end()]
