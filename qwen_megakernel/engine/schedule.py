"""Which of the turns that speak decode next, and how much time they leave for others.

A frame takes the turns whose playback runs out first. It leaves out a turn whose next text row has not
come, and one that is further ahead of its playback than its lead. Nothing else decides order.

With hundreds of voices, to look at each turn in each tick would take longer than a frame. So this
module keeps what it needs of a turn in arrays by slot, and computes a slot's entries again only after
its turn has changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import cast

import numpy as np

from qwen_megakernel.config import FRAME_S
from qwen_megakernel.engine.active_turn import ActiveTurn
from qwen_megakernel.engine.pace import Pace

FIRST_FRAME_TICKS = 2
"""A turn's first frame counts as due after so many ticks: turns with more audio left give way to it."""
MOST_FIRST_FRAME_S = 0.05
PATIENCE_S = 0.3
"""Seconds for which a prefill waits because another turn's playback would run out during it."""
HORIZON_S = 2.0
"""Seconds that the engine looks ahead when it decides whether it can hold one more voice."""
RESERVE_S = 0.5
"""Seconds of lead that each voice should have by then. A client gets its audio in chunks of up to four
frames, so a voice with less than 0.32 s may run dry while its chunk is made."""
TAKE_ALONG_S = FRAME_S
"""A frame with room to spare takes along turns that would ask for one within this time. So voices that
are as far ahead as they may be share their frames, which costs the GPU far less than a frame each."""


class Schedule:
    """The order of the turns that hold a slot."""

    def __init__(self, num_slots: int, max_batch: int) -> None:
        """`max_batch` is the number of streams in a full frame."""
        self.pace = Pace(max_batch)
        self._changed: dict[ActiveTurn, None] = {}
        self._late: dict[ActiveTurn, None] = {}
        self._unprefilled: dict[ActiveTurn, None] = {}
        self._turns: list[ActiveTurn | None] = [None] * num_slots
        self._ready_at = np.full(num_slots, math.inf)
        """When the turn may decode, by slot. `inf` without a turn, here and below."""
        self._due_at = np.full(num_slots, math.inf)
        """When the next frame is needed."""
        self._plays_until = np.full(num_slots, math.inf)
        """When the playback of the launched audio ends; minus infinity before a part's first frame."""
        self._listened_to = np.zeros(num_slots, dtype=bool)
        """Whether more frames are needed, and in real time."""
        self._idle = np.zeros(num_slots, dtype=bool)

    def note(self, *turns: ActiveTurn) -> None:
        """Note that these turns have changed."""
        self._changed.update(dict.fromkeys(turns))

    def leave(self, active: ActiveTurn, slot: int) -> None:
        """Note that a turn has given its slot back."""
        self._changed.pop(active, None)
        self._late.pop(active, None)
        self._unprefilled.pop(active, None)
        self._turns[slot] = None
        for times in (self._ready_at, self._due_at, self._plays_until):
            times[slot] = math.inf
        self._listened_to[slot] = self._idle[slot] = False

    def update(self) -> None:
        """Look at the turns that have changed."""
        now = time.monotonic()
        for active in self._changed:
            if active.slot is not None and not active.turn.finished:
                self._look_at(active, active.slot, now)
        self._changed.clear()

    def _look_at(self, active: ActiveTurn, slot: int, now: float) -> None:
        active.refresh(now)
        self._turns[slot] = active
        self._ready_at[slot] = active.ready_at
        self._plays_until[slot] = active.plays_until(now)
        first_s = min(MOST_FIRST_FRAME_S, FIRST_FRAME_TICKS * self.pace.tick_s)
        self._due_at[slot] = self._plays_until[slot] if active.begun else now + first_s
        goes_on = not active.last_fed and (active.ready_at < math.inf or not active.begun)
        self._listened_to[slot] = goes_on and active.in_real_time
        self._idle[slot] = active.idle
        for turns, belongs in ((self._late, active.late), (self._unprefilled, not active.prefilled)):
            if belongs:
                turns[active] = None
            else:
                turns.pop(active, None)

    @property
    def late(self) -> list[ActiveTurn]:
        """The turns that cannot go on before more text comes."""
        return list(self._late)

    @property
    def unprefilled(self) -> list[ActiveTurn]:
        """The turns whose next part was not in their slot at the last `update`."""
        return list(self._unprefilled)

    @property
    def num_unbegun(self) -> int:
        """The number of turns without a frame of their part."""
        return int(np.isneginf(self._plays_until).sum())

    def choose(self, most: int) -> list[ActiveTurn]:
        """The turns of the next frame, at most `most`: those whose playback runs out first."""
        self.update()
        now = time.monotonic()
        if not (self._ready_at <= now).any():
            return []
        slots = np.flatnonzero(self._ready_at <= now + TAKE_ALONG_S)
        slots = slots[np.argsort(self._due_at[slots], kind="stable")][:most]
        chosen = [cast("ActiveTurn", self._turns[slot]) for slot in slots.tolist()]
        for active in (active for active in chosen if active.idle):
            active.mark_idle(False, now)
        return chosen

    def wait_s(self, now: float) -> float:
        """Seconds until a turn may decode; infinity if none can."""
        return max(0.0, float(self._ready_at.min(initial=math.inf)) - now)

    def spare_s(self, now: float) -> float:
        """Seconds until the first playback of a turn that can decode runs out, less a frame's time."""
        plays = self._plays_until[(self._ready_at <= now) & ~np.isneginf(self._plays_until)]
        return float(plays.min(initial=math.inf)) - now - FIRST_FRAME_TICKS * self.pace.tick_s

    def may_begin(self, waiting: Sequence[ActiveTurn], num_prefilled: int) -> bool:
        """Whether any one of these turns may be prefilled now.

        Either the longest prompt lets nobody's playback run out, or a turn has waited for `PATIENCE_S`.
        `num_prefilled` rows were prefilled in this tick.
        """
        if not waiting:
            return False
        now = time.monotonic()
        num_rows = num_prefilled + max(a.num_prompt_rows for a in waiting)
        if self.pace.prompt_s(num_rows) <= self.spare_s(now):
            return True
        return not num_prefilled and any(now - a.started_at >= PATIENCE_S for a in waiting)

    def holds_one_more(self) -> bool:
        """Whether one more voice may join, by the measured times of frames.

        All voices must stay in real time for `HORIZON_S`, and then be `RESERVE_S` ahead of playback. A
        turn's lead reduces the audio that it needs. Any thread may call it.
        """
        if (most := self.pace.num_voices) is None:
            return True
        ahead_s = self._plays_until[self._listened_to] - time.monotonic()
        most_s = HORIZON_S + RESERVE_S
        needed_s = float(np.clip(most_s - ahead_s, 0.0, most_s).sum())
        return not needed_s or needed_s <= (most - 1) * HORIZON_S
