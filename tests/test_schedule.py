"""Which turn decodes next, whether a prompt may go first, and how many voices the engine can hold."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest

from qwen_megakernel.config import FRAME_S
from qwen_megakernel.engine import active_turn
from qwen_megakernel.engine import schedule as schedule_module
from qwen_megakernel.engine.active_turn import ActiveTurn, TurnRequest
from qwen_megakernel.engine.pace import Pace
from qwen_megakernel.engine.schedule import HORIZON_S, PATIENCE_S, Schedule
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.turn import Turn

PROMPT = SimpleNamespace(
    late=False,
    ended=True,
    ready=True,
    num_text_tokens=9,
    num_rows=9,
    shared=SharedRows(0, 0),
)


class Clock:
    """`time`, as the engine sees it: it stands still until a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _clock_of_the_engine(monkeypatch):
    for module in (active_turn, schedule_module):
        monkeypatch.setattr(module, "time", CLOCK)


def make_turn(lead_s: float | None, max_lead_s: float | None = 10.0) -> ActiveTurn:
    """A turn that is `lead_s` ahead of its playback; None has no frame yet."""
    request = TurnRequest(voice=None, max_lead_s=max_lead_s)
    active = ActiveTurn(Turn(lambda: None, None), request, PROMPT, lambda event: None)
    active.slot, active.prefilled = 0, True
    if lead_s is not None:
        active.num_fed = active.num_frames = 100
        active._first_audio_at = CLOCK.now + lead_s - 100 * FRAME_S
    return active


def schedule_of(turns: list[ActiveTurn]) -> Schedule:
    """A schedule that has looked at these turns, each in a slot of its own."""
    schedule = Schedule(len(turns), 8)
    for slot, turn in enumerate(turns):
        turn.slot = slot
    schedule.note(*turns)
    schedule.update()
    return schedule


def order(turns: list[ActiveTurn], most: int) -> list[int]:
    return [turns.index(chosen) for chosen in schedule_of(turns).choose(most)]


def test_whose_playback_runs_out_first_goes_first():
    turns = [make_turn(lead) for lead in (3.0, 0.5, 7.0, 0.1, 2.0)]
    assert order(turns, 3) == [3, 1, 4]
    assert sorted(order(turns, 32)) == [0, 1, 2, 3, 4]


def test_a_first_frame_goes_before_spare_lead_but_not_before_who_runs_dry():
    turns = [make_turn(0.5), make_turn(None), make_turn(-0.1), make_turn(0.001)]
    assert order(turns, 3) == [2, 3, 1]


def test_audio_that_nobody_plays_is_no_lead():
    turns = [make_turn(0.5), make_turn(0.8)]
    assert order(turns, 1) == [0]
    turns[1].turn.skip(0.3)
    turns[1].turn.skip(0.3)
    assert order(turns, 1) == [1]
    assert turns[1].plays_until(CLOCK.now) - CLOCK.now == pytest.approx(0.2)


def test_a_turn_that_is_far_enough_ahead_waits_until_it_is_not():
    turns = [make_turn(10.15), make_turn(1.0)]
    schedule = schedule_of(turns)
    assert schedule.choose(8) == turns[1:]
    assert turns[0].idle
    CLOCK.now += 0.16
    assert schedule.choose(8) == [turns[1], turns[0]]
    assert not turns[0].idle


def test_voices_that_are_far_enough_ahead_share_their_frames():
    """Each needs a frame every 80 ms, and one frame for all costs less than one for each."""
    turns = [make_turn(10.0 + n * FRAME_S / 10) for n in range(8)]
    schedule = schedule_of(turns)
    assert schedule.choose(8) == turns
    schedule = schedule_of(turns[1:])
    assert schedule.choose(8) == [], "nobody asks for a frame"
    assert schedule.wait_s(CLOCK.now) == pytest.approx(FRAME_S / 10)


def test_a_full_frame_leaves_out_who_asks_for_none():
    turns = [make_turn(10.0 + n * FRAME_S / 10) for n in range(4)] + [make_turn(9.0) for _ in range(8)]
    assert schedule_of(turns).choose(8) == turns[4:]


@pytest.mark.parametrize("num_streams", [100, 1000])
def test_turns_of_which_nothing_is_new_are_not_looked_at(num_streams, monkeypatch):
    turns = [make_turn(1.0 + n / 1000) for n in range(num_streams)]
    schedule = schedule_of(turns)
    looked_at = []
    monkeypatch.setattr(Schedule, "_look_at", lambda self, active, *_: looked_at.append(active))
    calls = [0]

    def count(frame, event, what):
        calls[0] += event in ("call", "c_call")

    schedule.note(turns[3])
    sys.setprofile(count)
    chosen = schedule.choose(32), schedule.spare_s(CLOCK.now), schedule.holds_one_more()
    sys.setprofile(None)
    assert (chosen[0], looked_at) == (turns[:32], [turns[3]])
    assert calls[0] < 5 * 32, "as many as a frame has streams, and not as many as speak"


