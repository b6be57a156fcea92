"""Find where sentences end in a reply that is still being written."""

from __future__ import annotations

import re

from pipecat.frames.frames import TextType
from pipecat.utils.string import match_endofsentence

from pipecat_client.tags import new_aggregator

_NUMBER_MAY_GO_ON = re.compile(r"\d\.$")
_NEXT_SENTENCE = " A"
"""With this text after a period, Pipecat's tokenizer can tell whether it ends an abbreviation."""


class SentenceEnds:
    """Splits a growing text where Pipecat itself finds the ends of sentences."""

    def __init__(self, language: str, *, markup: bool = False) -> None:
        """`language` is a code such as `en`, as in `TTSService.text_aggregation_language`.

        `markup`: no sentence ends within a tag or within what is spelt.
        """
        self._language = language
        self._aggregator = new_aggregator(TextType.SENTENCE, language, markup=markup)
        self._sentence = ""
        """The text since the last end."""

    async def split(self, text: str) -> list[str]:
        """Add text. Returns its pieces: each one but the last ends a sentence.

        A sentence has ended when the next one begins. The first piece is empty if the end lies before
        this text. An end within earlier text comes too late and is left out.
        """
        num_given = len(self._sentence)
        whole = self._sentence + text
        pieces, start, position = [], num_given, 0
        async for sentence in self._aggregator.aggregate(text):
            rest = whole[position:]
            position += len(rest) - len(rest.lstrip(" ")) + len(sentence.text)
            if not whole[position:num_given].strip():
                end = max(position, num_given)
                pieces.append(whole[start:end])
                start = end
        self._sentence = whole[position:]
        return [*pieces, whole[start:]]

    @property
    def at_end(self) -> bool:
        """Whether the text so far ends with a whole sentence, if no more text comes for a while."""
        text = self._sentence.rstrip()
        if not text or _NUMBER_MAY_GO_ON.search(text):
            return False
        return match_endofsentence(text + _NEXT_SENTENCE, language=self._language) == len(text)
