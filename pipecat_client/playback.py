"""The service's state of a reply until it has been played."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipecat_client.sentence_ends import SentenceEnds
from qwen_megakernel.serving.spoken_text import TextReader
from qwen_megakernel.serving.word_timing import Pace, WordClock


@dataclass(slots=True)
class Gaps:
    """Times that the audio of a reply came too late, and playback stood still."""

    count: int = 0
    seconds: float = 0.0
    """Seconds of all gaps together."""
    _plays_until: float | None = None

    def receive(self, seconds: float, now: float) -> None:
        """Note that `seconds` of audio have come at `now` (`time.monotonic()`)."""
        if self._plays_until is None:
            self._plays_until = now
        elif now > self._plays_until:
            self.count += 1
            self.seconds += now - self._plays_until
            self._plays_until = now
        self._plays_until += seconds

    def pause(self) -> None:
        """Note that all text is spoken. A later lack of audio is no gap."""
        self._plays_until = None


@dataclass(slots=True)
class Playback:
    """One Pipecat context, from its first text to the end of its audio."""

    clock: WordClock
    sentence_ends: SentenceEnds
    """Finds the ends of sentences in the text that the LLM streams."""
    reader: TextReader | None = None
    """Reads the text of the segment that has begun."""
    asked_at: float = field(default_factory=time.time)
    """When the reply was asked for, by the wall clock, as in all of Pipecat's metrics."""
    last_text_at: float = field(default_factory=time.monotonic)
    """When the LLM last wrote text."""
    first_audio_at: float | None = None
    """When the first audio came, by the wall clock."""
    gaps: Gaps = field(default_factory=Gaps)
    ttfb_reported: bool = False
    state: Literal["open", "spoken", "failed"] = "open"
    """`spoken` to its end, or `failed`: it will not be."""

    @classmethod
    def begin(cls, pace: Pace, sentence_ends: SentenceEnds) -> Playback:
        """A context that has no text yet."""
        return cls(WordClock(pace), sentence_ends)

    def append(self, text: str, new_reader: Callable[[], TextReader]) -> None:
        """Note more text of the LLM."""
        if self.reader is None:
            self.reader = new_reader()
        self.clock.add(self.reader.append(text))
        self.last_text_at = time.monotonic()

    def receive(self, seconds: float) -> None:
        """Note that `seconds` of new audio have come."""
        if self.first_audio_at is None:
            self.first_audio_at = time.time()
        self.gaps.receive(seconds, time.monotonic())

    def complete_segment(self) -> None:
        """Note that the segment's text is complete."""
        if self.reader is not None:
            self.clock.add(self.reader.end())
        self.reader = None
        self.clock.complete_segment()

    @property
    def pause_s(self) -> float:
        """Seconds since the LLM last wrote text."""
        return time.monotonic() - self.last_text_at

    def end_sentence(self, sentence_ends: SentenceEnds) -> None:
        """Note that the text so far is a whole sentence, although the next one has not begun."""
        self.sentence_ends = sentence_ends
        self.complete_segment()
