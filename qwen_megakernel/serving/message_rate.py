"""How fast a client may send messages."""

from __future__ import annotations

BURST_S = 2.0
"""Seconds' worth of messages that may come at once."""


class MessageRate:
    """A token bucket. A client that is too fast is not read for a while; nothing of it is refused."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._since = per_s, now
        self._allowed = per_s * BURST_S

    def delay_s(self, now: float) -> float:
        """Count a message: seconds to wait before the next is read."""
        gained = (now - self._since) * self._per_s
        self._allowed = min(self._per_s * BURST_S, self._allowed + gained) - 1
        self._since = now
        return max(0.0, -self._allowed / self._per_s)
