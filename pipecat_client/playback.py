"""The service's state of a reply until it has been played."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipecat_client.sentence_ends import SentenceEnds
from qwen_megakernel.serving.loudness import LevelMeter
from qwen_megakernel.serving.spoken_text import TextReader
from qwen_megakernel.serving.word_timing import Pace, TimedWord, WordClock

HOLD_S = 0.2
"""A word is told at most so many seconds before it is played, or when its segment is whole. Audio mostly
comes faster than it is played, and the more of it is there, the better a word's time is known."""


@dataclass(slots=True)
class Gaps:
    """Times that the audio of a reply came too late, and playback stood still."""

    count: int = 0
    seconds: float = 0.0
    """Seconds of all gaps together."""
    _plays_until: float = -math.inf
    _paused: bool = True

    def receive(self, seconds: float, now: float) -> None:
        """Note that `seconds` of audio have come at `now` (`time.monotonic()`)."""
        if now > self._plays_until:
            if not self._paused:
                self.count += 1
                self.seconds += now - self._plays_until
            self._plays_until = now
        self._paused = False
        self._plays_until += seconds

    def pause(self) -> None:
        """Note that all text is spoken. A later lack of audio is no gap."""
        self._paused = True

    def unplayed_s(self, now: float) -> float:
        """Seconds of audio that has come and was not played yet."""
        return max(0.0, self._plays_until - now)


@dataclass(slots=True)
class Playback:
    """One Pipecat context, from its first text to the end of its audio."""

    clock: WordClock
    sample_rate: int
    meter: LevelMeter
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
    received_s: float = 0.0
    """Seconds of audio that have come."""
    gaps: Gaps = field(default_factory=Gaps)
    next_words: asyncio.TimerHandle | None = None
    """When words are told next, if no audio comes."""
    ttfb_reported: bool = False
    state: Literal["open", "spoken", "failed"] = "open"
    """`spoken` to its end, or `failed`: it will not be."""

    @classmethod
    def begin(cls, pace: Pace, sample_rate: int, sentence_ends: SentenceEnds) -> Playback:
        """A context that has no text yet."""
        return cls(WordClock(pace), sample_rate, LevelMeter(sample_rate), sentence_ends)

    def append(self, text: str, new_reader: Callable[[], TextReader]) -> None:
        """Note more text of the LLM."""
        if self.reader is None:
            self.reader = new_reader()
        self.clock.add(self.reader.append(text))
        self.last_text_at = time.monotonic()

    def receive(self, audio: bytes) -> None:
        """Note new audio, int16 samples."""
        if self.first_audio_at is None:
            self.first_audio_at = time.time()
        samples = np.frombuffer(audio, "<i2")
        seconds = len(samples) / self.sample_rate
        self.received_s += seconds
        self.gaps.receive(seconds, time.monotonic())
        self.clock.hear(self.meter.add(samples))

    def due_words(self) -> list[TimedWord]:
        """Words that are played within `HOLD_S`."""
        return self.clock.advance(self.received_s - self.unplayed_s + HOLD_S)

    def end_segment(self) -> list[TimedWord]:
        """All audio of a segment has come. Its other words."""
        self.meter.end_segment()
        return self.clock.end_segment(self.received_s)

    @property
    def unplayed_s(self) -> float:
        """Seconds of the audio that has come and was not played."""
        return self.gaps.unplayed_s(time.monotonic())

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
