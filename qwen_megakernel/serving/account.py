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
        """Samples for the client, at 24 kHz."""
        self.num_generated = 0
        """Samples for the client and samples that were left out, at 24 kHz."""
        self.num_trimmed: int | None = None
        """Samples that were left out before the first sound; None if the silence is kept."""
        self.num_dry = 0
        """How often playback ran dry within an utterance."""
        self._num_samples_sent = 0
        self._generation_s = 0.0
        """Seconds of work on the turns that have finished."""
        self._turn_generation_s = 0.0
        """Seconds of work on the turn that runs."""
        self._clock_from: float | None = None
        self._ttfc_s: float | None = None

    def start_clock(self) -> None:
        """Start the clock of the first audio: the engine has a turn and its first text. The wait for
        text, or for an earlier context, does not count."""
        if self._clock_from is None:
            self._clock_from = time.monotonic()

    def add_audio(self, audio: Audio, num_samples: int) -> None:
        """Count a generated chunk, which adds `num_samples` for the client."""
        self.num_samples += num_samples
        self.num_generated += len(audio.samples)
        self._turn_generation_s = audio.generation_s

    def mark_dry(self) -> None:
        """Note that the client has played all audio before the next chunk came."""
        if self._turn_generation_s:  # the first chunk of an utterance continues nothing
            self.num_dry += 1

    def add_turn(self, finished: Finished) -> None:
        """Count a finished turn, whatever its reason."""
        self.num_frames += finished.num_frames
        self._generation_s += finished.generation_s
        self._turn_generation_s = 0.0

    def mark_sent(self, num_samples: int) -> None:
        """Count audio that the carrier takes now."""
        if self._ttfc_s is None and self._clock_from is not None:
            self._ttfc_s = time.monotonic() - self._clock_from
        self._num_samples_sent += num_samples

    def figures(self) -> Figures:
        """The account's figures so far."""
        generation_s = self._generation_s + self._turn_generation_s
        duration_s = self.num_generated / SAMPLE_RATE
        return Figures(
            num_samples=self._num_samples_sent,
            generation_s=generation_s,
            ttfc_s=self._ttfc_s,
            rtf=generation_s / duration_s if duration_s else None,
            trimmed_s=None if self.num_trimmed is None else self.num_trimmed / SAMPLE_RATE,
        )
