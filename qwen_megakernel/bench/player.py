"""What a client of the bench says, and how it listens: texts of known length, and a player."""

from __future__ import annotations

import random

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE

SENTENCE = "The train to the coast leaves at nine, so please be on time."
"""60 characters. The text of the TTFC line."""
WORDS = SENTENCE.replace(",", "").replace(".", "").lower().split()
CHARS_PER_S = 15
"""About how fast English is spoken."""
AUDIBLE_RMS = 10 ** (-50 / 20)
_WINDOW = SAMPLE_RATE // 100


def make_text(choose: random.Random, shortest: int, longest: int) -> str:
    """A text of `shortest` to `longest` characters."""
    length, text = choose.randint(shortest, longest), choose.choice(WORDS).capitalize()
    while len(text) < length - 1:
        text += " " + choose.choice(WORDS)
    return text[: length - 1].rstrip() + "."


class Player:
    """Plays chunks as they come. Measures when something is heard, and how often and how long audio is
    missing."""

    def __init__(self, buffer_s: float = 0.0) -> None:
        """Playback begins `buffer_s` seconds after the first chunk."""
        self.first_at: float | None = None
        self.audible_at: float | None = None
        self.num_samples = 0
        self.underruns = 0
        self.dry_s = 0.0
        """Seconds for which playback stood still."""
        self.dry_at = 0.0
        """The time at which all received audio will have been played."""
        self._buffer_s = buffer_s

    def add(self, samples: np.ndarray, now: float) -> None:
        """Take a chunk, int16 [n], received at `now` (seconds of any clock)."""
        if self.first_at is None:
            self.first_at = now
            self.dry_at = now + self._buffer_s
        else:
            self._run_dry(now)
        if self.audible_at is None:
            windows = samples[: len(samples) // _WINDOW * _WINDOW].reshape(-1, _WINDOW) / 32768
            loud = np.flatnonzero(np.sqrt(np.mean(np.square(windows), axis=1)) > AUDIBLE_RMS)
            if len(loud):
                self.audible_at = self.dry_at + loud[0] * _WINDOW / SAMPLE_RATE
        self.num_samples += len(samples)
        self.dry_at += len(samples) / SAMPLE_RATE

    def stop(self, now: float) -> None:
        """End a turn that should have said more."""
        if self.first_at is not None:
            self._run_dry(now)

    def _run_dry(self, now: float) -> None:
        if now > self.dry_at:
            self.underruns += 1
            self.dry_s += now - self.dry_at
            self.dry_at = now
