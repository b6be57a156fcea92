"""Admission: a turn waits if it will begin soon enough, and is refused at once if not."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_stage import Stage, run_at_once

from qwen_megakernel.engine.capacity import Capacity, SlotClock
from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.admission import (
    Admission,
    AdmissionLimits,
    NotAdmitted,
    predicted_start_s,
)
from qwen_megakernel.serving.events import ContextFailed, SegmentDone, SessionOver
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.turn import RequestError

FREE = Capacity(num_slots=4, num_free=4, num_queued=0, slot_s=2.0)
LOADS = st.builds(
    Capacity,
    num_slots=st.integers(1, 64),
    num_free=st.integers(0, 64),
    num_queued=st.integers(0, 1000),
    slot_s=st.floats(0.01, 200),
)


class Caller:
    """A connection with turns."""

    def __init__(self, address, num_turns=0, token=None):
        self.address, self.num_turns, self.token = address, num_turns, token


def refusal(admission: Admission, caller: Caller, load: Capacity) -> RequestError | None:
    try:
        admission.check_turn(caller, load)
    except RequestError as refused:
        return refused
    return None


# --- one decision -----------------------------------------------------------------------------------


@given(LOADS, st.floats(0, 100))
def test_a_turn_is_let_in_exactly_if_it_will_begin_in_time(load, limit_s):
    start_s = predicted_start_s(load)
    assert (start_s == 0) == (load.num_free > load.num_queued)
    refused = refusal(Admission(AdmissionLimits(max_queue_s=limit_s)), Caller(None), load)
    assert (refused is None) == (start_s <= limit_s)
    if refused is not None:
        assert refused.code == "overloaded"
        assert refused.retry_after_s >= 1
        assert refused.retry_after_s >= start_s - limit_s - 0.05


@pytest.mark.parametrize(
    ("load", "start_s"),
    [
        (Capacity(16, 1, 0, 3.2), 0.0),
        (Capacity(16, 1, 1, 3.2), 0.2),  # the next slot of sixteen
        (Capacity(16, 0, 15, 3.2), 3.2),
        (Capacity(1, 0, 2, 3.2), 9.6),
    ],
)
def test_the_prediction_is_the_queue_over_the_rate_of_slots(load, start_s):
    assert predicted_start_s(load) == pytest.approx(start_s)


# --- the time that turns keep a slot ----------------------------------------------------------------


@given(st.integers(1, 64), st.floats(0.1, 100))
def test_the_mean_follows_what_turns_take(num_slots, held_s):
    clock = SlotClock(num_slots)
    for _ in range(30 * num_slots + 100):
        clock.add(held_s)
    assert clock.mean_s([]) == pytest.approx(held_s, rel=0.05, abs=0.05)
    assert clock.mean_s([held_s]) > clock.mean_s([])


def test_turns_that_never_end_are_noticed():
    clock = SlotClock(4)
    for _ in range(100):
        clock.add(1.0)
    assert clock.mean_s([60.0] * 4) > 10


# --- a server of slots ------------------------------------------------------------------------------


class Slots:
    """Turns of known length on slots that are given in the order of arrival, in simulated time."""

    def __init__(self, num_slots: int, turn_s: float) -> None:
        self.num_slots, self.turn_s = num_slots, turn_s
        self.queue: deque[tuple[float, int]] = deque()
        """For each waiting turn, when it was let in, and its client."""
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.owners: list[int] = []
        """The owners of the turns, in the order in which they began."""

    def go_on_to(self, now: float) -> None:
        while self.ends and self.ends[0] <= now:
            self._begin(heapq.heappop(self.ends))

    def _begin(self, now: float) -> None:
        while self.queue and len(self.ends) < self.num_slots:
            arrival, owner = self.queue.popleft()
            self.waits.append(now - arrival)
            self.owners.append(owner)
            heapq.heappush(self.ends, now + self.turn_s)

    def open(self, now: float, owner: int = 0) -> None:
        self.queue.append((now, owner))
        self._begin(now)

    def capacity(self) -> Capacity:
        num_free = self.num_slots - len(self.ends)
        return Capacity(self.num_slots, num_free, len(self.queue), self.turn_s)


@settings(max_examples=200)
@given(
    st.integers(1, 20),
    st.floats(0.1, 5),
    st.floats(0, 20),
    st.lists(st.floats(0, 2), min_size=1, max_size=150),
)
def test_who_is_let_in_begins_in_time_and_nobody_starves(num_slots, turn_s, limit_s, gaps):
    slots, admission = Slots(num_slots, turn_s), Admission(AdmissionLimits(max_queue_s=limit_s))
    now, predicted, returns = 0.0, [], []
    for gap in gaps:
        now += gap
        slots.go_on_to(now)
        refused = refusal(admission, Caller(None), slots.capacity())
        if refused is None:
            predicted.append(predicted_start_s(slots.capacity()))
            slots.open(now)
        else:
            returns.append(now + refused.retry_after_s)
            assert slots.queue or len(slots.ends) == num_slots, "refused beside a free slot"
    slots.go_on_to(now + 10_000)
    # Slots may become free in bunches, so a turn may begin so much later than predicted.
    for waited_s, start_s in zip(slots.waits, predicted, strict=True):  # in the order of arrival
        assert waited_s <= start_s + turn_s + 1e-6
        assert start_s <= limit_s
    if returns:  # no turn came after the last refusal, so its hint is right
        assert max(returns) - now <= (len(predicted) + 1) * turn_s + 1


@given(st.integers(1, 8), st.integers(2, 30), st.integers(1, 60))
def test_each_connection_has_its_share(num_slots, num_clients, rounds):
    """Greedy connections, each with a turn at all times: none gets two turns more than another."""
    slots = Slots(num_slots, 1.0)
    for owner in range(num_clients):
        slots.open(0.0, owner)
    for second in range(1, rounds + 1):
        before = len(slots.owners)
        ended = slots.owners[max(0, before - len(slots.ends)) : before]
        slots.go_on_to(float(second))
        for owner in ended:
            slots.open(float(second), owner)
    shares = [slots.owners.count(owner) for owner in range(num_clients)]
    assert max(shares) - min(shares) <= 1


# --- sessions ---------------------------------------------------------------------------------------


def test_a_full_server_refuses_a_context_and_says_when_to_come_back():
    async def play():
        stage = Stage()
        stage.decoder.load = Capacity(num_slots=4, num_free=0, num_queued=31, slot_s=2.0)
        stage.session.append("a", "Word.")
        (failed,) = await stage.events()
        assert isinstance(failed, ContextFailed)
        assert (failed.code, failed.retry_after_s, failed.begun) == ("overloaded", 6.0, False)
        assert stage.turns == []
        stage.decoder.load = Capacity(num_slots=4, num_free=0, num_queued=3, slot_s=2.0)
        stage.session.append("b", "Word.")
        assert len(stage.turns) == 1
        assert stage.refused == ["turn"]

    run_at_once(play())


def test_a_context_that_was_let_in_is_spoken_to_its_end():
    async def play():
        stage = Stage()
        for text in ("One.", "Two."):
            stage.session.append("a", text)
            stage.session.flush("a")
        stage.decoder.load = Capacity(num_slots=4, num_free=0, num_queued=500, slot_s=2.0)
        stage.turns[0].speak()
        stage.turns[0].finish()
        await asyncio.sleep(0)
        assert [turn.text for turn in stage.turns] == ["One.", "Two."]
        assert SegmentDone in await stage.kinds()

    run_at_once(play())


# --- connections and addresses ----------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans()), max_size=60),
)
def test_connections_never_exceed_their_limits(total, each, steps):
    admission = Admission(AdmissionLimits(max_connections=total, max_connections_per_address=each))
    inside: list[Caller] = []
    for address, leaves in steps:
        if leaves and inside:
            caller = inside.pop(0)
            admission.leave(caller)
            admission.leave(caller)
            continue
        caller, of_address = Caller(address), sum(c.address == address for c in inside)
        full, own = len(inside) >= total, address is not None and of_address >= each
        if full or own:
            with pytest.raises(NotAdmitted) as refused:
                admission.enter(caller)
            assert refused.value.own_limit == (own and not full)
        else:
            admission.enter(caller)
            inside.append(caller)
    for caller in inside:
        admission.leave(caller)
    assert not admission._by_account
    assert not admission._clients


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 10))
def test_turns_of_an_address_never_exceed_their_limit(turns, limit):
    admission = Admission(AdmissionLimits(max_turns_per_address=limit))
    callers = [Caller("a", number) for number in turns]
    stranger, local = Caller("b"), Caller(None, 100)
    for caller in (*callers, stranger, local):
        admission.enter(caller)
    refused = refusal(admission, callers[0], FREE)
    assert (refused is not None) == (sum(turns) >= limit)
    if refused is not None:
        assert refused.retry_after_s >= 1
    assert refusal(admission, stranger, FREE) is None
    assert refusal(admission, local, FREE) is None


def test_a_cancelled_turn_does_not_count():
    async def play():
        stage = Stage()
        stage.session.append("a", "Word.")
        assert stage.session.num_turns == 1
        stage.session.cancel("a")
        assert stage.session.num_turns == 0  # although the engine has not answered

    run_at_once(play())


@pytest.mark.parametrize(("silent_s", "gives_way"), [(1e6, True), (1.0, False)])
def test_a_silent_connection_gives_way_where_all_are_taken(silent_s, gives_way):
    async def play():
        server, admission = Stage().server, Admission(AdmissionLimits(max_connections=2))
        sessions = OpenSessions(admission, lambda: server)
        with ExitStack() as stack:
            first, silent = (stack.enter_context(sessions.admit(None)) for _ in range(2))
            silent._active_at -= silent_s
            if not gives_way:
                with pytest.raises(NotAdmitted):
                    stack.enter_context(sessions.admit(None))
                assert sessions._sessions == {first, silent}
                return
            third = stack.enter_context(sessions.admit(None))
            assert await silent.take() == [SessionOver("idle")]
            assert sessions._sessions == admission._clients == {first, third}
            with pytest.raises(NotAdmitted):
                stack.enter_context(sessions.admit(None))
        assert not sessions._sessions
        assert not admission._clients

    run_at_once(play())


def test_a_refused_connection_leaves_no_timer_behind():
    async def play():
        server, admission = Stage(idle_s=600).server, Admission(AdmissionLimits(max_connections=0))
        before = len(asyncio.get_running_loop()._scheduled)
        with pytest.raises(NotAdmitted), OpenSessions(admission, lambda: server).admit(None):
            pass
        timers = asyncio.get_running_loop()._scheduled[before:]
        assert all(timer.cancelled() for timer in timers)

    run_at_once(play())


@pytest.mark.parametrize(
    ("peer", "counted_by"),
    [
        (None, None),
        (("127.0.0.1", 1), None),
        (("127.9.9.9", 1), None),
        (("::1", 1), None),
        (("::ffff:127.0.0.1", 1), None),
        (("203.0.113.7", 5), "203.0.113.7"),
        (("::ffff:203.0.113.7", 5), "203.0.113.7"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::9", 5), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5), "fe80::/64"),
        (("unknown", 0), "unknown"),
    ],
)
def test_clients_are_counted_by_their_address(peer, counted_by):
    assert client_address(peer) == counted_by
