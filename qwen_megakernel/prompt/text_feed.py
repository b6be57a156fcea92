"""Text to tokens while it is being written. The tokens are those of the whole text, however it is
split."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from tokenizers import Tokenizer

from qwen_megakernel.prompt.text_cleaning import TextCleaner

_PIECE = 1024
"""Characters that are tokenised together. The tokenizer's time grows faster than the length of a
text."""
_LETTER, _NUMBER, _SPACE, _OTHER = "L", "N", " ", "*"


class TextTokenizer:
    """The checkpoint's byte-level BPE. Control tokens that a text spells out stay plain text."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without control tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def words(self, text: str) -> list[str]:
        """The pieces of a text that are tokenised separately."""
        return [
            text[start:end] for _, (start, end) in self._backend.pre_tokenizer.pre_tokenize_str(text)
        ]

    def normalise(self, text: str) -> str:
        """The form of a text that is tokenised (NFC)."""
        normaliser = self._backend.normalizer
        return normaliser.normalize_str(text) if normaliser else text

    def token_starts(self, text: str) -> list[int]:
        """Where the pre-tokens of a normalised text start. BPE merges nothing across them."""
        return [start for _, (start, _) in self._backend.pre_tokenizer.pre_tokenize_str(text)]


class TextFeed:
    """Turns text that arrives in pieces into exactly the tokens of the whole text.

    White space around the whole text is dropped. The work is linear in the text: a pre-token that keeps
    growing is examined only when it may have ended, not at each append.
    """

    def __init__(self, tokenizer: TextTokenizer, cleaner: TextCleaner | None = None) -> None:
        """Tokenise with `tokenizer` what `cleaner` leaves of the text. None leaves all of it."""
        self._tokenizer, self._cleaner = tokenizer, cleaner
        self._held: list[str] = []
        """Pieces of the text that is not tokenised yet."""
        self._num_held = 0
        self._last_class = _SPACE
        """Class of the last character."""
        self._next_look = 0
        """Number of held characters from which on it is worthwhile to look again, after a look without
        result."""
        self._begun = False

    def append(self, text: str) -> list[int]:
        """Take more text. Returns the tokens that can no longer change."""
        if self._cleaner is not None:
            text = self._cleaner.clean(text)
        ids = []
        for start in range(0, len(text), _PIECE):
            ids += self._append(text[start : start + _PIECE])
        return ids

    def flush(self) -> list[int]:
        """Returns the tokens of all held text, as if the text ended here. More text may follow."""
        held = self._tokenizer.normalise("".join(self._held))
        return self._commit(held, len(held.rstrip()))

    def _append(self, text: str) -> list[int]:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if not text:
            return []
        self._held.append(text)
        self._num_held += len(text)
        before, self._last_class = self._last_class, _class_of(text[-1])
        word_ends = self._last_class == _SPACE and before != _SPACE
        if not (word_ends or (self._num_held >= self._next_look and _ends_a_token(before, text))):
            return []
        held = self._tokenizer.normalise("".join(self._held))
        return self._commit(held, self._final_length(held))

    def _final_length(self, held: str) -> int:
        """How many leading characters of a normalised text keep their tokens whatever text follows.

        When something other than white space follows, all pre-tokens except the last are final. White
        space after the last one ends it too, unless it is a line break that the pre-token would include.
        """
        body = held.rstrip()
        space = held[len(body) :]
        if not body:
            return 0
        ends = self._tokenizer.token_starts(body)
        if space and (space[0] not in "\r\n" or (body[-1].isascii() and body[-1].isalnum())):
            return len(body)
        settled = len(body) if space else _settled_length(body)
        return max(end for end in ends if end <= settled)

    def _commit(self, held: str, length: int) -> list[int]:
        ready, rest = held[:length], held[length:]
        self._held, self._num_held = ([rest] if rest else []), len(rest)
        self._next_look = 0 if ready else len(rest) + len(rest) // 8 + 1
        return self._tokenizer.encode(ready) if ready else []


def _ends_a_token(before: str, text: str) -> bool:
    """Whether a pre-token may end in `text`, which follows a character of class `before`."""
    for char in text:
        found = _class_of(char)
        if found != before or found == _NUMBER:
            return True
    return False


@lru_cache(4096)
def _class_of(char: str) -> str:
    """The class of a character for the tokenizer's split. Runs of a class are never split, except
    numbers."""
    if char.isspace():
        return _SPACE
    kind = unicodedata.category(char)[0]
    return kind if kind in (_LETTER, _NUMBER) else _OTHER


def _settled_length(text: str) -> int:
    """How many leading characters of an NFC text stay the same whatever text follows."""
    settled = len(text)
    while settled > 0:
        settled -= 1
        if not _joins_backward(text[settled]):
            return settled
    return 0


@lru_cache(4096)
def _joins_backward(char: str) -> bool:
    """Whether NFC may move a character before others, or compose it with the one before.

    This is so for marks, for vowel and final jamo, and for the letters of Kirat Rai. It is assumed for
    characters that Python does not know.
    """
    if unicodedata.category(char)[0] == "M" or unicodedata.category(char) == "Cn":
        return True
    return "\u1160" <= char <= "\u11ff" or "\U00016d40" <= char <= "\U00016d7f"
