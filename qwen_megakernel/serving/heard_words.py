"""The words of one context, timed by the audio that its client gets."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.loudness import LevelMeter
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.word_timing import Pace, TimedWord, WordClock


class HeardWords:
    """A `WordClock` that measures the audio itself."""

    def __init__(self, pace: Pace) -> None:
        """`pace`: of the voice."""
        self._clock, self._meter = WordClock(pace), LevelMeter(SAMPLE_RATE)
        self._num_samples = 0

    def add(self, spans: Iterable[Span]) -> None:
        """More text of the open segment, or of a new one."""
        self._clock.add(spans)

    def complete_segment(self) -> None:
        """Mark the open segment's text as complete."""
        self._clock.complete_segment()

    def hear(self, samples: np.ndarray) -> None:
        """A chunk of audio, float32 [n] at 24 kHz."""
        self._num_samples += len(samples)
        self._clock.hear(self._meter.add(samples))

    def begun(self) -> list[TimedWord]:
        """The words that have begun since the last call."""
        return self._clock.advance()

    def end_segment(self) -> list[TimedWord]:
        """End the segment's audio. Returns its other words."""
        self._meter.end_segment()
        return self._clock.end_segment(self._num_samples / SAMPLE_RATE)
