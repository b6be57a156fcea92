"""A turn's text as prompts: one if a single utterance can hold it, otherwise one for each part.

A part has at most as many tokens as fit into an utterance (`max_part_tokens`). The tokens of its first
half go to its prompt at once. After these, only whole sentences are added: a sentence that does not fit
begins the next part. If one sentence fills the half, the part ends at a clause, otherwise at a word,
otherwise anywhere. The cuts depend on the text alone, not on how it arrives.
"""

from __future__ import annotations

import re
from collections import deque

from qwen_megakernel.config import MAX_UTTERANCE_FRAMES, Guards
from qwen_megakernel.prompt.builder import Prompt
from qwen_megakernel.prompt.text_feed import TextFeed, TextTokenizer

PART_BORDER = -1
"""Stands between the tokens of two parts."""
MIN_PART_TOKENS = 32
"""A part is never smaller than this, however little room there is."""
_TAIL_TOKENS = 8
"""This many tokens are enough to tell whether a sentence ends."""

_NOTHING, _WORD, _CLAUSE, _SENTENCE = range(4)
_WIDE = "。！？｡，；：、"
"""Signs that no space follows. They share a word with the letters after them."""
_WIDE_ENDS = re.compile(r"[。！？｡]['\"’”)\]}」』】）》]*$")
_ENDS = re.compile(r"[.!?…]['\"’”)\]}»」』】）》]*$")
_WIDE_PAUSES, _PAUSES = tuple("，；：、"), tuple(",;:–—")


def max_part_tokens(guards: Guards, room: int, *, streaming: bool) -> int:
    """The most text tokens of a part whose length budget stays within an utterance's limit.

    Args:
        guards: of the turn. If their budget is off, the default guards apply.
        room: positions of a slot that remain after the prompt's rows without text.
        streaming: the text layout. In the non-streaming layout each token takes a position of its own.
    """
    bound = guards if guards.frames_per_token else Guards()
    by_frames = (MAX_UTTERANCE_FRAMES - bound.base_frames) // bound.frames_per_token
    by_room = (room - bound.base_frames) // (bound.frames_per_token + (not streaming))
    return max(MIN_PART_TOKENS, min(by_frames, by_room))


