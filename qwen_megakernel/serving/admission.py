"""Who is let in: the one place that decides about connections, and about turns that want a slot.

The number of connections is limited in all, for each address, and for each token. For turns, the engine
reports its load. A turn that would get a slot within `max_queue_s` is let in, and is not refused later.
Any other is refused at once, with the time after which it would be let in. Tokens, addresses and
connections take turns in the engine (`engine.slot_order`). So the predicted wait leaves out turns of
others that a new turn will overtake. A cancelled turn no longer counts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.engine.capacity import Capacity

MIN_RETRY_S = 1.0
"""The shortest time, in seconds, after which a client is asked to come back."""


class NotAdmitted(Exception):
    """A client cannot be served now; `str()` says why. The carrier refuses the connection."""

    def __init__(self, message: str, *, own_limit: bool = False, retry_after_s: int = 5) -> None:
        """`own_limit`: whether the client's address or token has too many connections. Otherwise the
        server is busy."""
        super().__init__(message)
        self.own_limit, self.retry_after_s = own_limit, retry_after_s


class Client(Protocol):
    """A connected client: what decides how it is counted."""

    address: str | None
    """The address that it counts under; None counts under no address."""
    token: str | None
    """The name of the token that it counts under; None counts under no token."""

    @property
    def num_turns(self) -> int:
        """Turns that wait or speak, without cancelled ones."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits that the command line sets."""

    max_connections: int = 64
    max_connections_per_address: int = 32
    max_turns_per_address: int = 32
    """Turns that wait or speak at a time."""
    max_connections_per_token: int = 0
    """0 is no limit, here and in the next field."""
    max_turns_per_token: int = 0
    max_queue_s: float = 10.0
    """The longest predicted wait for a slot, in seconds, with which a turn is let in."""


@dataclass(frozen=True, slots=True)
class _Account:
    """An address or a token, and the limits that its clients share; 0 is no limit."""

    kind: str
    key: str
    max_connections: int
    max_turns: int


class Admission:
    """Decides for all sessions of a server."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self._clients: set[Client] = set()
        self._by_account: defaultdict[_Account, set[Client]] = defaultdict(set)

    def enter(self, client: Client) -> None:
        """Count a connection until `leave`.

        Raises:
            NotAdmitted: the server, the address or the token has no connection left.
        """
        if len(self._clients) >= self.limits.max_connections:
            raise NotAdmitted(f"all {self.limits.max_connections} connections are taken")
        accounts = self._accounts(client)
        for account in accounts:
            if 0 < account.max_connections <= len(self._by_account.get(account, ())):
                raise NotAdmitted(
                    f"this {account.kind} has {account.max_connections} connections already",
                    own_limit=True,
                )
        self._clients.add(client)
        for account in accounts:
            self._by_account[account].add(client)

    def leave(self, client: Client) -> None:
        """Stop counting a connection. A second call does nothing."""
        self._clients.discard(client)
        for account in self._accounts(client):
            self._by_account[account].discard(client)
            if not self._by_account[account]:
                del self._by_account[account]

    def check_turn(self, client: Client, capacity: Capacity) -> None:
        """Refuse a turn that would wait too long, or that is one too many of its address or its token.

        Raises:
            RequestError: `overloaded`, with the time to come back.
        """
        for account in self._accounts(client):
            limit, clients = account.max_turns, self._by_account.get(account, ())
            if 0 < limit <= sum(other.num_turns for other in clients):
                later_s = round(max(MIN_RETRY_S, capacity.slot_s / limit), 1)
                raise RequestError(
                    "overloaded", f"this {account.kind} has {limit} turns already", later_s
                )
        start_s, limit_s = predicted_start_s(capacity), self.limits.max_queue_s
        if start_s > limit_s:
            raise RequestError(
                "overloaded",
                f"a turn would wait {start_s:.1f} s for a slot, and may wait {limit_s:g} s",
                round(max(MIN_RETRY_S, start_s - limit_s), 1),
            )

    def _accounts(self, client: Client) -> list[_Account]:
        """The accounts that a client counts under."""
        limits, accounts = self.limits, []
        if client.address is not None:
            most = (limits.max_connections_per_address, limits.max_turns_per_address)
            accounts.append(_Account("address", client.address, *most))
        if client.token is not None:
            most = (limits.max_connections_per_token, limits.max_turns_per_token)
            accounts.append(_Account("token", client.token, *most))
        return accounts


def predicted_start_s(capacity: Capacity) -> float:
    """Seconds until a turn that is opened now gets a slot, by the mean time that turns keep theirs."""
    num_before = capacity.num_queued - capacity.num_free
    if num_before < 0:
        return 0.0
    return (num_before + 1) * capacity.slot_s / capacity.num_slots
