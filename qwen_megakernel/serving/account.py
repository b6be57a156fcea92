"""The account of a context: its text, its audio, the work on it, and the clock of its first audio."""

from __future__ import annotations

import time

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.events import Figures
from qwen_megakernel.turn import Audio, Finished


class Account:
    """Counts; it decides nothing."""

    def __init__(self) -> None:
        self.num_chars = 0
        self.num_frames = 0
        self.num_samples = 0
        """For the client, at 24 kHz."""
        self.num_generated = 0
        """Those and what is left out, at 24 kHz."""
        self.num_trimmed: int | None = None
        """Samples that were left out before the first sound; None where none may be."""
        self.num_dry = 0
        """Times that playback ran dry within an utterance."""
        self._num_samples_sent = 0
        self._generation_s = 0.0
        """Of turns that have finished."""
        self._turn_generation_s = 0.0
        """Of the turn that runs."""
        self._clock_from: float | None = None
        self._ttfc_s: float | None = None

    def start_clock(self) -> None:
        """The engine has a turn and its first text. Waiting for text, or for an earlier context, is
        not the server's time."""
        if self._clock_from is None:
            self._clock_from = time.monotonic()

    def add_audio(self, audio: Audio, num_samples: int) -> None:
        """A chunk was generated, after which there are so many more samples for the client."""
        self.num_samples += num_samples
        self.num_generated += len(audio.samples)
        self._turn_generation_s = audio.generation_s

    def mark_dry(self) -> None:
        """All audio so far has been played before the next chunk came."""
        if self._turn_generation_s:  # the first chunk of an utterance has none to continue
            self.num_dry += 1

    def add_turn(self, finished: Finished) -> None:
        """A turn has finished, however it ended."""
        self.num_frames += finished.num_frames
        self._generation_s += finished.generation_s
        self._turn_generation_s = 0.0

    def mark_sent(self, num_samples: int) -> None:
        """Audio is being handed to the carrier."""
        if self._ttfc_s is None and self._clock_from is not None:
            self._ttfc_s = time.monotonic() - self._clock_from
        self._num_samples_sent += num_samples

    def figures(self) -> Figures:
        """As it stands."""
        generation_s = self._generation_s + self._turn_generation_s
        duration_s = self.num_generated / SAMPLE_RATE
        return Figures(
            num_samples=self._num_samples_sent,
            generation_s=generation_s,
            ttfc_s=self._ttfc_s,
            rtf=generation_s / duration_s if duration_s else None,
            trimmed_s=None if self.num_trimmed is None else self.num_trimmed / SAMPLE_RATE,
        )
