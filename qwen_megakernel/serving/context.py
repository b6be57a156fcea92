"""Contexts: a reply as a row of segments, whose phrases become turns of the engine.

`session.py` decides the order of contexts and waits for clients. This module does neither.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE, GenerationParams
from qwen_megakernel.serving.account import Account
from qwen_megakernel.serving.events import ContextDone, ContextFailed, ContextState, SegmentDone
from qwen_megakernel.serving.leading_silence import LeadingSilence
from qwen_megakernel.serving.observe import TurnRecord
from qwen_megakernel.serving.options import TurnOptions
from qwen_megakernel.serving.speaking_rate import SpeakingRate
from qwen_megakernel.serving.spoken_text import Pause, Span, TextReader
from qwen_megakernel.turn import Audio, Finished, FinishReason, RequestError, Turn

_PAUSE_PIECE = SAMPLE_RATE // 5
"""The most samples of a pause that `settle` returns at a time."""


class WaitingPhrase:
    """Text between two pauses of a segment, before its turn is opened. Most segments are one phrase."""

    def __init__(self, options: TurnOptions, number: int = 0) -> None:
        """`number` counts the phrases of a segment."""
        self.options, self.number = options, number
        self.flushed = False
        """Whether the text is complete."""
        self.pause_s: float | None = None
        """Seconds of the pause after the phrase; None if the segment ends with the phrase."""
        self.blank = True
        """Whether the text so far has nothing to say."""
        self.silent = number > 0
        """Whether the phrase takes its place even if it is blank, because of a pause or a tag."""
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

    def flush(self, pause_s: float | None = None) -> None:
        """Mark the text as complete. A pause of `pause_s` follows; with None the segment ends."""
        self.flushed, self.pause_s = True, pause_s
        self.silent = self.silent or pause_s is not None


class SpokenPhrase:
    """A phrase whose turn was opened, or a silent phrase, which has no turn."""

    def __init__(self, phrase: WaitingPhrase, turn: Turn | None) -> None:
        self.turn, self.number = turn, phrase.number
        self.started = turn is None
        """Whether the turn has a slot, or had one."""
        self.finished = turn is None
        """Whether the turn's last event has come."""
        self.flushed = phrase.flushed
        """Whether the text is complete."""
        self.pause_s = phrase.pause_s
        """Seconds of the pause after the phrase; None if the segment ends with the phrase."""
        self.num_paused = 0
        """Samples of the pause that `Context.settle` has returned."""
        self.settled = False
        """Whether `Context.settle` has returned all of the pause, or the segment's end."""
        self.rate = SpeakingRate(phrase.options.speed) if turn and phrase.options.speed != 1 else None
        self.waits_for_flush = phrase.options.markup
        """Whether later text may hold a pause, which counts even if the model has ended the phrase."""

    blank = False
    silent = True

    @property
    def owes(self) -> bool:
        """Whether a pause or the segment's end is due."""
        return self.finished and not self.settled and (self.flushed or not self.waits_for_flush)

    def append(self, text: str) -> None:
        """Add text. Text that comes after the model has ended the phrase is not spoken."""
        if self.turn is not None and not self.finished:
            self.turn.append(text)

    def flush(self, pause_s: float | None = None) -> None:
        """Mark the text as complete. A pause of `pause_s` follows; with None the segment ends."""
        self.flushed, self.pause_s = True, pause_s
        if self.turn is not None:
            self.turn.end()


