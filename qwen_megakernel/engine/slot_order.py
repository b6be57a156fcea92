"""Who gets the next slot, and how many slots are missing.

A turn has enough text if its text is complete, or if it has `ENOUGH_TOKENS`. Such turns come before
the others, which would stop after a few frames and hold a slot without using it. The last quarter of
the slots is for turns with enough text alone.

Among equals, owners take turns. An owner is a path, from the widest account to the narrowest: a token,
an address, a connection. Accounts of one level take turns, and so do the accounts within each of
them. An account whose first turn begins to wait joins behind those that have one waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeVar

ENOUGH_TOKENS = 8
"""Tokens with which a turn has enough text: about two seconds of speech."""

Owner = tuple[Hashable, ...]
"""Whom a turn is for, from the widest account to the narrowest; () is nobody in particular."""


class WaitingTurn(Protocol):
    """A turn without a slot: what decides its place in the queue."""

    @property
    def owner(self) -> Owner:
        """Whom the turn is for."""

    @property
    def ready(self) -> bool:
        """Whether it has the text that its first frame needs."""

    @property
    def scant(self) -> bool:
        """Whether it does not have enough text."""


AnyTurn = TypeVar("AnyTurn", bound=WaitingTurn)


@dataclass(slots=True)
class _Account:
    """A token, an address or a connection that has a turn waiting."""

    place: int
    """Among the accounts beside it; the lowest is next."""
    seen: int = 0
    """The last round in which it had a turn waiting."""
    children: dict[Hashable, _Account] = field(default_factory=dict)


class SlotOrder:
    """The order of the turns that wait for the slots of one engine."""

    def __init__(self, num_slots: int) -> None:
        self._num_reserved = num_slots // 4
        """Slots that only turns with enough text get."""
        self._accounts: dict[Hashable, _Account] = {}
        self._round = 0
        self._numbers = count()

    def choose(self, waiting: Sequence[AnyTurn], num_free: int) -> AnyTurn | None:
        """The turn that gets a free slot now, if any. Its owner joins behind the others."""
        if not num_free:
            return None
        ready = [turn for turn in waiting if turn.ready]
        self._update(ready)
        candidates = [turn for turn in ready if not turn.scant]
        if not candidates and num_free > self._num_reserved:
            candidates = ready
        if not candidates:
            return None
        accounts, level = self._accounts, 0
        while (chosen := next((t for t in candidates if len(t.owner) == level), None)) is None:
            name = min({t.owner[level] for t in candidates}, key=lambda name: accounts[name].place)
            candidates = [t for t in candidates if t.owner[level] == name]
            accounts[name].place = next(self._numbers)
            accounts, level = accounts[name].children, level + 1
        return chosen

    def _update(self, ready: Sequence[WaitingTurn]) -> None:
        """Add accounts that have a turn waiting now, and forget those that have none."""
        self._round += 1
        for turn in ready:
            accounts = self._accounts
            for name in turn.owner:
                account = accounts.get(name)
                if account is None:
                    account = accounts[name] = _Account(next(self._numbers))
                account.seen, accounts = self._round, account.children
        self._forget(self._accounts)

    def _forget(self, accounts: dict[Hashable, _Account]) -> None:
        for name in [name for name, account in accounts.items() if account.seen < self._round]:
            del accounts[name]
        for account in accounts.values():
            if account.children:
                self._forget(account.children)

    def num_missing(self, waiting: Sequence[WaitingTurn], num_free: int) -> int:
        """The number of slots that must be given back for turns that wait.

        Each turn with enough text needs one, unless one is free. Turns with scant text get one at a
        time. Otherwise they would all speak at once, and turns with enough text would wait for them.
        """
        ready = [turn for turn in waiting if turn.ready]
        num_enough = sum(not turn.scant for turn in ready)
        num_missing = max(0, num_enough - num_free)
        if len(ready) > num_enough and num_free - num_enough <= self._num_reserved:
            return max(1, num_missing)
        return num_missing


def num_before(owner: Owner, queue: Iterable[Owner]) -> int:
    """The number of waiting turns that get a slot before a new turn of `owner`.

    Args:
        owner: the owner of the new turn.
        queue: owners of the turns that wait and have enough text.
    """
    same, others = 0, [Counter[Owner]() for _ in owner]
    for other, num_turns in Counter(queue).items():
        for level in range(len(owner)):
            if other[level : level + 1] != owner[level : level + 1]:  # it may be nobody's: ()
                others[level][other[level : level + 1]] += num_turns
                break
        else:
            same += num_turns
    before = same
    for counts in reversed(others):  # accounts of one level take turns
        before += sum(min(num, before + 1) for num in counts.values())
    return before
