"""The engine: one thread owns the device and decides what runs next.

Each tick takes new turns, text and cancels from callers, and prefills turns that wait for a slot.
Then it launches one frame, delivers the audio of the previous frame, and waits for the new frame's
codes. `schedule` decides which turns a frame takes: those whose playback runs out first.

`slot_order` decides who gets a slot. A turn whose text is late keeps its slot while no other turn
needs it. If *n* turns wait for a slot, it keeps it for `LATE_TEXT_S` / *n*. Then it speaks the words
that it has to their end and gives the slot back. It joins the queue again when more text comes.

    device    frame n   codec n   frame n+1   codec n+1
    host           codes n^  launch n+1   audio n^    codes n+1^

The codec runs behind its frame, and the host works and launches while the codec runs. EOS is known
before the next frame is launched, so only a turn that is cancelled or stopped for silence discards
one frame. If the codec is done at once, as on a CPU, its audio is delivered before the next frame is
launched.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from typing import cast

import numpy as np
import torch

from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.config import HOP
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.active_turn import ActiveTurn, TurnRequest, finish_unopened, open_feed
from qwen_megakernel.engine.capacity import Capacity, SlotClock
from qwen_megakernel.engine.in_flight import FrameSlot, InFlightFrame
from qwen_megakernel.engine.reference_states import ReferenceStates
from qwen_megakernel.engine.reservations import Reservations
from qwen_megakernel.engine.schedule import Schedule
from qwen_megakernel.engine.slot_order import Owner, SlotOrder, num_before
from qwen_megakernel.engine.standby import Standby, StandbyPlan
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.turn import FinishReason, RequestError, Sink, Started, Turn

log = logging.getLogger(__name__)

LATE_TEXT_S = 0.5
"""Seconds in all that an utterance may hold a slot without text, divided by the turns that wait."""
_SWEEP_S = 1.0
"""Seconds between checks of turns that cannot run. One that has waited too long for text ends."""
_DECODER_FAILED = "the decoder has failed; the process must be restarted"


class Engine:
    """Runs turns on one decoder backend and one codec stream, many at a time."""

    def __init__(
        self,
        backend: DecoderBackend,
        codec: FrameCodec,
        prompts: PromptBuilder,
        *,
        eos_id: int,
        max_text_wait_s: float = 60.0,
        cpu_threads: int | None = None,
        standby: Standby | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            backend: its slots are the turns that can speak at a time.
            codec: has the same number of slots.
            prompts: of the same checkpoint.
            eos_id: the value of code 0 that ends an utterance.
            max_text_wait_s: a turn that waits longer than this for text ends as an error.
            cpu_threads: PyTorch's threads; None leaves the number to PyTorch.
            standby: what is done while no turn is open; None does nothing.
        """
        self._prompts, self._eos_id = prompts, eos_id
        self.num_slots = backend.num_slots
        """Turns that can hold a slot."""
        self._max_positions = backend.max_positions
        self.standby = standby or Standby(StandbyPlan(), None, prompts)
        self._max_text_wait_s = max_text_wait_s
        self._cpu_threads = cpu_threads
        self._references = ReferenceStates()
        self._free_slots = list(range(backend.num_slots))
        self._slot_clock = SlotClock(self.num_slots)
        self._slot_order = SlotOrder(backend.num_slots)
        self._opened: deque[tuple[Turn, TurnRequest, Sink]] = deque()
        self._news: deque[Turn] = deque()
        """Turns with new text, a cancel or a hold that the engine has not taken yet."""
        self._active: dict[Turn, ActiveTurn] = {}
        """The turns that wait and the turns that speak."""
        self._sweep_at = 0.0
        self._schedule = Schedule(backend.num_slots, backend.max_batch)
        self._reservations = Reservations(None)
        self._use(backend, codec)
        self._num_prefilled = 0
        """Prompt rows that were prefilled in this tick."""
        self._waiting: list[ActiveTurn] = []
        self._speaking: list[ActiveTurn] = []
        self._pending_audio: InFlightFrame | None = None
        """The frame whose codes are known and whose audio is not delivered yet."""
        self._wake = threading.Event()
        self._open_lock = threading.Lock()  # no turn is opened once the engine has failed or closed
        self._closing = False
        self._cancel_all = False
        self.error: Exception | None = None
        """What stopped the engine; it serves no turn after that."""
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def num_waiting(self) -> int:
        """Turns without a slot."""
        return len(self._opened) + len(self._waiting)

    @property
    def num_speaking(self) -> int:
        """Turns that hold a slot."""
        return len(self._speaking)

    def capacity(self, owner: Owner = ()) -> Capacity:
        """The current load, as a new turn of `owner` would meet it. Any thread may call it."""
        now, speaking = time.monotonic(), list(self._speaking)
        opened = [(t, request) for t, request, _ in list(self._opened) if t.first_text_at is not None]
        waiting = [(a.turn, a.request) for a in list(self._waiting) if a.ready and not a.scant]
        queue = [request.owner for turn, request in (*opened, *waiting) if not turn.cancelled]
        num_free = self._num_free()
        num_slots = self.num_slots if num_free or not self._free_slots else len(speaking)
        return Capacity(
            num_slots=max(1, num_slots),
            num_free=num_free,
            num_queued=num_before(owner, queue),
            slot_s=self._slot_clock.mean_s(now - a.slot_since for a in speaking),
        )

    def open_turn(self, request: TurnRequest, sink: Sink, text: str = "", *, end: bool = False) -> Turn:
        """Begin a turn.

        Args:
            request: voice, language and parameters.
            sink: called with the turn's events on the engine's thread; it must return at once.
            text: the first text; more may follow by `Turn.append`.
            end: whether the text is complete.

        Raises:
            RequestError: the request cannot be served, or the engine has failed or is closed.
        """
        self._prompts.check(request.voice, request.language, instruct=request.instruct)
        request.check(text, end)
        self._check_open()  # a turn that is refused costs no tokenising

        def tell() -> None:
            self._news.append(turn)
            self._wake.set()

        turn = Turn(tell, open_feed(self._prompts, request, self._max_positions))
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

    def close(self, drain_s: float = 0.0) -> None:
        """Let running turns speak on for `drain_s`, cancel the rest, and end the thread."""
        with self._open_lock:
            self._closing = True
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and (self.num_waiting or self.num_speaking):
            time.sleep(0.01)
        self._cancel_all = True
        self._wake.set()
        self.thread.join()

    # -- the engine's thread ----------------------------------------------------------------

    def _use(self, backend: DecoderBackend, codec: FrameCodec) -> None:
        self._backend, self._codec = backend, codec
        self._reservations.use(backend)
        self._zero_row = torch.zeros_like(self._prompts.pad_row)

    def _run(self) -> None:
        if self._cpu_threads is not None:
            torch.set_num_threads(self._cpu_threads)  # for this thread and for threads started later
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
        """Run one round. Returns whether it computed anything."""
        start = time.monotonic()
        self._take_opened()
        if not self.standby.loaded:  # so no turn has a prompt
            return False
        more_text = self._take_news()
        self._schedule.update()
        self._end_late_utterances()
        prefilled = self._prefill_waiting()
        batch = self._schedule.choose(self._backend.max_batch)
        launched = self._launch(batch) if batch else None
        delivered = self._hand_out()
        if launched is not None:
            self._read_codes(launched)
            self._schedule.pace.add_tick(time.monotonic() - start, len(batch), self._num_prefilled)
        return more_text or prefilled or delivered or launched is not None

    def _take_opened(self) -> None:
        while self._opened:
            turn, request, sink = self._opened[0]  # it counts as waiting while its prompt is made
            if turn.cancelled:
                self._opened.popleft()
                finish_unopened(turn, sink, "cancelled")
                continue
            self.standby.end()
            if self.standby.memory == "unloaded":
                self._load_again()
                continue
            try:
                prompt = self._prompts.open(
                    request.voice,
                    request.language,
                    instruct=request.instruct,
                    streaming=request.streaming,
                )
            except Exception:
                log.exception("a turn's prompt could not be made")
                self._opened.popleft()
                finish_unopened(turn, sink, "error", "the prompt could not be made")
                continue
            with self._open_lock:
                self._opened.popleft()
                self._active[turn] = ActiveTurn(turn, request, prompt, sink)
                self._waiting.append(self._active[turn])
            self._news.append(turn)

    def _take_news(self) -> bool:
        """Take the new input of turns, and end turns that have waited too long for text. Returns whether
        more input is left."""
        now = time.monotonic()
        turns = dict.fromkeys(self._news.popleft() for _ in range(len(self._news)))
        if self._cancel_all:
            turns |= dict.fromkeys(self._active)
        elif now >= self._sweep_at:
            self._sweep_at = now + min(_SWEEP_S, self._max_text_wait_s)
            turns |= dict.fromkeys(turn for turn, active in self._active.items() if active.idle)
        for turn in turns:
            if active := self._active.get(turn):
                self._take_input(active)
        more = [turn for turn in turns if turn.has_text and turn in self._active]
        self._news.extend(more)
        return bool(more)

    def _take_input(self, active: ActiveTurn) -> None:
        """Take a turn's new text and its cancel, and end the turn if it is over."""
        now = time.monotonic()
        if active.turn.cancelled or self._cancel_all:
            self._finish(active, "cancelled")
            return
        active.take_text()
        self._schedule.note(active)
        if active.prompt.ended:
            self._reservations.shrink(active)
        if active.prompt.empty and not active.prefilled:
            self._finish(active, active.reason)
            return
        if active.slot is None:
            active.mark_idle(active.text_late, now)
        if active.text_late and active.idle_for_s(now) > self._max_text_wait_s:
            self._finish(active, "error", f"no text for {self._max_text_wait_s:g} s")

    def _num_free(self) -> int:
        """The number of slots that waiting turns can have now. Any thread may call it.

        It is 0 while the voices that speak leave no time for one more, or while there are too few pages.
        """
        free = self._free_slots and self._schedule.holds_one_more()
        return len(self._free_slots) if free and self._reservations.fit(list(self._waiting)) else 0

    def _late_limit_s(self) -> float:
        """Seconds for which an utterance may hold a slot without text; infinity if no slot is needed."""
        if not self._slot_order.num_missing(self._waiting, self._num_free()):
            return math.inf
        return LATE_TEXT_S / sum(a.ready for a in self._waiting)

    def _end_late_utterances(self) -> None:
        """Take slots back from turns whose text is late, as many as other turns need."""
        late = [a for a in self._schedule.late if not a.turn.has_text]
        limit_s = self._late_limit_s() if late else math.inf
        if limit_s == math.inf:
            return
        num_needed = self._slot_order.num_missing(self._waiting, self._num_free())
        num_needed -= sum(a.gives_back for a in self._speaking)
        now = time.monotonic()
        late = [a for a in late if a.late_for_s(now) >= limit_s]
        late.sort(key=lambda a: a.late_for_s(now), reverse=True)
        for active in late[: max(0, num_needed)]:
            if active.prefilled:
                active.end_utterance()
                self._schedule.note(active)
            else:  # the next part has not begun: it can wait for its text without a slot
                self._wait_again(active)

    def _prefill_waiting(self) -> bool:
        """Prefill waiting turns into slots. Returns whether at least one turn was served.

        It fills the next frame, so that turns opened together speak together. It stops earlier if
        another turn's playback would run out. It also stops after a turn with scant text: turns with
        enough text may arrive, and more prompts would delay them.
        """
        self._num_prefilled = 0
        last = self._prefill_next()
        if last is None:
            return False
        room = self._backend.max_batch - self._schedule.num_unbegun
        while room > 0 and last is not None and not last.scant:
            last = self._prefill_next()
            room -= 1
        return True

    def _prefill_next(self) -> ActiveTurn | None:
        """Prefill a part of a turn that speaks, else a turn that gets a slot. Returns it, if any."""
        active = next((a for a in self._schedule.unprefilled if not a.prefilled and a.ready), None)
        # A long queue costs a tick nothing while no slot is free.
        if active is None and self._waiting and (num_free := self._num_free()):
            ready = [a for a in self._waiting if a.ready]
            if self._schedule.may_begin(ready, self._num_prefilled):
                active = self._slot_order.choose(ready, num_free)
        if active is None:
            return None
        self._num_prefilled += active.num_prompt_rows
        rows = active.prompt.rows()
        room = self._max_positions - len(rows)
        if room < 1:
            self._finish(active, "error", f"the text is too long: {len(rows)} rows of prompt")
            return active
        now = time.monotonic()
        if active.slot is None:
            active.slot, active.slot_since = self._free_slots.pop(0), now
            self._reservations.reserve(active)
            self._speaking.append(active)  # before it leaves `_waiting`, so that it always counts
            self._waiting.remove(active)
        active.begin_part(room, now)
        self._schedule.note(active)
        self._references.begin(self._codec, active.slot, active.request.voice)
        self._backend.prefill(active.slot, rows, active.params, active.prompt.shared)
        if not active.part:
            active.emit(Started())
        return active

    def _launch(self, batch: list[ActiveTurn]) -> InFlightFrame:
        """Begin one frame for each turn of the batch, and the codec behind it."""
        self._schedule.note(*batch)
        slots = [cast("int", a.slot) for a in batch]
        rows = [self._zero_row if row is None else row for row in (a.feed() for a in batch)]
        frame = self._backend.launch(slots, torch.stack(rows) if len(rows) > 1 else rows[0][None])
        audio = self._codec.launch(slots, frame.device_codes)
        parts = [
            FrameSlot(a, a.part, a.prompt.text_exhausted, "length" if a.last_fed else None)
            for a in batch
        ]
        return InFlightFrame(parts, frame, audio)

    def _read_codes(self, launched: InFlightFrame) -> None:
        """Wait for a frame's codes. End turns that drew EOS; mark turns that end with this audio."""
        for part, code0 in zip(launched.slots, launched.frame.codes()[:, 0].tolist(), strict=True):
            active = part.turn
            if part.over:
                continue
            if code0 == self._eos_id:
                self._end_part(active, "stop")
            elif active.guard.repeats_after(code0):
                self._schedule.note(active)
                part.ending, active.last_fed = "repeat", True
        self._pending_audio = launched
        if launched.audio.ready():
            self._hand_out()

    def _hand_out(self) -> bool:
        """Wait for the pending audio and deliver it to its turns. Returns whether there was any."""
        pending, self._pending_audio = self._pending_audio, None
        if pending is None:
            return False
        for part, samples in zip(pending.slots, pending.audio.samples(), strict=True):
            if not part.over:
                self._deliver_audio(part, samples[:HOP])
        return True

    def _deliver_audio(self, part: FrameSlot, samples: np.ndarray) -> None:
        """Give a turn a frame's audio, float32 [1920], and end its part if this frame is the last."""
        active = part.turn
        if active.turn.cancelled:
            self._finish(active, "cancelled")
            return
        self._schedule.note(active)
        active.add_frame(samples)
        silent = active.guard.silent_after(samples, text_exhausted=part.text_exhausted)
        ending = "silence" if silent and part.ending != "repeat" else part.ending
        if ending is not None:
            self._end_part(active, ending)

    def _end_part(self, active: ActiveTurn, reason: FinishReason) -> None:
        """Go on with the next part of the turn, in the same slot or in another, or end the turn."""
        self._schedule.note(active)
        if active.turn.cancelled:
            self._finish(active, "cancelled")
        elif (ending := active.end_part(reason)) is not None:
            self._finish(active, ending)
        else:
            self._news.append(active.turn)  # the next part may be empty
            self._backend.release(cast("int", active.slot))
            if active.gives_back:
                self._wait_again(active)

    def _wait_again(self, active: ActiveTurn) -> None:
        """Move a turn between two parts from its slot to the end of the queue."""
        self._waiting.append(active)  # before it leaves `_speaking`, so that it always counts
        self._leave_slot(active, cast("int", active.slot))
        active.wait_again()
        self._news.append(active.turn)

    def _finish(self, active: ActiveTurn, reason: FinishReason, error: str | None = None) -> None:
        if active.slot is None:
            self._waiting.remove(active)
        else:
            if active.prefilled:
                self._backend.release(active.slot)
            self._leave_slot(active, active.slot)
        self._active.pop(active.turn, None)
        active.finish(reason, error)

    def _leave_slot(self, active: ActiveTurn, slot: int) -> None:
        self._speaking.remove(active)
        self._schedule.leave(active, slot)
        self._reservations.free(slot)
        self._free_slots.append(slot)
        self._slot_clock.add(time.monotonic() - active.slot_since)

    def _idle_timeout(self) -> float | None:
        """Seconds until a turn may run without a call from outside. Without turns, see `_pass_time`."""
        if not self._speaking and not self.num_waiting:
            return self._pass_time()
        ready_s = self._schedule.wait_s(time.monotonic())
        return min(ready_s, self._late_limit_s(), self._max_text_wait_s, 1.0)

    def _pass_time(self) -> float | None:
        """Do the standby work that is due. Returns the seconds until more is due, or None."""
        due = self.standby.due(time.monotonic())
        if due == "warm":
            self.standby.warm(self._backend, self._codec)
        elif due == "unload":
            self._reservations.use(None)
            self._references, self._pending_audio = ReferenceStates(), None
            del self._backend, self._codec, self._zero_row
            self.standby.unload()
        return self.standby.wait_s(time.monotonic())

    def _load_again(self) -> None:
        """Load the model for the turns that were opened. If this fails, fail these turns."""
        try:
            self._use(*self.standby.load())
        except CheckpointError as error:
            with self._open_lock:
                self._fail_opened(str(error))

    def _fail_opened(self, message: str) -> None:
        for turn, _, sink in self._opened:
            finish_unopened(turn, sink, "error", message)
        self._opened.clear()

    def _fail_all(self) -> None:
        """End every turn with an error: the device is lost."""
        self._pending_audio = None
        self._fail_opened(_DECODER_FAILED)
        for active in [*self._waiting, *self._speaking]:
            active.finish("error", _DECODER_FAILED)
        self._waiting.clear()
        self._speaking.clear()
