"""The service's state of a reply until it has been played."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from pipecat_client.sentence_ends import SentenceEnds
from qwen_megakernel.serving.word_timing import Pace, WordClock


@dataclass(slots=True)
class Playback:
    """One Pipecat context, from its first text to the end of its audio."""

    clock: WordClock
    sentence_ends: SentenceEnds
    """The ends of sentences in the text that the LLM streams."""
    asked_at: float = field(default_factory=time.time)
    """When the reply was asked for, by the wall clock, as in all of Pipecat's metrics."""
    last_text_at: float = field(default_factory=time.monotonic)
    """When the LLM last wrote text."""
    first_audio_at: float | None = None
    """When the first audio came, by the wall clock."""
    ttfb_reported: bool = False
    state: Literal["open", "spoken", "failed"] = "open"
    """`spoken` to its end, or `failed`: it will not be."""

    @classmethod
    def begin(cls, pace: Pace, language: str) -> Playback:
        """A context without text. `language` is the argument of `SentenceEnds`."""
        return cls(WordClock(pace), SentenceEnds(language))

    def append(self, text: str) -> None:
        """Add text that the LLM has written."""
        self.clock.append(text)
        self.last_text_at = time.monotonic()

    @property
    def pause_s(self) -> float:
        """Seconds since the LLM last wrote text."""
        return time.monotonic() - self.last_text_at

    def end_sentence(self, language: str) -> None:
        """Treat the text so far as a whole sentence, although the next one has not begun."""
        self.sentence_ends = SentenceEnds(language)
        self.clock.complete_segment()
