"""Which turn decodes next, whether a prompt may go first, and how many voices the engine can hold."""

from __future__ import annotations

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
    next_text_row=lambda: "a row",
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


def order(turns: list[ActiveTurn], most: int) -> list[int]:
    schedule = Schedule(most)
    schedule.note(*turns)
    return [turns.index(chosen) for chosen in schedule.choose(turns, most)]


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
    assert turns[1].lead_s(CLOCK.now) == pytest.approx(0.2)


def test_a_turn_that_is_far_enough_ahead_waits_until_it_is_not():
    schedule, turns = Schedule(8), [make_turn(10.05), make_turn(1.0)]
    schedule.note(*turns)
    assert schedule.choose(turns, 8) == turns[1:]
    assert turns[0].idle
    CLOCK.now += 0.06
    assert schedule.choose(turns, 8) == [turns[1], turns[0]]
    assert not turns[0].idle


@pytest.mark.parametrize("num_streams", [100, 1000])
def test_turns_of_which_nothing_is_new_are_not_looked_at(num_streams, monkeypatch):
    schedule, turns = Schedule(32), [make_turn(1.0 + n / 1000) for n in range(num_streams)]
    schedule.note(*turns)
    schedule.choose(turns, 32)
    refreshed: list[ActiveTurn] = []
    monkeypatch.setattr(ActiveTurn, "refresh", lambda self, now: refreshed.append(self))
    schedule.note(turns[3])
    assert schedule.choose(turns, 32) == turns[:32]
    assert refreshed == [turns[3]]


def test_a_turn_that_has_ended_is_not_looked_at():
    schedule, turn = Schedule(8), make_turn(1.0)
    turn.turn.mark_finished()
    schedule.note(turn)
    assert schedule.choose([], 8) == []


# ---------------------------------------------------------------------------- pace


def test_a_prompt_waits_while_somebody_would_run_dry():
    schedule, turns = Schedule(8), [make_turn(0.2), make_turn(5.0), make_turn(None)]
    schedule.note(*turns)
    schedule.choose(turns, 32)
    now = CLOCK.now
    assert 0.1 < schedule.spare_s(turns, now) < 0.2
    for _ in range(200):
        schedule.pace.add_tick(0.004, 2, 0)
        schedule.pace.add_tick(0.104, 2, 100)
    assert schedule.pace.tick_s == pytest.approx(0.004, rel=0.05)
    assert schedule.pace.prompt_s(100) == pytest.approx(0.1, rel=0.1)
    assert schedule.spare_s([turns[2]], now) == float("inf")
    short, long = (SimpleNamespace(num_prompt_rows=n, started_at=now) for n in (10, 400))
    assert schedule.may_begin([short], turns, 0)
    assert not schedule.may_begin([long], turns, 0)
    assert not schedule.may_begin([short, long], turns, 0), "whichever is chosen"
    assert not schedule.may_begin([short], turns, 400), "those of this tick count"
    assert schedule.may_begin([long], [turns[2]], 400), "nobody's playback runs"
    assert not schedule.may_begin([], turns, 0)
    long.started_at -= PATIENCE_S + 0.01
    assert schedule.may_begin([long], turns, 0), "it has waited for long enough"
    assert not schedule.may_begin([long], turns, 1)


def test_voices_are_known_when_a_frame_was_full():
    pace = Pace(8)
    pace.add_tick(0.002, 7, 0)
    assert pace.num_voices is None
    for _ in range(100):
        pace.add_tick(0.004, 8, 0)
    assert pace.num_voices == pytest.approx(0.95 * 8 * FRAME_S / 0.004)
    pace.add_tick(10.0, 8, 0)  # a pause of the machine
    assert pace.num_voices > 0.95 * 8 * FRAME_S / 0.004 / 1.5


def test_a_pause_in_the_first_full_frame_does_not_shut_voices_out():
    pace = Pace(8)
    pace.add_tick(10.0, 8, 0)
    assert pace.num_voices < 1
    for _ in range(100):
        pace.add_tick(0.004, 2, 0)  # two voices, and no full frame any more
    assert pace.num_voices == pytest.approx(0.95 * 8 * FRAME_S / 0.016, rel=0.02)


def test_one_more_voice_is_held_while_there_is_time_for_it():
    schedule = Schedule(8)
    voices = [make_turn(0.0) for _ in range(200)]
    for voice in voices:
        voice.refresh(CLOCK.now)
    assert schedule.holds_one_more(voices), "nothing is known yet"
    for _ in range(100):
        schedule.pace.add_tick(0.0064, 8, 0)  # 95 voices
    assert schedule.pace.num_voices == pytest.approx(95, rel=0.01)
    assert schedule.holds_one_more(voices[:93])
    assert not schedule.holds_one_more(voices[:95])
    ahead = [make_turn(HORIZON_S + 1.0) for _ in range(100)]
    assert schedule.holds_one_more([*voices[:90], *ahead]), "who is ahead needs nothing soon"
    fast = [make_turn(0.0, max_lead_s=None) for _ in range(100)]
    assert schedule.holds_one_more([*voices[:90], *fast]), "nobody listens meanwhile"
    assert schedule.holds_one_more([])
