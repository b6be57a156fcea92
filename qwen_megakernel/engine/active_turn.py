"""A turn as the engine sees it: its prompt, its slot, its progress, and what ends it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from qwen_megakernel.config import FRAME_S, MAX_UTTERANCE_FRAMES, GenerationParams, Guards
from qwen_megakernel.engine.slot_order import ENOUGH_TOKENS, Owner
from qwen_megakernel.prompt.builder import Prompt, PromptBuilder
from qwen_megakernel.prompt.parts import PartFeed, PromptParts, max_part_tokens
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.turn import (
    Audio,
    Finished,
    FinishReason,
    RequestError,
    Sink,
    Turn,
    TurnEvent,
)

log = logging.getLogger(__name__)

CHUNK_RAMP = (1, 1, 2, 4)
"""Frames of a turn's first chunks; the last number repeats. The first are small so that audio starts at
once; later ones are larger because a message costs the same whatever its length."""

PART_SEED_STEP = 2**32
"""Part k of a turn draws with the turn's seed plus k times this. Seeds that count up from segment to
segment do not reach it."""


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """All that a turn needs besides its text."""

    voice: Voice
    language: str = "auto"
    instruct: str | None = None
    streaming: bool | None = None
    """Text layout; None is the checkpoint's own (see `PromptBuilder.open`)."""
    params: GenerationParams = field(default_factory=GenerationParams)
    chunk_frames: int | None = None
    """Frames a chunk; None is `CHUNK_RAMP`."""
    max_lead_s: float | None = None
    """Seconds by which the generated audio may be ahead of its playback; None is no limit."""
    owner: Owner = ()
    """Whom the turn is for. If slots are scarce, they go round among the owners."""

    def check(self, text: str, end: bool) -> None:
        """Raise `RequestError` for a request that no model can speak. `end`: whether the text is
        complete."""
        if end and not text.strip():
            raise RequestError("bad_request", "the text is empty")
        if self.chunk_frames is not None and self.chunk_frames < 1:
            raise RequestError("bad_request", f"chunk_frames is {self.chunk_frames}, allowed: 1 up")


