"""The engine: one thread owns the device and decides what runs next.

Each tick takes what callers said (new turns, text, cancels), prefills at most one waiting turn,
decodes one frame for the up to eight turns whose playback runs out first, turns their codes to
sound in one codec call, and hands the sound out. A turn whose next text row has not come, or
that is further ahead of its playback than its lead, is left out. Nothing else decides order.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from qwen_megakernel.codec import CodecStream
from qwen_megakernel.config import FRAME_S, HOP, GenerationParams, Guards
from qwen_megakernel.decoder import MAX_BATCH, DecoderBackend
from qwen_megakernel.prompt import Prompt, PromptBuilder
from qwen_megakernel.turn import (
    Append,
    Audio,
    Finished,
    FinishReason,
    Flush,
    RequestError,
    Sink,
    Started,
    Turn,
    TurnEvent,
)
from qwen_megakernel.voice import Voice

log = logging.getLogger(__name__)

CHUNK_RAMP = (1, 1, 2, 4)
"""Frames of a turn's first chunks; the last repeats. Small first, so that sound starts at once;
larger later, because each message costs the same whatever its length."""

_DECODER_FAILED = "the decoder has failed; the process must be restarted"


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
    """Seconds of audio the turn may be ahead of its playback; None is as fast as it goes."""


@dataclass(slots=True)
class _RunawayGuard:
    """Counts what an utterance that will not end looks like (`Guards`)."""

    guards: Guards
    last_code0: int = -1
    repeats: int = 0
    silent_frames: int = 0

    def verdict(self, code0: int, samples: np.ndarray, *, text_exhausted: bool) -> FinishReason | None:
        """Why the turn must stop after this frame, if it must."""
        self.repeats = self.repeats + 1 if code0 == self.last_code0 else 1
        self.last_code0 = code0
        silent = float(np.sqrt(np.mean(np.square(samples)))) < self.guards.silence_rms
        self.silent_frames = self.silent_frames + 1 if silent and text_exhausted else 0
        if self.guards.repeat_frames and self.repeats >= self.guards.repeat_frames:
            return "repeat"
        if self.guards.silence_s and self.silent_frames * FRAME_S >= self.guards.silence_s:
            return "silence"
        return None


class _Active:
    """A turn as the engine's thread sees it."""

    def __init__(self, turn: Turn, request: TurnRequest, prompt: Prompt, sink: Sink) -> None:
        self.turn, self.request, self.prompt, self._sink = turn, request, prompt, sink
        self.guard = _RunawayGuard(request.params.guards)
        self.opened_at = time.monotonic()
        self.slot: int | None = None
        self.max_frames = 0
        self.num_frames = 0
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
        """Move what the caller said into the prompt."""
        for command in self.turn.take_commands():
            if isinstance(command, Append):
                self.prompt.append(command.text)
            elif isinstance(command, Flush):
                self.prompt.flush()
            else:
                self.prompt.end()

    def lead_s(self, now: float) -> float:
        """Seconds of decoded audio not yet played; minus infinity before the first chunk."""
        if self._first_audio_at is None:
            return -math.inf
        return self.num_frames * FRAME_S - (now - self._first_audio_at)

    @property
    def text_late(self) -> bool:
        """Whether the turn can do nothing before more text comes."""
        if self.slot is None:
            return not self.prompt.ready
        return bool(self.num_frames) and self.prompt.next_text_row() is None

    def wait_s(self, now: float) -> float:
        """Seconds until this turn may decode: 0 now, infinite when its text is late or it is held."""
        if self.text_late or self.turn.held:
            return math.inf
        if self.request.max_lead_s is None:
            return 0.0
        return max(0.0, self.lead_s(now) - self.request.max_lead_s)

    def mark_idle(self, idle: bool, now: float) -> None:
        """Keep the time that is nobody's work out of `generation_s`."""
        if idle and self._idle_since is None:
            self._idle_since = now
        elif not idle and self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = None

    def idle_for_s(self, now: float) -> float:
        """Seconds since the turn last could run."""
        return now - self._idle_since if self._idle_since is not None else 0.0

    def add_frame(self, samples: np.ndarray) -> None:
        """Take a decoded frame, float32 [1920]; hand out a chunk when one is full."""
        self.num_frames += 1
        self._pending.append(samples)
        size = self.request.chunk_frames or CHUNK_RAMP[min(self._num_chunks, len(CHUNK_RAMP) - 1)]
        if len(self._pending) >= size:
            self.hand_out()

    def hand_out(self) -> None:
        """Give the sink all audio that is decoded and not yet given."""
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
            self._pending.clear()  # nothing is heard after a cancel
        self.hand_out()
        now = time.monotonic()
        self.mark_idle(False, now)
        started, first = self.started_at, self._first_audio_at
        self.turn.mark_finished()
        self.emit(
            Finished(
                reason,
                num_frames=self.num_frames,
                num_samples=self._num_samples,
                ttfc_s=None if first is None else first - started,
                generation_s=self._generation_s(now),
                error=error,
            )
        )

    def _generation_s(self, now: float) -> float:
        idle_s = self._idle_s + self.idle_for_s(now)
        return max(0.0, now - self.started_at - idle_s)

    def emit(self, event: TurnEvent) -> None:
        """Call the sink; one that raises loses its turn, never the engine."""
        try:
            self._sink(event)
        except Exception:
            log.exception("a turn's sink failed; the turn is cancelled")
            self.turn.cancel()


