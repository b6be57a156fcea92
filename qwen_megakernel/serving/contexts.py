"""Contexts: a reply as a row of segments, what of it was generated, and what of that was sent.

There is no wire here, no clock but the monotonic one, and no order among contexts: that is
`conversation.py`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.native_messages import FinishReason, Speak
from qwen_megakernel.serving.observe import TurnRecord
from qwen_megakernel.turn import Audio, Finished, Turn


@dataclass(frozen=True, slots=True)
class SegmentOver:
    """All audio of a segment is out."""

    index: int
    start_s: float
    duration_s: float
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class ContextOver:
    """All segments of a context are out."""


OutEvent = Audio | SegmentOver | ContextOver


class Segment:
    """Text between two flushes."""

    def __init__(self, choice: Speak) -> None:
        self.choice = choice
        self.turn: Turn | None = None
        self.flushed = False
        """No more text will come."""
        self.started = False
        self.finished = False
        self._pending = ""

    def append(self, text: str) -> None:
        """More text; the model has had its say when the turn is over, as with whole text."""
        if self.turn is None:
            self._pending += text
        elif not self.finished:
            self.turn.append(text)

    @property
    def blank(self) -> bool:
        """Nothing to say as yet."""
        return self.turn is None and not self._pending.strip()

    def flush(self) -> None:
        """The text is complete."""
        self.flushed = True
        if self.turn is not None:
            self.turn.end()

    def take_pending(self) -> str:
        """The text before the turn."""
        text, self._pending = self._pending, ""
        return text


class Context:
    """One reply: its text, what it has generated, what of that was sent."""

    def __init__(self, context_id: str, name: str) -> None:
        self.context_id, self.name = context_id, name
        self.choice = Speak(context_id, "")
        self.segments: deque[Segment] = deque()
        """Those that are not over; text may come for the last."""
        self.ended = False
        """No more text will come."""
        self.complete = False
        """All its audio was generated."""
        self.closed = False
        """Nothing more of it is sent."""
        self.num_chars = 0
        self.num_turns = 0
        self.reason: FinishReason = "stop"
        self.error: str | None = None
        self.out: deque[OutEvent] = deque()
        self.unsent_bytes = 0
        self.quiet_since = time.monotonic()
        self.samples_sent = 0
        """At the client's sample rate; counted by the dialect."""
        self._num_samples = 0
        self._generation_s = 0.0
        self._segment_start = 0
        self._segment_generation_s = 0.0
        self._num_frames = 0
        self._clock_from: float | None = None
        self._first_sent_at: float | None = None
        self._first_audio_at = 0.0

    @property
    def current(self) -> Segment | None:
        """The segment whose turn runs."""
        segment = self.segments[0] if self.segments else None
        return segment if segment and segment.turn is not None and not segment.finished else None

    @property
    def tail(self) -> Segment | None:
        """The segment that takes text."""
        return self.segments[-1] if self.segments and not self.segments[-1].flushed else None

    def next_segment(self) -> Segment | None:
        """The segment to speak next, if there is anything to say."""
        while self.segments and self.segments[0].flushed:
            if not (self.segments[0].finished or self.segments[0].blank):
                break
            self.segments.popleft()
        segment = self.segments[0] if self.segments else None
        return None if segment is None or segment.finished or segment.blank else segment

    def lead_s(self) -> float:
        """Seconds of generated audio that a client cannot have played yet."""
        if not self._num_samples:
            return 0.0
        played = time.monotonic() - self._first_audio_at
        return max(0.0, self._num_samples / SAMPLE_RATE - played)

    def start_clock(self) -> None:
        """The first turn is about to be opened: it has text, and it is the context's turn."""
        if self._clock_from is None:
            self._clock_from = time.monotonic()

    def add_audio(self, audio: Audio) -> None:
        """A chunk was generated."""
        if not self._num_samples:
            self._first_audio_at = time.monotonic()
        elif not self.lead_s():  # playback ran dry: it goes on from here
            self._first_audio_at = time.monotonic() - self._num_samples / SAMPLE_RATE
        self._num_samples += len(audio.samples)
        self._segment_generation_s = audio.generation_s
        self.out.append(audio)
        self.unsent_bytes += audio.samples.nbytes

    def add_segment(self, finished: Finished) -> None:
        """A turn has finished in good order."""
        start, self._segment_start = self._segment_start, self._num_samples
        duration = self._num_samples - start
        if self.reason == "stop":
            self.reason = finished.reason
        self.out.append(
            SegmentOver(self.num_turns - 1, start / SAMPLE_RATE, duration / SAMPLE_RATE, finished.reason)
        )

    def account(self, finished: Finished) -> None:
        """What a turn cost, however it ended."""
        self._num_frames += finished.num_frames
        self._generation_s += finished.generation_s
        self._segment_generation_s = 0.0

    def mark_sent(self) -> None:
        """Something of the context is being handed to the socket."""
        self.quiet_since = time.monotonic()

    def mark_audio_sent(self, num_samples: int) -> None:
        """Audio is being handed to the socket."""
        if self._first_sent_at is None:
            self._first_sent_at = time.monotonic()
        self.samples_sent += num_samples

    @property
    def ttfc_s(self) -> float | None:
        """From the first text, or from when the context's turn came, to the first audio sent."""
        if self._first_sent_at is None or self._clock_from is None:
            return None
        return self._first_sent_at - self._clock_from

    @property
    def generation_s(self) -> float:
        """Seconds of work on the audio so far."""
        return self._generation_s + self._segment_generation_s

    @property
    def rtf(self) -> float | None:
        """Work over audio; None without audio."""
        if self._first_sent_at is None:
            return None
        return self.generation_s / (self._num_samples / SAMPLE_RATE)

    def record(self, default_voice: str | None) -> TurnRecord:
        """For log and metrics."""
        return TurnRecord(
            turn=self.name,
            chars=self.num_chars,
            voice=self.choice.voice or default_voice,
            seed=self.choice.seed or 0,
            ttfc_ms=None if self.ttfc_s is None else round(self.ttfc_s * 1000, 2),
            rtf=None if self.rtf is None else round(self.rtf, 4),
            frames=self._num_frames,
            finish_reason=self.reason,
            error=self.error,
        )
