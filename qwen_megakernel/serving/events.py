"""What a session tells its client: typed events, which a dialect puts into its own messages.

A context gives `ContextStarted`, then `ContextAudio` and `SegmentDone`, then one `ContextDone` or
`ContextFailed`. One that has no audio ends without `ContextStarted`. Nothing of a context follows
its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_megakernel.turn import ErrorCode, FinishReason

ContextState = Literal["queued", "waiting_for_text", "speaking"]
SessionEnd = Literal["closed", "going_away", "idle", "protocol_error", "server_failed"]
"""`closed`: the client has asked for it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of a context."""

    num_samples: int
    """Handed to the carrier, at 24 kHz."""
    generation_s: float
    """Seconds of work on its audio."""
    ttfc_s: float | None
    """From the first text, or from when the context's turn came, to the first audio handed to the
    carrier; None without audio."""
    rtf: float | None
    """Work over all audio that was generated, lower is better; None without audio."""
    trimmed_s: float | None = None
    """Seconds of silence before the first sound that were left out; None where none may be."""


@dataclass(frozen=True, slots=True)
class ContextStarted:
    """The context's first audio follows."""

    context_id: str


@dataclass(frozen=True, slots=True)
class ContextAudio:
    """A chunk of speech."""

    context_id: str
    samples: np.ndarray
    """float32 [n] in [-1, 1], 24 kHz mono."""


@dataclass(frozen=True, slots=True)
class SegmentDone:
    """All audio of a segment was given; times are seconds of the context's audio."""

    context_id: str
    index: int
    start_s: float
    duration_s: float
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class ContextDone:
    """The context is over."""

    context_id: str
    reason: FinishReason
    """`error` is told by `ContextFailed`."""
    figures: Figures


@dataclass(frozen=True, slots=True)
class ContextFailed:
    """The context is over because it could not be spoken, or not to its end."""

    context_id: str
    code: ErrorCode
    message: str
    """One line, fit for the client."""
    begun: bool
    """Whether a turn was opened for it."""
    figures: Figures
    retry_after_s: float | None = None
    """Seconds after which it may be tried again, where that is known."""


@dataclass(frozen=True, slots=True)
class ContextQuiet:
    """Nothing was given for an open context for a second."""

    context_id: str
    state: ContextState
    num_before: int
    """Open contexts before it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A dialect's own message; it keeps its place among the events."""

    message: str | bytes
    """As the carrier sends it."""


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The server can speak nothing more. `SessionOver` follows."""

    code: ErrorCode
    message: str
    """One line, fit for the client."""


@dataclass(frozen=True, slots=True)
class SessionOver:
    """The last event: the carrier is to close."""

    reason: SessionEnd


ContextEvent = (
    ContextStarted | ContextAudio | SegmentDone | ContextDone | ContextFailed | ContextQuiet
)  # fmt: skip
SessionEvent = ContextEvent | SessionFailed | Reply | SessionOver
