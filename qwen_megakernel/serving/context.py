"""Contexts: a reply is a sequence of segments, each of which becomes a turn of the engine.

`session.py` decides the order of contexts and waits for clients. Nothing here does.
"""

from __future__ import annotations

import time
from collections import deque

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.account import Account
from qwen_megakernel.serving.events import ContextDone, ContextFailed, ContextState, SegmentDone
from qwen_megakernel.serving.leading_silence import LeadingSilence
from qwen_megakernel.serving.observe import TurnRecord
from qwen_megakernel.serving.options import TurnOptions
from qwen_megakernel.turn import Audio, Finished, FinishReason, RequestError, Turn


class WaitingSegment:
    """Text between two flushes, before its turn is opened."""

    def __init__(self, options: TurnOptions) -> None:
        self.options = options
        self.flushed = False
        """No more text will come."""
        self.blank = True
        """Whether there is nothing to say yet."""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    def append(self, text: str) -> None:
        """Add text."""
        if text:
            self._pieces.append(text)
            self.blank = self.blank and not text.strip()

    def flush(self) -> None:
        """Mark the text as complete."""
        self.flushed = True


class SpokenSegment:
    """Text between two flushes, whose turn was opened."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.started = False
        """Whether the turn has a slot, or had one."""
        self.finished = False
        """Whether the turn's last event has come."""

    blank = False

    @property
    def flushed(self) -> bool:
        """Whether the text is complete."""
        return self.turn.ended

    def append(self, text: str) -> None:
        """Add text. What comes after the model has ended the segment is not spoken."""
        if not self.finished:
            self.turn.append(text)

    def flush(self) -> None:
        """Mark the text as complete."""
        self.turn.end()


