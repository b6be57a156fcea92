"""How fast a client may send messages."""

from __future__ import annotations

BURST_S = 2.0
"""A burst may have as many messages as the rate allows in so many seconds."""


class MessageRate:
    """A token bucket. The server reads a client that is too fast more slowly, and refuses nothing."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._since = per_s, now
        self._allowed = per_s * BURST_S

    def delay_s(self, now: float) -> float:
        """Count a message. Returns the seconds to wait before the next one is read."""
        gained = (now - self._since) * self._per_s
        self._allowed = min(self._per_s * BURST_S, self._allowed + gained) - 1
        self._since = now
        return max(0.0, -self._allowed / self._per_s)