def open_feed(prompts: PromptBuilder, request: TurnRequest, max_positions: int) -> PartFeed:
    """Make the feed that turns a turn's text into tokens. The turn calls it on its caller's thread."""
    streaming = prompts.streams(request.streaming)
    num_fixed = prompts.count_fixed_rows(
        request.voice, request.language, instruct=request.instruct, streaming=streaming
    )
    room = max_positions - num_fixed
    max_tokens = max_part_tokens(request.params.guards, room, streaming=streaming)
    return PartFeed(prompts.open_feed(), prompts.tokenizer, max_tokens)


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
        self.turn, self.request, self._sink = turn, request, sink
        self.owner = request.owner
        """Whom the turn is for."""
        self.parts = PromptParts(prompt)
        self._look_at_text()
        self.guard = RunawayGuard(request.params.guards)
        self.opened_at = time.monotonic()
        self.slot: int | None = None
        self.slot_since = 0.0
        """When the turn got its slot; meaningless without a slot."""
        self.part = 0
        """The number of the part of the text that is being spoken."""
        self.prefilled = False
        """Whether the slot holds this part's prompt."""
        self.reserved = 0
        """Positions that are reserved for the slot."""
        self.gives_back = False
        """Whether the slot is for others when this part ends; see `end_utterance`."""
        self.reason: FinishReason = "stop"
        """The reason of the first part that did not end with `stop`."""
        self._cut_off: str | None = None
        self._room = 0
        self._part_start = 0
        """Frames of earlier parts."""
        self.num_fed = 0
        """Launched frames. Discarded ones, whose part was already over, do not count."""
        self.num_frames = 0
        """Frames whose audio has been delivered."""
        self.last_fed = False
        """Whether the last frame is launched: the turn only waits for its audio."""
        self.ready_at = math.inf
        """When the turn may decode; `refresh` sets this and the next field."""
        self.late = False
        """Whether the turn holds a slot and cannot go on before more text comes."""
        self._pending: list[np.ndarray] = []
        self._num_chunks = 0
        self._num_samples = 0
        self._first_audio_at: float | None = None
        self._idle_since: float | None = None
        self._idle_s = 0.0
        self._late_since: float | None = None
        self._late_s = 0.0

    @property
    def prompt(self) -> Prompt:
        """The prompt of the part that is spoken."""
        return self.parts.current

    def _look_at_text(self) -> None:
        """Note what the part's text allows. A long queue is read often, so it reads plain fields."""
        prompt = self.prompt
        self.ready = prompt.ready
        """Whether the part's prompt can be prefilled."""
        self.scant = not prompt.ended and prompt.num_text_tokens < ENOUGH_TOKENS
        """Whether the part would soon wait for text: it is incomplete and has few tokens so far."""
        self.num_prompt_rows = prompt.num_rows - prompt.shared.count
        """Number of rows of the part's prompt that no other turn shares."""
        self._positions_to_begin: int | None = None

    @property
    def params(self) -> GenerationParams:
        """The parameters of the part that is spoken."""
        params = self.request.params
        return replace(params, seed=(params.seed + self.part * PART_SEED_STEP) % 2**64)

    @property
    def started_at(self) -> float:
        """When the turn's clocks began: at its first text (`time.monotonic()`)."""
        return self.turn.first_text_at or self.opened_at

    def take_text(self) -> None:
        """Move a bounded number of the tokens of the caller's text into the prompts."""
        tokens, complete = self.turn.take_text()
        if not tokens and not complete:
            return
        self.parts.extend(tokens)
        if complete:
            self.parts.end()
        self._look_at_text()

    def begin_part(self, room: int, now: float) -> None:
        """Note that the slot holds the prompt and has `room` positions left.

        If playback has run dry in the meantime, its clock starts anew here.
        """
        self.prefilled, self._room = True, room
        if self._first_audio_at is not None:
            self._first_audio_at = max(self._first_audio_at, now - self.num_frames * FRAME_S)

    def end_utterance(self) -> None:
        """Let the turn speak the tokens that it has, and then give its slot back.

        Later text becomes another part. So does a last word that may be incomplete.
        """
        self.parts.cut()
        self._look_at_text()
        self.gives_back = True

    def end_part(self, reason: FinishReason) -> FinishReason | None:
        """End a part. Returns the reason for which the turn ends, or None if another part follows.

        A turn's reason is the first one of its parts that is not `stop`.
        """
        at_callers_limit = self.num_frames == self.request.params.max_frames
        if self.reason == "stop":
            self.reason = reason
            if reason == "length" and not at_callers_limit:
                self._cut_off = self._describe_cut()
        if at_callers_limit or not self.parts.has_next:
            return self.reason
        self.parts.advance()
        self._look_at_text()
        self.part, self.prefilled = self.part + 1, False
        self.guard = RunawayGuard(self.request.params.guards)
        self.num_fed = self._part_start = self.num_frames
        self.last_fed = False
        return None

    def _describe_cut(self) -> str:
        frames, tokens = self.num_frames - self._part_start, self.prompt.num_text_tokens
        where = f" in part {self.part + 1}" if self.part or self.parts.has_next else ""
        return f"the speech was cut off{where}: {frames} frames are the most for {tokens} text tokens"

    def wait_again(self) -> None:
        """Note that the slot was given back. The next part waits for another slot."""
        self.hand_out()
        self.slot, self.gives_back, self._num_chunks = None, False, 0
        self._late_since, self._late_s = None, 0.0

    def refresh(self, now: float) -> None:
        """Compute `ready_at` again after the turn has changed."""
        if self.last_fed:
            self.ready_at, self.late = math.inf, False
            return
        self.late = self.text_late
        self.mark_late(self.late, now)
        wait_s = self._wait_s(now)
        self.mark_idle(wait_s > 0 and not self.in_flight, now)
        if wait_s > 0:
            self.hand_out()  # the turn waits: do not hold its audio for a fuller chunk
        self.ready_at = now + wait_s if self.prefilled else math.inf

    def plays_until(self, now: float) -> float:
        """When the playback of the launched audio ends; minus infinity before the first frame."""
        if not self.begun:
            return -math.inf
        begins = now if self._first_audio_at is None else self._first_audio_at
        return begins + self.num_fed * FRAME_S - self.turn.skipped_s

    @property
    def idle(self) -> bool:
        """Whether the turn is marked as unable to run."""
        return self._idle_since is not None

    @property
    def in_real_time(self) -> bool:
        """Whether somebody listens while the turn is generated. Otherwise it runs as fast as
        possible."""
        return self.request.max_lead_s is not None

    @property
    def begun(self) -> bool:
        """Whether a frame of this part is launched."""
        return self.num_fed > self._part_start

    @property
    def in_flight(self) -> bool:
        """Whether a frame is launched whose audio has not been delivered."""
        return self.num_fed > self.num_frames

    @property
    def text_late(self) -> bool:
        """Whether the turn cannot go on before more text comes."""
        if not self.prefilled:
            return not self.prompt.ready
        return self.begun and self.prompt.late

    def _wait_s(self, now: float) -> float:
        """Seconds until this turn may decode; infinity while its text is late or it is held.

        A turn that gives its slot back is neither held nor limited in its lead: others wait for the
        slot, and few words are left to say.
        """
        if self.late or (self.turn.held and not self.gives_back):
            return math.inf
        if self.request.max_lead_s is None or self.gives_back:
            return 0.0
        return max(0.0, self.plays_until(now) - now - self.request.max_lead_s)

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

    def mark_late(self, late: bool, now: float) -> None:
        """Track the time in which the slot is held without text."""
        late_s = self.late_for_s(now)
        if late and not self.in_flight:
            self._late_since = now if self._late_since is None else self._late_since
        else:
            self._late_s, self._late_since = late_s, None

    def late_for_s(self, now: float) -> float:
        """Seconds in all for which this utterance has held the slot while it had no text."""
        return self._late_s + (now - self._late_since if self._late_since is not None else 0.0)

    def most_positions(self, limit: int) -> int:
        """The most positions that the slot can come to hold: prompt rows and frames, at most `limit`.

        While more text may come, an utterance of the greatest length is assumed. Where each token of
        the text takes a row, the parts differ in length and may need all positions.
        """
        prompt, params = self.prompt, self.request.params
        complete = prompt.ended and not self.parts.has_next
        if not (complete or prompt.streaming):
            return limit
        frames = MAX_UTTERANCE_FRAMES
        if complete and (budget := params.guards.budget(prompt.num_text_tokens)) is not None:
            frames = min(frames, budget)
        if params.max_frames is not None:
            frames = min(frames, params.max_frames - self._part_start)
        # The text may end when more frames are launched than its budget allows. One more follows then.
        frames = max(frames, self.num_fed - self._part_start + 1)
        return min(limit, prompt.num_rows + frames)

    def positions_to_begin(self, limit: int) -> int:
        """`most_positions` of a turn that waits. A long queue is asked often, so it is kept."""
        if self._positions_to_begin is None:
            self._positions_to_begin = self.most_positions(limit)
        return self._positions_to_begin

    def feed(self) -> Tensor | None:
        """Count a frame as launched. Returns its text row [hidden]; None for a part's first frame."""
        row = self.prompt.next_text_row() if self.begun else None
        if row is not None:
            self.prompt.advance()
        self.num_fed += 1
        self.last_fed = self.num_fed >= self._frame_limit()
        return row

    def _frame_limit(self) -> int:
        """The highest `num_fed` that this part may reach."""
        params = self.request.params
        limit = min(self._room, MAX_UTTERANCE_FRAMES)
        budget = params.guards.budget(self.prompt.num_text_tokens)
        if budget is not None and self.prompt.ended:
            limit = min(limit, budget)
        limit += self._part_start
        return limit if params.max_frames is None else min(limit, params.max_frames)

    def add_frame(self, samples: np.ndarray) -> None:
        """Add a frame's audio, float32 [1920], and hand out the chunk if it is full."""
        self.num_frames += 1
        self._pending.append(samples)
        size = self.request.chunk_frames or CHUNK_RAMP[min(self._num_chunks, len(CHUNK_RAMP) - 1)]
        if len(self._pending) >= size:
            self.hand_out()

    def hand_out(self) -> None:
        """Give the sink all audio that it has not received yet."""
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
                error=error if error is not None or reason != "length" else self._cut_off,
            )
        )

    def _generation_s(self, now: float) -> float:
        idle_s = self._idle_s + self.idle_for_s(now)
        return max(0.0, now - self.started_at - idle_s)

    def emit(self, event: TurnEvent) -> None:
        """Call the sink."""
        emit(self.turn, self._sink, event)


def emit(turn: Turn, sink: Sink, event: TurnEvent) -> None:
    """Call the sink of a turn; if it raises, the turn is cancelled and the engine goes on."""
    try:
        sink(event)
    except Exception:
        log.exception("a turn's sink failed; the turn is cancelled")
        turn.cancel()


def finish_unopened(turn: Turn, sink: Sink, reason: FinishReason, error: str | None = None) -> None:
    """Give the last event to the sink of a turn that has no prompt."""
    turn.mark_finished()
    emit(turn, sink, Finished(reason, 0, 0, 0.0, error))