def test_a_turn_that_has_ended_is_not_looked_at():
    schedule, turn = Schedule(1, 8), make_turn(1.0)
    turn.turn.mark_finished()
    schedule.note(turn)
    assert schedule.choose(8) == []


def test_a_slot_that_was_given_back_needs_nothing():
    turns = [make_turn(0.1), make_turn(1.0)]
    schedule = schedule_of(turns)
    schedule.note(turns[0])
    schedule.leave(turns[0], 0)
    assert schedule.choose(8) == turns[1:]
    assert schedule.spare_s(CLOCK.now) > 0.9


def test_who_has_left_its_slot_is_not_late(monkeypatch):
    turn = make_turn(1.0)
    monkeypatch.setattr(turn, "parts", SimpleNamespace(current=SimpleNamespace(late=True)))
    schedule = schedule_of([turn])
    assert schedule.late == [turn]
    schedule.leave(turn, 0)
    assert (schedule.late, schedule.unprefilled) == ([], [])


# ---------------------------------------------------------------------------- pace


def test_a_prompt_waits_while_somebody_would_run_dry():
    turns, now = [make_turn(0.2), make_turn(5.0), make_turn(None)], CLOCK.now
    schedule = schedule_of(turns)
    assert 0.1 < schedule.spare_s(now) < 0.2
    for _ in range(200):
        schedule.pace.add_tick(0.004, 2, 0)
        schedule.pace.add_tick(0.104, 2, 100)
    assert schedule.pace.tick_s == pytest.approx(0.004, rel=0.05)
    assert schedule.pace.prompt_s(100) == pytest.approx(0.1, rel=0.1)
    assert schedule_of(turns[2:]).spare_s(now) == float("inf")
    short, long = (SimpleNamespace(num_prompt_rows=n, started_at=now) for n in (10, 400))
    assert schedule.may_begin([short], 0)
    assert not schedule.may_begin([long], 0)
    assert not schedule.may_begin([short, long], 0), "whichever is chosen"
    assert not schedule.may_begin([short], 400), "those of this tick count"
    assert schedule_of(turns[2:]).may_begin([long], 400), "nobody's playback runs"
    assert not schedule.may_begin([], 0)
    long.started_at -= PATIENCE_S + 0.01
    assert schedule.may_begin([long], 0), "it has waited for long enough"
    assert not schedule.may_begin([long], 1)


def rate(seconds: float) -> float:
    """The voices of full frames of eight streams that take so long, with the share that is kept free."""
    return 0.93 * 8 * FRAME_S / seconds


def test_voices_are_known_when_a_frame_was_full():
    pace = Pace(8)
    pace.add_tick(0.002, 7, 0)
    assert pace.num_voices is None
    for _ in range(100):
        pace.add_tick(0.004, 8, 0)
    assert pace.num_voices == pytest.approx(rate(0.004))
    pace.add_tick(10.0, 8, 0)  # a pause of the machine
    assert pace.num_voices > rate(0.004) / 1.1


def test_the_voices_of_a_slow_machine_are_known_after_a_few_full_frames():
    pace = Pace(8)
    for _ in range(30):
        pace.add_tick(1.0, 8, 0)
    assert pace.num_voices == pytest.approx(rate(1.0), rel=0.5)


def test_a_few_quick_frames_let_nobody_in():
    """Ticks differ. A mean that follows them lets turns in that the engine cannot hold."""
    pace, draw = Pace(8), random.Random(1)
    for _ in range(300):
        pace.add_tick(0.006, 8, 0)
    seen = []
    for _ in range(3000):
        pace.add_tick(draw.choice((0.002, 0.010)), 8, 0)
        seen.append(pace.num_voices)
    assert max(seen) < 1.3 * rate(0.006)


def test_a_pause_in_the_first_full_frame_does_not_shut_voices_out():
    pace = Pace(8)
    pace.add_tick(10.0, 8, 0)
    assert pace.num_voices > rate(0.0105)
    for _ in range(100):
        pace.add_tick(0.001, 2, 0)  # two voices, and no full frame any more
    assert pace.num_voices > rate(0.005)


def test_one_more_voice_is_held_while_there_is_time_for_it():
    def holds(turns: list[ActiveTurn]) -> bool:
        schedule = schedule_of(turns)
        schedule.pace = pace
        return schedule.holds_one_more()

    pace, voices = Pace(8), [make_turn(0.0) for _ in range(95)]
    assert holds(voices), "nothing is known yet"
    for _ in range(1000):
        pace.add_tick(0.0064, 8, 0)
    assert pace.num_voices == pytest.approx(93, rel=0.01)
    assert holds(voices[:73])
    assert not holds(voices[:75]), "each needs two seconds of audio, and half a second of lead"
    ahead = [make_turn(HORIZON_S + 1.0) for _ in range(100)]
    assert holds([*voices[:70], *ahead]), "who is ahead needs nothing soon"
    fast = [make_turn(0.0, max_lead_s=None) for _ in range(100)]
    assert holds([*voices[:70], *fast]), "nobody listens meanwhile"
    assert holds([])
