"""Which of the turns that speak decode next, and how much time they leave for others."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Sequence

from qwen_megakernel.engine.active_turn import ActiveTurn
from qwen_megakernel.engine.pace import Pace

FIRST_FRAME_TICKS = 2
"""A turn's first frame counts as due after so many ticks: turns with more audio left give way to it."""
MOST_FIRST_FRAME_S = 0.05
PATIENCE_S = 0.3
"""Seconds for which a prefill waits because another turn's playback would run out during it."""
HORIZON_S = 2.0
"""Seconds that the engine looks ahead when it decides whether it can hold one more voice."""


class Schedule:
    """The order of turns. It looks at a turn again only after the turn has changed."""

    def __init__(self, max_batch: int) -> None:
        """`max_batch` is the number of streams in a full frame."""
        self.pace = Pace(max_batch)
        self._changed: dict[ActiveTurn, None] = {}

    def note(self, *turns: ActiveTurn) -> None:
        """Note that these turns may have become able or unable to decode."""
        self._changed.update(dict.fromkeys(turns))

    def choose(self, speaking: Iterable[ActiveTurn], most: int) -> list[ActiveTurn]:
        """The turns to decode now, at most `most`: those whose playback runs out first."""
        now = time.monotonic()
        for active in self._changed:
            if active.slot is not None and not active.turn.finished:
                active.refresh(now)
        self._changed.clear()
        runnable = [a for a in speaking if a.ready_at <= now]
        for active in runnable:
            if active.idle:
                active.mark_idle(False, now)
        first_s = min(MOST_FIRST_FRAME_S, FIRST_FRAME_TICKS * self.pace.tick_s)
        return heapq.nsmallest(most, runnable, key=lambda a: a.deadline(now, first_s))

    def spare_s(self, speaking: Iterable[ActiveTurn], now: float) -> float:
        """Seconds until the first playback of a turn that can decode runs out, less a frame's time."""
        leads = (a.lead_s(now) for a in speaking if a.ready_at <= now and a.begun)
        return min(leads, default=math.inf) - FIRST_FRAME_TICKS * self.pace.tick_s

    def may_begin(
        self, waiting: Sequence[ActiveTurn], speaking: Iterable[ActiveTurn], num_prefilled: int
    ) -> bool:
        """Whether any one of these turns may be prefilled now.

        Either the longest prompt lets nobody's playback run out, or a turn has waited for `PATIENCE_S`.
        `num_prefilled` rows were prefilled in this tick.
        """
        if not waiting:
            return False
        now = time.monotonic()
        num_rows = num_prefilled + max(a.num_prompt_rows for a in waiting)
        if self.pace.prompt_s(num_rows) <= self.spare_s(speaking, now):
            return True
        return not num_prefilled and any(now - a.started_at >= PATIENCE_S for a in waiting)

    def holds_one_more(self, speaking: Sequence[ActiveTurn]) -> bool:
        """Whether all voices stay in real time if one more joins, by the measured times of frames.

        A turn's lead reduces the audio that it needs within `HORIZON_S`.
        """
        if (most := self.pace.num_voices) is None:
            return True
        now = time.monotonic()
        needed_s = sum(
            min(HORIZON_S, max(0.0, HORIZON_S - a.lead_s(now)))
            for a in speaking
            if a.in_real_time and not a.last_fed and (a.ready_at < math.inf or not a.begun)
        )
        return not needed_s or needed_s <= (most - 1) * HORIZON_S