class Context:
    """One reply: its text, its turns, what was generated and what was sent."""

    def __init__(self, context_id: str, name: str, options: TurnOptions) -> None:
        """`name` is for the log. The id is the client's, `options` are the server's defaults."""
        self.context_id, self.name = context_id, name
        self.options = options
        """The options of the last segment."""
        self.account = Account()
        self.waiting: deque[WaitingSegment] = deque()
        self.spoken: SpokenSegment | None = None
        """The segment whose turn runs, or whose turn the model has ended before its flush."""
        self.num_turns = 0
        self.ended = False
        """No more text will come."""
        self.complete = False
        """All audio was generated. The end of the context waits behind it."""
        self.cancelled = False
        """Audio that is still generated is dropped."""
        self.closed = False
        """The session has forgotten the context. Its end was told, or is the next event."""
        self.announced = False
        """The client has got `ContextStarted`."""
        self.reason: FinishReason = "stop"
        self.failure: RequestError | None = None
        self.quiet_since = time.monotonic()
        self._segment_start = 0
        self._first_audio_at = 0.0
        self._leading: LeadingSilence | None = None

    # -- text -------------------------------------------------------------------------------

    @property
    def tail(self) -> WaitingSegment | SpokenSegment | None:
        """The segment that takes text."""
        segment = self.waiting[-1] if self.waiting else self.spoken
        return None if segment is None or segment.flushed else segment

    @property
    def takes_text(self) -> bool:
        """Whether text that is appended now can still be spoken."""
        tail = self.tail
        model_ended = isinstance(tail, SpokenSegment) and tail.turn.finished
        return not (self.ended or self.cancelled or model_ended)

    def append(self, text: str) -> None:
        """Add text to the segment that takes it."""
        if self.tail is not None:
            self.tail.append(text)
        if self.speaking:
            self.start_clock()

    def add_segment(self, options: TurnOptions) -> None:
        """Begin a segment."""
        self.options = options
        self.waiting.append(WaitingSegment(options))

    def end(self) -> None:
        """Mark the text as complete."""
        self.ended = True
        if self.tail is not None:
            self.tail.flush()

    # -- turns ------------------------------------------------------------------------------

    @property
    def speaking(self) -> bool:
        """Whether a turn runs."""
        return self.spoken is not None and not self.spoken.finished

    @property
    def state(self) -> ContextState:
        """The state of a context that is the first in its session."""
        if self.spoken is None or self.spoken.finished or not self.spoken.flushed:
            return "waiting_for_text"
        return "speaking" if self.spoken.started else "queued"

    def next_segment(self, *, even_blank: bool) -> WaitingSegment | None:
        """The next segment that needs a turn, if it has something to say.

        With `even_blank` a segment without text counts too: its turn waits for its first text.
        """
        if self.spoken is not None:
            if not self.spoken.finished or not self.spoken.flushed:
                return None
            self.spoken = None
        while self.waiting and self.waiting[0].blank and not even_blank:
            if not self.waiting[0].flushed:
                return None
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None

    def begin_turn(self, turn: Turn) -> None:
        """Note that the turn of `next_segment` was opened."""
        options = self.waiting.popleft().options
        if not self.num_turns and options.trim_leading_silence:
            self._leading, self.account.num_trimmed = LeadingSilence(), 0
        self.spoken = SpokenSegment(turn)
        self.num_turns += 1

    def mark_started(self) -> None:
        """Note that the turn has a slot."""
        if self.spoken is not None:
            self.spoken.started = True

    def finish_turn(self, finished: Finished) -> None:
        """Take the last event of a turn."""
        if self.spoken is not None:
            self.spoken.finished = True
        self.account.add_turn(finished)

    def hold(self, on: bool) -> None:
        """Make the turn wait, or let it go on."""
        if self.spoken is not None and self.spoken.turn.held != on:
            self.spoken.turn.hold(on)

    def stop_turn(self) -> None:
        """Cancel the turn that runs, if any. Its `Finished` still comes."""
        if self.spoken is not None and not self.spoken.finished:
            self.spoken.turn.cancel()

    def start_clock(self) -> None:
        """Start the clock of the first audio if there is text. A turn is open or about to be."""
        if self.account.num_chars:
            self.account.start_clock()

    # -- audio ------------------------------------------------------------------------------

    def add_audio(self, audio: Audio) -> Audio:
        """Take a generated chunk. Returns the audio that is now for the client."""
        samples = audio.samples
        if self._leading is not None:
            samples = self._leading.pass_on(samples)
            self._count_trimmed(self._leading.num_cut)
        now = time.monotonic()
        if not self.account.num_samples:
            self._first_audio_at = now
        elif not self.lead_s():  # playback ran dry: its clock starts anew here
            self._first_audio_at = now - self.account.num_samples / SAMPLE_RATE
            self.account.mark_dry()
        self.account.add_audio(audio, len(samples))
        return Audio(samples, audio.generation_s)

    def _count_trimmed(self, num_samples: int) -> None:
        more = num_samples - (self.account.num_trimmed or 0)
        self.account.num_trimmed = num_samples
        if more and self.spoken is not None:
            self.spoken.turn.skip(more / SAMPLE_RATE)

    def lead_s(self) -> float:
        """Seconds of generated audio that the client cannot have played yet."""
        if not self.account.num_samples:
            return 0.0
        played_s = time.monotonic() - self._first_audio_at
        return max(0.0, self.account.num_samples / SAMPLE_RATE - played_s)

    def end_segment(self, finished: Finished) -> SegmentDone:
        """Take the end of a turn that has not failed. Returns the event for it."""
        if self._leading is not None:
            self._leading.end_segment()
            self._count_trimmed(self._leading.num_cut)
        start, self._segment_start = self._segment_start, self.account.num_samples
        duration = self.account.num_samples - start
        if self.reason == "stop":
            self.reason = finished.reason
        return SegmentDone(
            self.context_id,
            self.num_turns - 1,
            start / SAMPLE_RATE,
            duration / SAMPLE_RATE,
            finished.reason,
        )

    # -- its end ----------------------------------------------------------------------------

    def cancel(self) -> None:
        """Drop audio that is still generated. A context that has failed keeps its failure."""
        self.cancelled = True
        if self.failure is None:
            self.reason = "cancelled"

    def fail(self, failure: RequestError) -> None:
        """Set the failure that ends the context."""
        self.failure, self.reason = failure, "error"

    def end_event(self) -> ContextDone | ContextFailed:
        """The event that tells of the context's end."""
        figures = self.account.figures()
        if self.failure is None:
            return ContextDone(self.context_id, self.reason, figures)
        return ContextFailed(
            self.context_id,
            self.failure.code,
            str(self.failure),
            self.num_turns > 0,
            figures,
            self.failure.retry_after_s,
        )

    def record(self, default_voice: str | None) -> TurnRecord:
        """The record for log and metrics."""
        figures = self.account.figures()
        # Other errors are the client's and may repeat its text, which must not reach the log.
        internal = self.failure is not None and self.failure.code == "internal"
        return TurnRecord(
            turn=self.name,
            chars=self.account.num_chars,
            voice=self.options.voice or default_voice,
            seed=self.options.params.seed,
            ttfc_ms=None if figures.ttfc_s is None else round(figures.ttfc_s * 1000, 2),
            rtf=None if figures.rtf is None else round(figures.rtf, 4),
            frames=self.account.num_frames,
            finish_reason=self.reason,
            error=str(self.failure) if internal else None,
            trimmed_s=None if figures.trimmed_s is None else round(figures.trimmed_s, 4),
            dry=self.account.num_dry,
        )