class Engine:
    """Runs turns on one decoder backend and one codec stream, many at a time."""

    def __init__(
        self,
        backend: DecoderBackend,
        codec: CodecStream,
        prompts: PromptBuilder,
        *,
        eos_id: int,
        max_waiting: int = 64,
        max_text_wait_s: float = 60.0,
    ) -> None:
        """Start the engine's thread.

        Args:
            backend: has at least as many slots as may speak at a time.
            codec: has the same number of slots.
            prompts: of the same checkpoint.
            eos_id: code 0 that ends an utterance.
            max_waiting: turns that may wait for a slot; one more is refused as overloaded.
            max_text_wait_s: a turn whose text is later than this is ended as an error.
        """
        self._backend, self._codec, self._prompts, self._eos_id = backend, codec, prompts, eos_id
        self._max_waiting, self._max_text_wait_s = max_waiting, max_text_wait_s
        self._zero_row = torch.zeros_like(prompts.pad_row)
        self._free_slots = list(range(backend.num_slots))
        self._opened: deque[tuple[Turn, TurnRequest, Sink]] = deque()
        self._waiting: list[_Active] = []
        self._speaking: list[_Active] = []
        self._wake = threading.Event()
        self._open_lock = threading.Lock()  # no turn slips in once the engine has failed or closed
        self._closing = False
        self._cancel_all = False
        self.error: Exception | None = None
        """What killed the engine; it serves no turn after that."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Turns without a slot."""
        return len(self._opened) + len(self._waiting)

    @property
    def num_speaking(self) -> int:
        """Turns that hold a slot."""
        return len(self._speaking)

    def open_turn(self, request: TurnRequest, sink: Sink, text: str = "", *, end: bool = False) -> Turn:
        """Begin a turn.

        Args:
            request: voice, language and parameters.
            sink: takes the turn's events on the engine's thread; it must return at once.
            text: the first text; more may follow by `Turn.append`.
            end: whether the text is complete.

        Raises:
            RequestError: a request that cannot be served, too many turns waiting, or no engine.
        """
        self._prompts.check(request.voice, request.language, instruct=request.instruct)
        if end and not text.strip():
            raise RequestError("bad_request", "the text is empty")
        if request.chunk_frames is not None and request.chunk_frames < 1:
            raise RequestError("bad_request", f"chunk_frames is {request.chunk_frames}, allowed: 1 up")
        turn = Turn(self._wake.set)
        if text:
            turn.append(text)
        if end:
            turn.end()
        with self._open_lock:
            self._check_open()
            self._opened.append((turn, request, sink))
        self._wake.set()
        return turn

    def _check_open(self) -> None:
        if self.error is not None:
            raise RequestError("internal", _DECODER_FAILED)
        if self._closing:
            raise RequestError("overloaded", "shutting down")
        if self.num_waiting >= self._max_waiting:
            raise RequestError("overloaded", f"{self._max_waiting} turns are waiting already")

    def close(self, drain_s: float = 0.0) -> None:
        """Let running turns speak on for `drain_s`, cancel the rest, and end the thread."""
        with self._open_lock:
            self._closing = True
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and (self.num_waiting or self.num_speaking):
            time.sleep(0.01)
        self._cancel_all = True
        self._wake.set()
        self._thread.join()

    # -- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                worked = self._tick()
                if self._closing and not self.num_waiting and not self.num_speaking:
                    return
                if not worked:
                    self._wake.wait(self._idle_timeout())
        except Exception as error:
            log.exception("the decoder failed")
            with self._open_lock:
                self.error = error
            self._fail_all()

    def _tick(self) -> bool:
        """One round; whether anything was computed."""
        self._take_opened()
        for active in [*self._waiting, *self._speaking]:
            self._listen(active)
        prefilled = self._prefill_next()
        batch = self._choose()
        if batch:
            self._decode(batch)
        return prefilled or bool(batch)

    def _take_opened(self) -> None:
        while self._opened:
            turn, request, sink = self._opened.popleft()
            try:
                prompt = self._prompts.open(
                    request.voice,
                    request.language,
                    instruct=request.instruct,
                    streaming=request.streaming,
                )
            except Exception:
                log.exception("a turn's prompt could not be made")
                turn.mark_finished()
                sink(Finished("error", 0, 0, None, 0.0, "the prompt could not be made"))
                continue
            self._waiting.append(_Active(turn, request, prompt, sink))

    def _listen(self, active: _Active) -> None:
        """Take a turn's text and cancel; end it where that ends it."""
        now = time.monotonic()
        if active.turn.cancelled or self._cancel_all:
            self._finish(active, "cancelled")
            return
        try:
            active.take_text()
        except Exception:
            log.exception("a turn's text could not be taken")
            self._finish(active, "error", "the text could not be tokenised")
            return
        if active.prompt.empty:
            self._finish(active, "stop")
            return
        if active.slot is None:
            active.mark_idle(active.text_late, now)
        if active.text_late and active.idle_for_s(now) > self._max_text_wait_s:
            self._finish(active, "error", f"no text for {self._max_text_wait_s:g} s")

    def _prefill_next(self) -> bool:
        """Give the first waiting turn that has its text a slot."""
        if not self._free_slots:
            return False
        active = next((a for a in self._waiting if a.prompt.ready), None)
        if active is None:
            return False
        rows = active.prompt.rows()
        room = self._backend.max_positions - len(rows)
        if room < 1:
            self._finish(active, "error", f"the text is too long: {len(rows)} rows of prompt")
            return False
        slot = self._free_slots.pop(0)
        self._waiting.remove(active)
        self._speaking.append(active)
        active.slot, active.max_frames = slot, min(active.request.params.max_frames, room)
        self._codec.reset(slot)
        self._backend.prefill(slot, rows, active.request.params, active.prompt.shared)
        active.emit(Started())
        return True

    def _choose(self) -> list[_Active]:
        """The turns to decode now: those whose playback runs out first."""
        now = time.monotonic()
        runnable = []
        for active in self._speaking:
            waits = active.wait_s(now) > 0
            active.mark_idle(waits, now)
            if waits:
                active.hand_out()  # what was held for a fuller chunk is not held while waiting
            else:
                runnable.append(active)
        return sorted(runnable, key=lambda a: a.lead_s(now))[:MAX_BATCH]

    def _decode(self, batch: list[_Active]) -> None:
        """One frame for each turn of the batch, to sound and out."""
        slots = [a.slot for a in batch]
        codes = self._backend.decode(slots, torch.stack([self._text_row(a) for a in batch]))
        ended = codes[:, 0] == self._eos_id
        speaking = [i for i in range(len(batch)) if not ended[i]]
        sound: dict[int, np.ndarray] = {}
        if speaking:
            pcm = self._codec.decode([slots[i] for i in speaking], codes[speaking, None])
            sound = dict(zip(speaking, pcm.cpu().numpy(), strict=True))
        for i, active in enumerate(batch):
            self._after_frame(active, int(codes[i, 0]), sound.get(i))

    def _text_row(self, active: _Active) -> torch.Tensor:
        """The text row of this frame; the first frame's came with the prompt."""
        if not active.num_frames:
            return self._zero_row
        row = active.prompt.next_text_row()
        active.prompt.advance()
        return row

    def _after_frame(self, active: _Active, code0: int, samples: np.ndarray | None) -> None:
        """Hand out a frame's sound and decide whether the turn goes on; no sound is EOS."""
        if active.turn.cancelled:
            self._finish(active, "cancelled")
            return
        if samples is None:
            self._finish(active, "stop")
            return
        active.add_frame(samples[:HOP])
        exhausted = active.prompt.text_exhausted
        reason = active.guard.verdict(code0, samples, text_exhausted=exhausted)
        if reason is None and active.num_frames >= self._frame_limit(active):
            reason = "length"
        if reason is not None:
            self._finish(active, reason)

    def _frame_limit(self, active: _Active) -> int:
        budget = active.request.params.guards.budget(active.prompt.num_text_tokens)
        if budget is None or not active.prompt.ended:
            return active.max_frames
        return min(active.max_frames, budget)

    def _finish(self, active: _Active, reason: FinishReason, error: str | None = None) -> None:
        if active.slot is None:
            self._waiting.remove(active)
        else:
            self._speaking.remove(active)
            self._backend.release(active.slot)
            self._free_slots.append(active.slot)
        active.finish(reason, error)

    def _idle_timeout(self) -> float | None:
        """How long nothing can happen unless somebody calls; None when nothing is open."""
        if not self._speaking and not self._waiting:
            return None
        now = time.monotonic()
        waits: Iterable[float] = (a.wait_s(now) for a in self._speaking)
        return min([*waits, self._max_text_wait_s, 1.0])

    def _fail_all(self) -> None:
        """The device is lost: say so to every turn."""
        for _, _, sink in self._opened:
            sink(Finished("error", 0, 0, None, 0.0, _DECODER_FAILED))
        for active in [*self._waiting, *self._speaking]:
            active.finish("error", _DECODER_FAILED)
        self._opened.clear()
        self._waiting.clear()
        self._speaking.clear()
