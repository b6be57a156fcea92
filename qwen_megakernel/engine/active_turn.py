"""A turn as the engine sees it: its prompt, its slot, its progress, and what ends it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from qwen_megakernel.config import FRAME_S, GenerationParams, Guards
from qwen_megakernel.prompt.builder import Prompt
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.turn import Audio, Finished, FinishReason, Sink, Turn, TurnEvent

log = logging.getLogger(__name__)

CHUNK_RAMP = (1, 1, 2, 4)
"""Frames of a turn's first chunks; the last number repeats. The first are small so that audio starts at
once; later ones are larger because a message costs the same whatever its length."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a turn is made of besides its text."""

    voice: Voice
    language: str = "auto"
    instruct: str | None = None
    streaming: bool | None = None
    """Text layout; None is the checkpoint's own (see `PromptBuilder.open`)."""
    params: GenerationParams = field(default_factory=GenerationParams)
    chunk_frames: int | None = None
    """Frames a chunk; None is `CHUNK_RAMP`."""
    max_lead_s: float | None = None
    """Seconds of audio that the turn may be ahead of its playback; None is no limit."""


@dataclass(slots=True)
class RunawayGuard:
    """Recognises an utterance that will not end, by repeats and silence (`Guards`)."""

    guards: Guards
    last_code0: int = -1
    repeats: int = 0
    silent_frames: int = 0

    def repeats_after(self, code0: int) -> bool:
        """Whether the turn must stop for a frame's code 0; call it once a frame."""
        self.repeats = self.repeats + 1 if code0 == self.last_code0 else 1
        self.last_code0 = code0
        return bool(self.guards.repeat_frames) and self.repeats >= self.guards.repeat_frames

    def silent_after(self, samples: np.ndarray, *, text_exhausted: bool) -> bool:
        """Whether the turn must stop for a frame's audio; call it once a frame."""
        silent = float(samples @ samples) < self.guards.silence_rms**2 * len(samples)
        self.silent_frames = self.silent_frames + 1 if silent and text_exhausted else 0
        return bool(self.guards.silence_s) and self.silent_frames * FRAME_S >= self.guards.silence_s


class ActiveTurn:
    """A turn as the engine's thread sees it."""

    def __init__(self, turn: Turn, request: TurnRequest, prompt: Prompt, sink: Sink) -> None:
        self.turn, self.request, self.prompt, self._sink = turn, request, prompt, sink
        self.guard = RunawayGuard(request.params.guards)
        self.opened_at = time.monotonic()
        self.slot: int | None = None
        self.max_frames = 0
        self.num_fed = 0
        """Frames launched."""
        self.num_frames = 0
        """Frames whose audio has been delivered."""
        self.last_fed = False
        """Whether the last frame is launched: the turn only waits for its audio."""
        self._pending: list[np.ndarray] = []
        self._num_chunks = 0
        self._num_samples = 0
        self._first_audio_at: float | None = None
        self._idle_since: float | None = None
        self._idle_s = 0.0

    @property
    def started_at(self) -> float:
        """When the turn's clocks began: its first text."""
        return self.turn.first_text_at or self.opened_at

    def take_text(self) -> None:
        """Move tokens that the caller's text has become into the prompt, a bounded number."""
        tokens, complete = self.turn.take_text()
        self.prompt.extend(tokens)
        if complete and not self.prompt.ended:
            self.prompt.end()

    def lead_s(self, now: float) -> float:
        """Seconds of launched audio not yet played; minus infinity before the first frame."""
        if not self.num_fed:
            return -math.inf
        played_s = 0.0 if self._first_audio_at is None else now - self._first_audio_at
        return self.num_fed * FRAME_S - played_s

    @property
    def in_flight(self) -> bool:
        """Whether a frame is launched whose audio has not been delivered."""
        return self.num_fed > self.num_frames

    @property
    def text_late(self) -> bool:
        """Whether the turn cannot go on before more text comes."""
        if self.slot is None:
            return not self.prompt.ready
        return bool(self.num_fed) and self.prompt.next_text_row() is None

    def wait_s(self, now: float) -> float:
        """Seconds until this turn may decode; infinity while its text is late or it is held."""
        if self.text_late or self.turn.held:
            return math.inf
        if self.request.max_lead_s is None:
            return 0.0
        return max(0.0, self.lead_s(now) - self.request.max_lead_s)

    def mark_idle(self, idle: bool, now: float) -> None:
        """Exclude from `generation_s` the time in which the turn cannot run."""
        if idle and self._idle_since is None:
            self._idle_since = now
        elif not idle and self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = None

    def idle_for_s(self, now: float) -> float:
        """Seconds since the turn last could run."""
        return now - self._idle_since if self._idle_since is not None else 0.0

    def feed(self) -> Tensor | None:
        """Count a frame as launched; its text row [hidden], None for the first frame, which has none."""
        row = self.prompt.next_text_row() if self.num_fed else None
        if row is not None:
            self.prompt.advance()
        self.num_fed += 1
        self.last_fed = self.num_fed >= self._frame_limit()
        return row

    def _frame_limit(self) -> int:
        budget = self.request.params.guards.budget(self.prompt.num_text_tokens)
        if budget is None or not self.prompt.ended:
            return self.max_frames
        return min(self.max_frames, budget)

    def add_frame(self, samples: np.ndarray) -> None:
        """Take a frame's audio, float32 [1920]; hand out a chunk when one is full."""
        self.num_frames += 1
        self._pending.append(samples)
        size = self.request.chunk_frames or CHUNK_RAMP[min(self._num_chunks, len(CHUNK_RAMP) - 1)]
        if len(self._pending) >= size:
            self.hand_out()

    def hand_out(self) -> None:
        """Give the sink all audio that it has not been given."""
        if not self._pending:
            return
        samples = np.concatenate(self._pending)
        self._pending.clear()
        self._num_chunks += 1
        self._num_samples += len(samples)
        now = time.monotonic()
        if self._first_audio_at is None:
            self._first_audio_at = now
        self.emit(Audio(samples, self._generation_s(now)))

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Give the sink the last event."""
        if reason == "cancelled":
            self._pending.clear()  # no audio follows a cancel
        self.hand_out()
        now = time.monotonic()
        self.mark_idle(False, now)
        self.turn.mark_finished()
        self.emit(
            Finished(
                reason,
                num_frames=self.num_frames,
                num_samples=self._num_samples,
                generation_s=self._generation_s(now),
                error=error,
            )
        )

    def _generation_s(self, now: float) -> float:
        idle_s = self._idle_s + self.idle_for_s(now)
        return max(0.0, now - self.started_at - idle_s)

    def emit(self, event: TurnEvent) -> None:
        """Call the sink; if it raises, its turn is cancelled and the engine goes on."""
        try:
            self._sink(event)
        except Exception:
            log.exception("a turn's sink failed; the turn is cancelled")
            self.turn.cancel()
