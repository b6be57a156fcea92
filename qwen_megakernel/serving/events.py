"""The typed events that a session gives its client. A dialect translates them into messages.

A context gives `ContextStarted`, then `ContextAudio` and `SegmentDone`, then one `ContextDone` or
`ContextFailed`. A context without audio ends without `ContextStarted`. No event of a context follows
its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_megakernel.turn import ErrorCode, FinishReason

ContextState = Literal["queued", "waiting_for_text", "speaking"]
SessionEnd = Literal["closed", "going_away", "idle", "protocol_error", "refused", "server_failed"]
"""`closed` means that the client has asked for the end, `refused` that its text cannot be spoken."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a context."""

    num_samples: int
    """Samples that the carrier has taken, at 24 kHz."""
    generation_s: float
    """Seconds of work on its audio."""
    ttfc_s: float | None
    """Seconds from the first text, or from the moment when the context may speak if that is later, to
    the first audio that the carrier took; None without audio."""
    rtf: float | None
    """Seconds of work per second of generated audio; None without audio."""
    trimmed_s: float | None = None
    """Seconds of silence that were left out before the first sound; None if the silence is kept."""


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
    """Never `error`: that is `ContextFailed`."""
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
    """Seconds after which the client may try again, if known."""


@dataclass(frozen=True, slots=True)
class ContextQuiet:
    """An open context has given no event for a second."""

    context_id: str
    state: ContextState
    num_before: int
    """Open contexts before it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A message of the dialect's own. It keeps its place among the events."""

    message: str | bytes
    """The message as the carrier sends it."""


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The server can speak no more. `SessionOver` follows."""

    code: ErrorCode
    message: str
    """One line, fit for the client."""


@dataclass(frozen=True, slots=True)
class SessionOver:
    """The last event. The carrier must close."""

    reason: SessionEnd


ContextEvent = (
    ContextStarted | ContextAudio | SegmentDone | ContextDone | ContextFailed | ContextQuiet
)  # fmt: skip
SessionEvent = ContextEvent | SessionFailed | Reply | SessionOver