class Context:
    """One reply: its text, its turns, what was generated and what was sent."""

    def __init__(self, context_id: str, name: str, options: TurnOptions) -> None:
        """Begin a context without text.

        Args:
            context_id: the client's id.
            name: for the log.
            options: the server's defaults.
        """
        self.context_id, self.name = context_id, name
        self.options = options
        """The options of the last segment."""
        self.account = Account()
        self.waiting: deque[WaitingPhrase] = deque()
        self.spoken: SpokenPhrase | None = None
        """The phrase whose turn runs. A phrase that the model has ended stays here until its text is
        complete."""
        self.num_turns = 0
        self.num_segments = 0
        """Segments that have begun to be spoken."""
        self.ended = False
        """Whether the text is complete."""
        self.complete = False
        """Whether all audio was generated. The end of the context then waits behind it in the outbox."""
        self.cancelled = False
        """Whether audio that is still generated is dropped."""
        self.closed = False
        """Whether the session has forgotten the context. Its end was told, or is the next event."""
        self.announced = False
        """Whether the client has got `ContextStarted`."""
        self.reason: FinishReason = "stop"
        self.failure: RequestError | None = None
        self.quiet_since = time.monotonic()
        self._reader = TextReader()
        """The reader of the last segment."""
        self._num_spoken_chars = 0
        self._segment_start = 0
        self._segment_reason: FinishReason = "stop"
        self._first_audio_at = 0.0
        self._leading: LeadingSilence | None = None

    # -- text -------------------------------------------------------------------------------

    @property
    def tail(self) -> WaitingPhrase | SpokenPhrase | None:
        """The phrase that takes text; None if new text begins a segment."""
        phrase = self.waiting[-1] if self.waiting else self.spoken
        return None if phrase is None or phrase.flushed else phrase

    @property
    def takes_text(self) -> bool:
        """Whether text that is appended now can still be spoken."""
        tail = self.tail
        model_ended = isinstance(tail, SpokenPhrase) and tail.turn is not None and tail.turn.finished
        return not (self.ended or self.cancelled or model_ended)

    def append(self, text: str, max_spoken_chars: int) -> list[Span]:
        """Add text to the segment that takes it. Returns the spans of it that are certain now.

        Raises:
            RequestError: with all respellings, the context's text has more than `max_spoken_chars`.
        """
        spans = self._take(self._reader.append(text))
        if self._num_spoken_chars > max_spoken_chars:
            message = f"text is longer than {max_spoken_chars} characters with its respellings"
            raise RequestError("text_too_long", message)
        if self.speaking:
            self.start_clock()
        return spans

    def add_segment(self, options: TurnOptions, reader: TextReader) -> None:
        """Begin a segment, whose text `reader` reads."""
        self.options, self._reader = options, reader
        self.waiting.append(WaitingPhrase(options))

    def flush(self) -> list[Span]:
        """Mark the segment's text as complete, if it has something to say. Returns its last spans."""
        spans = self._take(self._reader.end())
        if self.tail is not None and (self.tail.silent or not self.tail.blank):
            self.tail.flush()
        return spans

    def end(self) -> list[Span]:
        """Mark the context's text as complete. Returns its last spans."""
        self.ended = True
        spans = self._take(self._reader.end()) if self.tail is not None else []
        if self.tail is not None:
            self.tail.flush()
        return spans

    def _take(self, spans: list[Span]) -> list[Span]:
        for span in spans:
            if (tail := self.tail) is None:
                break
            if isinstance(span, Pause):
                tail.flush(span.seconds)
                self.waiting.append(WaitingPhrase(self.options, tail.number + 1))
                continue
            tail.append(span.spoken)
            self._num_spoken_chars += len(span.spoken)
            if isinstance(tail, WaitingPhrase):
                tail.silent = tail.silent or not span.blank
        return spans

    # -- turns ------------------------------------------------------------------------------

    @property
    def speaking(self) -> bool:
        """Whether a turn runs."""
        return self.spoken is not None and not self.spoken.finished

    @property
    def state(self) -> ContextState:
        """The state of a context that waits for no other context of its session."""
        if self.spoken is not None and self.spoken.owes:
            return "speaking"
        if self.spoken is None or self.spoken.finished or not self.spoken.flushed:
            return "waiting_for_text"
        return "speaking" if self.spoken.started else "queued"

    def next_phrase(self, *, even_blank: bool) -> WaitingPhrase | None:
        """The next phrase to speak: one with something to say, or a silent one. None if there is none.

        With `even_blank` a segment without text counts too: its turn waits for its first text.
        """
        if self.spoken is not None:
            if not self.spoken.finished or not self.spoken.flushed:
                return None
            self.spoken = None
        while self.waiting and self.waiting[0].blank and not even_blank:
            if not self.waiting[0].flushed:
                return None
            if self.waiting[0].silent:
                break
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None

    def params_of(self, phrase: WaitingPhrase) -> GenerationParams:
        """The parameters of a phrase's turn. The phrase is the next one."""
        segment = self.num_segments - 1 if phrase.number else self.num_segments
        return phrase.options.params_of(segment, phrase.number)

    def begin_turn(self, turn: Turn) -> None:
        """Make the next phrase the spoken one. `turn` was opened for it."""
        options = self.waiting[0].options
        first = not (self.num_turns or self.account.num_samples)
        if first and options.trim_leading_silence:
            self._leading, self.account.num_trimmed = LeadingSilence(), 0
        self.num_turns += 1
        self._begin_phrase(turn)

    def begin_silence(self) -> None:
        """Make the next phrase, which needs no turn, the spoken one."""
        self._begin_phrase(None)

    def _begin_phrase(self, turn: Turn | None) -> None:
        phrase = self.waiting.popleft()
        self.num_segments += phrase.number == 0
        self.spoken = SpokenPhrase(phrase, turn)

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
        """Make the turn wait, or go on."""
        turn = self.spoken.turn if self.spoken is not None else None
        if turn is not None and turn.held != on:
            turn.hold(on)

    def stop_turn(self) -> None:
        """Cancel the turn that runs, if there is one. Its `Finished` still comes."""
        if self.spoken is not None and self.spoken.turn is not None and not self.spoken.finished:
            self.spoken.turn.cancel()

    def start_clock(self) -> None:
        """Start the clock of the first audio, if there is text. Call it when a turn is open, or is about
        to be opened."""
        if self.account.num_chars:
            self.account.start_clock()

    # -- audio ------------------------------------------------------------------------------

    def add_audio(self, audio: Audio) -> Audio:
        """Take a generated chunk. Returns the audio for the client: trimmed, and at the chosen rate."""
        samples = audio.samples
        if self._leading is not None:
            samples = self._leading.pass_on(samples)
            self._count_trimmed(self._leading.num_cut)
        if self.spoken is not None and self.spoken.rate is not None:
            changed = self.spoken.rate.change(samples)
            self._skip(len(samples) - len(changed))
            samples = changed
        self._count_played(len(samples))
        self.account.add_audio(audio, len(samples))
        return Audio(samples, audio.generation_s)

    def end_turn(self, finished: Finished) -> Audio:
        """End a turn that has finished without error. Returns the rest of its audio."""
        samples = np.zeros(0, np.float32)
        if self._leading is not None:
            self._leading.end_segment()
            self._count_trimmed(self._leading.num_cut)
        if self.spoken is not None and self.spoken.rate is not None:
            samples = self.spoken.rate.end()
            self._skip(-len(samples))
            self._count_played(len(samples))
            self.account.num_samples += len(samples)
        if self._segment_reason == "stop":
            self._segment_reason = finished.reason
        return Audio(samples)

    def _count_played(self, num_samples: int) -> None:
        """Note that so many more samples go to the client, and whether its playback ran dry before."""
        now = time.monotonic()
        if not self.account.num_samples:
            self._first_audio_at = now
        elif num_samples and not self.lead_s():  # playback ran dry: it goes on from here
            self._first_audio_at = now - self.account.num_samples / SAMPLE_RATE
            self.account.mark_dry()

    def _count_trimmed(self, num_samples: int) -> None:
        more = num_samples - (self.account.num_trimmed or 0)
        self.account.num_trimmed = num_samples
        self._skip(more)

    def _skip(self, num_samples: int) -> None:
        if num_samples and self.spoken is not None and self.spoken.turn is not None:
            self.spoken.turn.skip(num_samples / SAMPLE_RATE)

    def lead_s(self) -> float:
        """Seconds of generated audio that the client cannot have played yet."""
        if not self.account.num_samples:
            return 0.0
        played_s = time.monotonic() - self._first_audio_at
        return max(0.0, self.account.num_samples / SAMPLE_RATE - played_s)

    def settle(self) -> Audio | SegmentDone | None:
        """What is due next after the phrase: a piece of its pause, the segment's end, or None."""
        phrase = self.spoken
        assert phrase is not None, "nothing is due"
        if phrase.pause_s is None or not phrase.flushed:
            phrase.settled = True
            return self._end_segment()
        left = round(phrase.pause_s * SAMPLE_RATE) - phrase.num_paused
        if left <= 0:
            phrase.settled = True
            return None
        samples = np.zeros(min(left, _PAUSE_PIECE), np.float32)
        phrase.num_paused += len(samples)
        self.start_clock()
        self._count_played(len(samples))
        self.account.num_samples += len(samples)
        return Audio(samples)

    def _end_segment(self) -> SegmentDone:
        start, self._segment_start = self._segment_start, self.account.num_samples
        duration = self.account.num_samples - start
        reason, self._segment_reason = self._segment_reason, "stop"
        if self.reason == "stop":
            self.reason = reason
        return SegmentDone(
            self.context_id,
            self.num_segments - 1,
            start / SAMPLE_RATE,
            duration / SAMPLE_RATE,
            reason,
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
