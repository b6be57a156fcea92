"""Who gets the next slot: owners take turns, and turns with enough text come first."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_megakernel.engine.slot_order import SlotOrder, num_before


@dataclass(eq=False)
class Waiting:
    """A turn without a slot."""

    owner: tuple = ()
    ready: bool = True
    scant: bool = False


def grants(order, waiting, num_free=1):
    """The owners that get a slot, one after the other, until no turn can get one."""
    waiting, found = list(waiting), []
    while (turn := order.choose(waiting, num_free)) is not None:
        waiting.remove(turn)
        found.append(turn.owner)
    return found


OWNERS = st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=40)


def test_turns_of_nobody_get_slots_in_the_order_of_arrival():
    waiting = [Waiting() for _ in range(5)]
    order = SlotOrder(1)
    for turn in waiting:
        assert order.choose(waiting[waiting.index(turn) :], 1) is turn


def test_a_turn_without_text_gets_no_slot():
    assert SlotOrder(1).choose([Waiting(ready=False)], 1) is None
    assert SlotOrder(1).choose([Waiting()], 0) is None


def test_one_turn_of_an_owner_does_not_wait_for_all_of_another():
    greedy = [Waiting(("t", "greedy", number)) for number in range(30)]
    other = Waiting(("t", "other", 99))
    assert grants(SlotOrder(1), [*greedy, other]).index(other.owner) == 1


def test_tokens_take_turns_before_their_addresses_do():
    many = [Waiting(("many", address, 0)) for address in range(20)]
    one = [Waiting(("one", 0, number)) for number in range(5)]
    first = grants(SlotOrder(1), [*many, *one])[:10]
    assert Counter(owner[0] for owner in first) == {"many": 5, "one": 5}


@settings(max_examples=200)
@given(OWNERS)
def test_accounts_that_wait_get_the_same_number_of_slots(owners):
    """At every level, until one of them has no turn left."""
    waiting, order, got = [Waiting(owner) for owner in owners], SlotOrder(1), Counter()
    while waiting:
        turn = order.choose(waiting, 1)
        waiting.remove(turn)
        got[turn.owner[:1]] += 1
        still = {other.owner[:1] for other in waiting}
        shares = [got[account] for account in still]
        assert not shares or max(shares) - min(shares) <= 1
    assert sum(got.values()) == len(owners)


def test_an_owner_that_comes_again_does_not_pass_those_that_wait():
    """A client that opens a new connection for each turn gains nothing."""
    order, patient = SlotOrder(1), Waiting(("patient",))
    waiting = [Waiting(("old",)), patient]
    for number in range(3):
        waiting.append(Waiting((f"new {number}",)))
        turn = order.choose(waiting, 1)
        waiting.remove(turn)
        if turn is patient:
            break
    assert number == 1


@settings(max_examples=200)
@given(st.tuples(*[st.integers(0, 3)] * 3), OWNERS)
def test_the_prediction_counts_the_turns_that_come_first(owner, owners):
    new = Waiting(owner)
    order = SlotOrder(1)
    waiting = [Waiting(other) for other in owners]
    order._update(waiting)  # these wait before the new turn comes
    place = 0
    waiting.append(new)
    while (turn := order.choose(waiting, 1)) is not new:
        waiting.remove(turn)
        place += 1
    assert place <= num_before(owner, owners)
    assert num_before((), owners) == len(owners)


# --- scant text -------------------------------------------------------------------------------------


def test_turns_with_enough_text_come_before_those_with_scant_text():
    scant = [Waiting(("a",), scant=True), Waiting(("b",), scant=True)]
    enough = [Waiting(("c",)), Waiting(("d",))]
    assert [o for (o,) in grants(SlotOrder(1), [*scant, *enough])] == ["c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("num_slots", "num_free", "gets"), [(16, 4, False), (16, 5, True), (3, 1, True)]
)
def test_the_last_quarter_of_the_slots_is_for_turns_with_enough_text(num_slots, num_free, gets):
    assert (SlotOrder(num_slots).choose([Waiting(scant=True)], num_free) is not None) == gets
    assert SlotOrder(num_slots).choose([Waiting()], 1) is not None


@pytest.mark.parametrize(
    ("num_free", "enough", "scant", "missing"),
    [
        (0, 0, 0, 0),
        (0, 3, 0, 3),
        (2, 3, 0, 1),
        (4, 3, 0, 0),
        (0, 0, 30, 1),  # one at a time
        (4, 0, 30, 1),  # the last quarter stays free
        (5, 0, 1, 0),  # it gets the fifth
        (5, 1, 1, 1),
        (0, 3, 30, 3),
    ],
)
def test_slots_are_missing_for_each_turn_with_enough_text(num_free, enough, scant, missing):
    waiting = [Waiting()] * enough + [Waiting(scant=True)] * scant + [Waiting(ready=False)]
    assert SlotOrder(16).num_missing(waiting, num_free) == missing


def test_turns_of_nobody_are_an_account_of_their_own():
    assert num_before(("token", "address"), [(), (), ("token", "other"), ("token", "address")]) == 4
    assert num_before(("token",), [()] * 9) == 1
