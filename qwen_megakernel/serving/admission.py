"""Who is let in: the one place that decides about connections, and about turns that want a slot.

Connections are limited in number, in all and by address. For turns, the engine reports what it can
take. A turn that would get a slot within `max_queue_s` is let in, and is not refused later. Any
other is refused at once, with the time after which it would be let in. A session has one turn at a
time, and the engine gives slots in the order of arrival, so no connection gets two turns before
another's. (A dialect whose contexts are spoken side by side has one turn for each of them.) A
cancelled turn no longer counts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.engine.capacity import Capacity

MIN_RETRY_S = 1.0
"""Sooner than this nobody is asked to come back."""


class NotAdmitted(Exception):
    """A client that cannot be served now; `str()` of it says why. The carrier refuses the connection."""

    def __init__(self, message: str, *, own_limit: bool = False, retry_after_s: int = 5) -> None:
        """`own_limit`: the client's address has too many connections; otherwise the server is busy."""
        super().__init__(message)
        self.own_limit, self.retry_after_s = own_limit, retry_after_s


class Client(Protocol):
    """A connected client, as far as it is counted."""

    address: str | None
    """What it is counted by with others; None is counted by nothing."""

    @property
    def num_turns(self) -> int:
        """Turns that wait or speak, without cancelled ones."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the command line decides about admission."""

    max_connections: int = 64
    max_connections_per_address: int = 32
    max_turns_per_address: int = 32
    """Waiting or speaking at a time."""
    max_queue_s: float = 10.0
    """Seconds that a turn may have to wait for a slot, by prediction."""


class Admission:
    """Decides for all sessions of a server."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self._clients: set[Client] = set()
        self._by_address: defaultdict[str, set[Client]] = defaultdict(set)

    def enter(self, client: Client) -> None:
        """Count a connection until `leave`.

        Raises:
            NotAdmitted: all connections are taken, or all of its address.
        """
        limits, neighbours = self.limits, self._neighbours(client)
        if len(self._clients) >= limits.max_connections:
            raise NotAdmitted(f"all {limits.max_connections} connections are taken")
        if len(neighbours) >= limits.max_connections_per_address:
            raise NotAdmitted(
                f"this address has {limits.max_connections_per_address} connections already",
                own_limit=True,
            )
        self._clients.add(client)
        if client.address is not None:
            self._by_address[client.address].add(client)

    def leave(self, client: Client) -> None:
        """Count a connection no longer. A second call does nothing."""
        self._clients.discard(client)
        if client.address is not None:
            self._by_address[client.address].discard(client)
            if not self._by_address[client.address]:
                del self._by_address[client.address]

    def check_turn(self, client: Client, capacity: Capacity) -> None:
        """Refuse a turn that would wait too long, or that is one too many of its address.

        Raises:
            RequestError: `overloaded`, with the time to come back.
        """
        limit = self.limits.max_turns_per_address
        if sum(neighbour.num_turns for neighbour in self._neighbours(client)) >= limit:
            later_s = round(max(MIN_RETRY_S, capacity.slot_s / limit), 1)
            raise RequestError("overloaded", f"this address has {limit} turns already", later_s)
        start_s, limit_s = predicted_start_s(capacity), self.limits.max_queue_s
        if start_s > limit_s:
            raise RequestError(
                "overloaded",
                f"a turn would wait {start_s:.1f} s for a slot, and may wait {limit_s:g} s",
                round(max(MIN_RETRY_S, start_s - limit_s), 1),
            )

    def _neighbours(self, client: Client) -> set[Client]:
        if client.address is None:
            return set()
        return self._by_address.get(client.address, set())


def predicted_start_s(capacity: Capacity) -> float:
    """Seconds until a turn that is opened now gets a slot, if turns go on as they did."""
    num_before = capacity.num_queued - capacity.num_free
    if num_before < 0:
        return 0.0
    return (num_before + 1) * capacity.slot_s / capacity.num_slots
