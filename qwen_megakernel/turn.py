"""A turn: one utterance, as everything above the engine sees it.

Text goes in by `append`, `flush` and `end`. The `sink` gets events. `cancel` stops the turn at the next
frame. Every wire dialect, `TTSDecoder.stream` and the tests are thin layers over this. It is
thread-safe, and uses neither torch nor asyncio.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.surrogates import SurrogateJoiner

FinishReason = Literal["stop", "length", "repeat", "silence", "cancelled", "error"]
ErrorCode = Literal[
    "bad_request", "unknown_context", "unknown_voice", "unknown_language", "text_too_long", "overloaded",
    "unsupported", "internal",
]  # fmt: skip


class RequestError(ValueError):
    """A request cannot be served. One line says what was given and what is allowed."""

    def __init__(self, code: ErrorCode, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: seconds after which the same request may be served, if known."""
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s


@dataclass(frozen=True, slots=True)
class Started:
    """The turn has left the queue and holds a slot."""


@dataclass(frozen=True, slots=True)
class Audio:
    """A chunk of speech, given out as soon as it exists."""

    samples: np.ndarray
    """float32 [n] in [-1, 1], 24 kHz mono; n is a multiple of 1920."""
    generation_s: float = 0.0
    """`Finished.generation_s` up to this chunk."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every turn. No audio follows it."""

    reason: FinishReason
    num_frames: int
    num_samples: int
    generation_s: float
    """Seconds from the first text to the end, without the time in which the turn waited for text or was
    too far ahead of its playback."""
    error: str | None = None
    """Why the turn failed, in one line. With the reason `length` it says that the speech was cut off
    although the caller had set no `max_frames`."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio that were given out."""
        return self.num_samples / SAMPLE_RATE

    @property
    def rtf(self) -> float | None:
        """The real-time factor: generation over duration. Lower is better; None without audio."""
        return self.generation_s / self.duration_s if self.num_samples else None


TurnEvent = Started | Audio | Finished
Sink = Callable[[TurnEvent], None]
"""Takes a turn's events, in order, on the engine's thread. It must hand them over and return at once."""


MAX_BLOCK = 512
"""The most tokens that the engine takes from a turn at a time."""


class TokenFeed(Protocol):
    """Turns text that arrives in pieces into tokens (`prompt.text_feed.TextFeed`)."""

    def append(self, text: str) -> list[int]:
        """Add text. Returns the tokens that can no longer change."""

    def flush(self) -> list[int]:
        """Returns the tokens of the text that was held back."""


class Turn:
    """The handle of one utterance. `Engine.open_turn` makes it.

    Any thread may call `append`, `flush`, `end`, `hold`, `skip` and `cancel`; they never wait for
    decoding. The caller's thread tokenises the text, once. The engine takes a bounded number of tokens
    at a time. `take_text` and `mark_finished` are for the engine.
    """

    def __init__(self, wake: Callable[[], None], feed: TokenFeed) -> None:
        """`wake` makes the engine look at its turns. `feed` belongs to this turn alone."""
        self._wake, self._feed = wake, feed
        self._feed_lock = threading.Lock()
        """Held while text is tokenised. The engine never waits for it."""
        self._lock = threading.Lock()
        self._surrogates = SurrogateJoiner()
        self._blocks: deque[list[int]] = deque()
        """Blocks of tokens that the engine has not taken yet, each of at most `MAX_BLOCK`."""
        self._ended = False
        self._complete = False
        """Whether the blocks hold all the rest of the text."""
        self._cancelled = False
        self._held = False
        self._finished = False
        self.skipped_s = 0.0
        """Seconds of audio that were given out and that nobody plays."""
        self.first_text_at: float | None = None
        """`time.monotonic()` of the first text, when the turn's clocks start."""

    def append(self, text: str) -> None:
        """Add text after the text so far. Empty text changes nothing.

        A surrogate pair may be split between two texts. A single half counts as U+FFFD.

        Raises:
            RequestError: after `end`.
        """
        with self._feed_lock:
            self._check_growing()
            if not text or self._over:
                return
            if self.first_text_at is None:
                self.first_text_at = time.monotonic()
            self._give(self._feed.append(self._surrogates.join(text)))

    def flush(self) -> None:
        """Speak the text that is held back at an unstable boundary (see `prompt.text_feed.TextFeed`).

        Raises:
            RequestError: after `end`.
        """
        with self._feed_lock:
            self._check_growing()
            self._give(self._flush_feed())

    def end(self) -> None:
        """Mark the text as complete. A second call does nothing."""
        with self._feed_lock:
            if self._ended:
                return
            self._ended = True
            self._give(self._flush_feed(), complete=True)

    def cancel(self) -> None:
        """Stop at the next frame. `Finished("cancelled")` follows. It may be called at any time."""
        self._cancelled = True
        self._wake()

    def hold(self, on: bool) -> None:
        """Hold the turn, or let it go on. It is for a client that cannot take more yet."""
        self._held = on
        self._wake()

    def skip(self, seconds: float) -> None:
        """Note that so many more seconds of audio are not played, so the next frames are due earlier."""
        self.skipped_s += seconds
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
        """Whether the last event was given out."""
        return self._finished

    @property
    def _over(self) -> bool:
        return self._cancelled or self._finished

    def _check_growing(self) -> None:
        if self._ended:
            raise RequestError("bad_request", "text after the end of the turn")

    def _flush_feed(self) -> list[int]:
        """The tokens of all text that was held back, even of half a surrogate pair."""
        if self._over:
            return []
        half = self._surrogates.end()
        return (self._feed.append(half) if half else []) + self._feed.flush()

    def _give(self, tokens: list[int], *, complete: bool = False) -> None:
        """Hand tokens to the engine and wake it, unless there is nothing new."""
        if not tokens and not complete:
            return
        with self._lock:
            if self._blocks and len(self._blocks[-1]) + len(tokens) <= MAX_BLOCK:
                self._blocks[-1] += tokens
            else:
                self._blocks.extend(
                    tokens[start : start + MAX_BLOCK] for start in range(0, len(tokens), MAX_BLOCK)
                )
            self._complete |= complete
        self._wake()

    def take_text(self) -> tuple[list[int], bool]:
        """The next tokens, at most `MAX_BLOCK`, and whether they are the last of a complete text."""
        with self._lock:
            tokens = self._blocks.popleft() if self._blocks else []
            return tokens, self._complete and not self._blocks

    @property
    def has_text(self) -> bool:
        """Whether there are tokens for the engine to take."""
        return bool(self._blocks)

    def mark_finished(self) -> None:
        """The engine calls this with the last event."""
        self._finished = True
