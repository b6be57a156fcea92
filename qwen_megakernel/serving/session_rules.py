"""What a dialect promises its clients about contexts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionRules:
    """The defaults are those of contexts that follow one another."""

    max_contexts: int = 8
    """Open at a time."""
    when_full: str = "8 contexts are open on this connection"
    """The error message for a client that opens one more."""
    max_lead_s: float = 10.0
    """Seconds of audio that a context may be ahead of its playback."""
    file: bool = False
    """The client may want a whole file, as soon as it can be had. So `ServerState.max_lead_s` does not
    count."""
    side_by_side: bool = False
    """Contexts are spoken at the same time. Otherwise one follows the other."""
    one_turn: bool = False
    """A context is one turn. It is opened before it has text. It ends where its turn ends: when the
    model says so, although more text could come; when the engine has honoured a cancel; or after the
    audio before a failure. The next context is opened when this end was taken. A context that never
    became a turn has no record.

    Otherwise a context is a row of turns that lasts until `end`. The next context is opened when all
    audio of this one was generated. A cancel or a failure ends it at once, and what waits for the
    carrier is dropped."""
    idle_s: float | None = None
    """Seconds of silence after which the client wants the session to be over; the server's own limit may
    be shorter."""
    own_ids: bool = False
    """Context ids are the dialect's, and name contexts in the log. Otherwise they are a client's
    text, and the log has numbers."""
