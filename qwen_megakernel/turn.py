"""A turn: one utterance as everything above the engine sees it.

Text goes in by `append`, `flush`, `end`; events come out of the `sink`; `cancel` stops it at
the next frame. Every wire dialect, `TTSDecoder.stream` and the tests are thin layers over this.
Thread-safe; no torch, no asyncio.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.surrogates import SurrogateJoiner

FinishReason = Literal["stop", "length", "repeat", "silence", "cancelled", "error"]
ErrorCode = Literal[
    "bad_request", "unknown_context", "unknown_voice", "unknown_language", "text_too_long", "overloaded",
    "unsupported", "internal",
]  # fmt: skip


class RequestError(ValueError):
    """A request that cannot be served: one line that says what was given and what is allowed."""

    def __init__(self, code: ErrorCode, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: seconds after which the same request may be served, where that is known."""
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s


@dataclass(frozen=True, slots=True)
class Started:
    """The turn has left the queue and holds a slot."""


@dataclass(frozen=True, slots=True)
class Audio:
    """A chunk of speech, handed out as soon as it exists."""

    samples: np.ndarray
    """float32 [n] in [-1, 1], 24 kHz mono; n is a multiple of 1920."""
    generation_s: float = 0.0
    """As in `Finished`, up to here."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every turn; no audio follows it."""

    reason: FinishReason
    num_frames: int
    num_samples: int
    generation_s: float
    """First text accepted -> end, less the time in which the turn waited for text or was ahead."""
    error: str | None = None
    """Why it failed, in one line; or, of the reason `length`, that the speech was cut off although the
    caller had set no `max_frames`."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio handed out."""
        return self.num_samples / SAMPLE_RATE

    @property
    def rtf(self) -> float | None:
        """Real-time factor: generation over duration, lower is better; None without audio."""
        return self.generation_s / self.duration_s if self.num_samples else None


TurnEvent = Started | Audio | Finished
Sink = Callable[[TurnEvent], None]
"""Takes a turn's events, in order, on the engine's thread: it must hand over, not work."""


@dataclass(frozen=True, slots=True)
class Append:
    """More text."""

    text: str


@dataclass(frozen=True, slots=True)
class Flush:
    """Commit text that was held back because a longer text could tokenise differently."""


@dataclass(frozen=True, slots=True)
class End:
    """No more text."""


TextCommand = Append | Flush | End


class Turn:
    """Handle of one utterance, made by `Engine.open_turn`.

    `append`, `flush`, `end`, `hold` and `cancel` may be called from any thread and never block on
    decoding. `take_commands` and `mark_finished` are the engine's side.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._commands: deque[TextCommand] = deque()
        self._surrogates = SurrogateJoiner()
        self._ended = False
        self._cancelled = False
        self._held = False
        self._finished = False
        self.first_text_at: float | None = None
        """`time.monotonic()` of the first text: where the turn's clocks start."""

    def append(self, text: str) -> None:
        """Add text after what was given so far.

        A surrogate pair may be split between two texts. A half that is alone is taken for U+FFFD.

        Raises:
            RequestError: after `end`.
        """
        self._command(Append(text))

    def flush(self) -> None:
        """Speak what is held back at an unstable boundary (see `prompt.TextFeed`)."""
        self._command(Flush())

    def end(self) -> None:
        """Say that the text is complete. A second call does nothing."""
        with self._lock:
            if self._ended:
                return
        self._command(End())

    def cancel(self) -> None:
        """Stop at the next frame; `Finished("cancelled")` follows. May be called at any time."""
        self._cancelled = True
        self._wake()

    def hold(self, on: bool) -> None:
        """Make the engine wait with this turn, or go on: for a client that cannot take more as yet."""
        self._held = on
        self._wake()

    @property
    def held(self) -> bool:
        """Whether the turn is on hold."""
        return self._held

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Whether the last event was handed out."""
        return self._finished

    def _command(self, command: TextCommand) -> None:
        with self._lock:
            if self._ended:
                raise RequestError("bad_request", "text after the end of the turn")
            if isinstance(command, Append):
                if self.first_text_at is None:
                    self.first_text_at = time.monotonic()
                command = Append(self._surrogates.join(command.text))
            else:
                self._ended = isinstance(command, End)
                if half := self._surrogates.end():
                    self._commands.append(Append(half))
            self._commands.append(command)
        self._wake()

    def take_commands(self) -> list[TextCommand]:
        """Everything said since the last call, in order."""
        with self._lock:
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def mark_finished(self) -> None:
        """Called by the engine with the last event."""
        self._finished = True