class PartFeed:
    """A turn's text as tokens, with `PART_BORDER` between the parts."""

    def __init__(self, feed: TextFeed, tokenizer: TextTokenizer, max_tokens: int) -> None:
        """Cut the output of `feed`, which `tokenizer` tokenises, into parts of at most `max_tokens`."""
        self._feed, self._tokenizer = feed, tokenizer
        self._max_tokens, self._free_tokens = max_tokens, max_tokens // 2
        self._given: list[int] = []
        """Tokens that the current call returns."""
        self._count = 0
        """Number of tokens of the last part."""
        self._tail: list[int] = []
        """The last tokens of that part."""
        self._held: list[tuple[str, list[int]]] = []
        """Words of a sentence that may belong to the next part, with their tokens."""
        self._num_held = 0

    def append(self, text: str) -> list[int]:
        """Take more text. Returns the tokens whose part is certain."""
        self._take(self._feed.append(text))
        return self._take_given()

    def flush(self) -> list[int]:
        """Returns the tokens of all text that was held back."""
        self._take(self._feed.flush())
        self._give_held()
        return self._take_given()

    def _take_given(self) -> list[int]:
        given, self._given = self._given, []
        return given

    def _take(self, token_ids: list[int]) -> None:
        if not self._held and self._count + len(token_ids) <= self._free_tokens:
            self._give(token_ids)
        else:
            self._add_words(self._tokenizer.decode(token_ids))

    def _add_words(self, text: str) -> None:
        for word in self._tokenizer.words(text):
            self._add(word)

    def _add(self, word: str) -> None:
        token_ids = self._tokenizer.encode(word)
        if len(token_ids) > self._max_tokens and len(word) > 1:
            half = len(word) // 2
            self._add(word[:half])
            self._add(word[half:])
            return
        if not self._held and self._count + len(token_ids) <= self._free_tokens:
            self._give(token_ids)
            return
        said = "".join(w for w, _ in self._held[-2:])
        if self._held and (_border(said, word) == _SENTENCE or _WIDE_ENDS.match(word[0])):
            self._give_held()
        fits = self._count + self._num_held + len(token_ids) <= self._max_tokens
        if fits or word.isspace():  # a part neither begins nor ends with white space
            self._held.append((word, token_ids))
            self._num_held += len(token_ids)
        else:
            self._cut(word)

    def _cut(self, word: str) -> None:
        """End the part at the best place before `word`, and give what follows that place to the next
        part."""
        words = [*(w for w, _ in self._held), word]
        before, text = self._tokenizer.decode(self._tail), "".join(words)
        places, start = [], 0  # number of a word, characters into it, characters into the text
        for number, one in enumerate(words):
            places.append((number, 0, start))
            # If an apostrophe began the next part, it and the letters after it would give other tokens.
            if len(one) > 1 and one[0] in _WIDE and one[1:] != "'":
                places.append((number, 1, start + 1))
            start += len(one)
        number, inside, at = max(
            (place for place in places if place[2] or self._count),
            key=lambda place: (_border(before + text[: place[2]], text[place[2] :]), place[2]),
        )
        kept = self._held[:number]
        while kept and not inside and kept[-1][0].isspace():
            kept.pop()
        for _, token_ids in kept:
            self._give(token_ids)
        if inside:
            self._give(self._tokenizer.encode(words[number][:inside]))
        self._given.append(PART_BORDER)
        self._count, self._tail, self._held, self._num_held = 0, [], [], 0
        self._add_words(text[at:].lstrip())

    def _give_held(self) -> None:
        for _, token_ids in self._held:
            self._give(token_ids)
        self._held, self._num_held = [], 0

    def _give(self, token_ids: list[int]) -> None:
        self._given += token_ids
        self._count += len(token_ids)
        self._tail = [*self._tail, *token_ids][-_TAIL_TOKENS:]


class PromptParts:
    """The prompts of one turn, in the order in which they are spoken."""

    def __init__(self, first: Prompt) -> None:
        """`first` is an empty prompt. The others are made like it."""
        self._prompts = deque([first])

    @property
    def current(self) -> Prompt:
        """The prompt that is spoken now."""
        return self._prompts[0]

    @property
    def has_next(self) -> bool:
        """Whether there is a prompt after the current one. If so, the current one is complete."""
        return len(self._prompts) > 1

    def advance(self) -> None:
        """Go on to the next prompt."""
        self._prompts.popleft()

    def extend(self, token_ids: list[int]) -> None:
        """Add tokens, as `PartFeed` returns them."""
        while PART_BORDER in token_ids:
            border = token_ids.index(PART_BORDER)
            self._prompts[-1].extend(token_ids[:border])
            if self._prompts[-1].num_text_tokens:
                self.cut()
            token_ids = token_ids[border + 1 :]
        self._prompts[-1].extend(token_ids)

    def cut(self) -> None:
        """End the last prompt here. Later tokens go to the next one."""
        self._prompts[-1].end()
        self._prompts.append(self._prompts[-1].sibling())

    def end(self) -> None:
        """End the text. No more tokens come."""
        self._prompts[-1].end()


def _border(before: str, after: str) -> int:
    """What ends between two texts, as a number. A higher one is a better place to cut."""
    said = before.rstrip()
    rest = after.lstrip()
    gap = before[len(said) :] + after[: len(after) - len(rest)]
    if "\n" in gap or _WIDE_ENDS.search(said) or (gap and _ENDS.search(said)):
        return _SENTENCE
    if said.endswith(_WIDE_PAUSES) or (gap and said.endswith(_PAUSES)):
        return _CLAUSE
    return _WORD if gap else _NOTHING
