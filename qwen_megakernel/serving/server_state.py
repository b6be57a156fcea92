"""What every dialect shares: turns opened for a client, and the account kept of each.

The engine's thread hands an event over with `call_soon_threadsafe`; from there on everything runs
on the event loop, and nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.serving import options
from qwen_megakernel.serving.observe import Metrics, TurnRecord
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.turn import Audio, Finished, RequestError, Turn, TurnEvent

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

MAX_NAMES_SHOWN = 10
"""Known names listed by an error about an unknown one."""
MAX_UNSENT_BYTES = 65_536
"""Audio of a connection that may wait for the socket before the decoder does; it goes on at half."""


@dataclass(slots=True)
class ServerState:
    """The part of the server that speaks, shared by all connections."""

    decoder: TTSDecoder
    metrics: Metrics
    max_text_chars: int = 4096
    max_message_bytes: int = 65_536
    draining: bool = False
    """The server is going down: turns go on, none may begin."""

    def check_accepting(self) -> None:
        """Raise `RequestError` while no turn may begin."""
        if self.draining:
            raise RequestError("overloaded", "the server is shutting down")
        if self.decoder.error is not None:
            raise RequestError("internal", "the engine has stopped; the server must be restarted")

    def voice_name(self, given: str | None) -> str | None:
        """A voice as the decoder knows it; raises `RequestError`."""
        if given is None or given in self.decoder.voices:
            return given
        if given.lower() in self.decoder.voices:  # presets are known by lower-case names
            return given.lower()
        known = name_list(list(self.decoder.voices))
        raise RequestError("unknown_voice", f"voice {given[:64]} is unknown; known: {known}")

    def choose(self, before: options.TurnOptions, choices: options.SpeechOptions) -> options.TurnOptions:
        """The options before with a client's choices in their place; raises `RequestError`."""
        voice = self.voice_name(choices.voice or None)
        chosen = before.updated(replace(choices, voice=voice))
        self.decoder.check(chosen.voice, chosen.language, instruct=chosen.instruct)
        return chosen


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """What a client chose, as `open_turn` takes it."""

    params: GenerationParams
    voice: str | None = None
    language: str = "auto"
    chunk_frames: int | None = None
    max_lead_s: float | None = None


class SpokenTurn:
    """One turn of one client: pending until `open()`, over when `Finished` was delivered."""

    def __init__(
        self,
        speech: ServerState,
        name: str,
        options: TurnOptions,
        deliver: Callable[[SpokenTurn, TurnEvent], None],
    ) -> None:
        self.name = name
        self.ended = False
        """No more text will come."""
        self.cancelled = False
        self.num_samples_sent = 0
        self.unsent_bytes = 0
        """Audio that waits for the socket."""
        self._speech = speech
        self._options = options
        self._deliver = deliver
        self._turn: Turn | None = None
        self._pending: list[str] = []
        self._num_chars = 0
        self._clock_from: float | None = None
        self._ttfc_s: float | None = None

    @property
    def takes_text(self) -> bool:
        """Whether `append()` still makes sense."""
        finished = self._turn is not None and self._turn.finished
        return not (self.ended or self.cancelled or finished)

    def append(self, text: str) -> None:
        """Add text; refused whole when the turn's text would grow too long."""
        limit = self._speech.max_text_chars
        if self._num_chars + len(text) > limit:
            raise ProtocolError("text_too_long", f"text is longer than {limit} characters")
        if self._turn is None:
            self._pending.append(text)
        else:
            self._turn.append(text)
        self._num_chars += len(text)
        self._start_clock()

    def end(self) -> None:
        """Say that the text is complete."""
        self.ended = True
        if self._turn is not None:
            self._turn.end()

    def open(self) -> None:
        """Begin to speak; raises `RequestError`."""
        loop = asyncio.get_running_loop()

        def sink(event: TurnEvent) -> None:
            # A closed loop means that the process is on its way out and nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver, self, event)

        options = self._options
        self._turn = self._speech.decoder.open_turn(
            "".join(self._pending),
            voice=options.voice,
            language=options.language,
            params=options.params,
            chunk_frames=options.chunk_frames,
            max_lead_s=options.max_lead_s,
            ended=self.ended,
            sink=sink,
        )
        self._pending.clear()
        self._start_clock()

    def cancel(self) -> None:
        """Stop at the next frame; `Finished` still comes if the turn was open."""
        self.cancelled = True
        if self._turn is not None:
            self._turn.cancel()

    def mark_waiting(self, audio: Audio) -> None:
        """Audio waits for the socket: the decoder does, too, when it is much."""
        self.unsent_bytes += audio.samples.nbytes
        if self.unsent_bytes >= MAX_UNSENT_BYTES and not self._turn.held:
            self._turn.hold(True)

    def mark_taken(self, audio: Audio) -> None:
        """That audio waits no longer."""
        self.unsent_bytes -= audio.samples.nbytes
        if self.unsent_bytes <= MAX_UNSENT_BYTES // 2 and self._turn.held:
            self._turn.hold(False)

    def mark_sent(self, num_samples: int) -> None:
        """Audio was handed to the socket."""
        if self._ttfc_s is None and self._clock_from is not None:
            self._ttfc_s = time.perf_counter() - self._clock_from
        self.num_samples_sent += num_samples

    def close(self, finished: Finished) -> TurnRecord:
        """Enter the turn into log and metrics, once."""
        # Audio that the engine had finished may have been dropped on its way by a cancel.
        cut = self.cancelled and finished.reason != "error"
        record = TurnRecord(
            turn=self.name,
            chars=self._num_chars,
            voice=self._options.voice or self._speech.decoder.default_voice,
            seed=self._options.params.seed,
            ttfc_ms=None if self._ttfc_s is None else round(self._ttfc_s * 1000, 2),
            rtf=round(finished.rtf, 4) if finished.num_samples else None,
            frames=finished.num_frames,
            finish_reason="cancelled" if cut else finished.reason,
            error=finished.error,
        )
        self._speech.metrics.record(record)
        return record

    def _start_clock(self) -> None:
        # TTFC counts from the moment the engine has both the turn and its first text: waiting for
        # an earlier turn, or for a client that types, is not the server's time.
        if self._clock_from is None and self._turn is not None and self._num_chars:
            self._clock_from = time.perf_counter()


def name_list(names: list[str]) -> str:
    """At most ten of them, for an error message."""
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN]) or "none"
    return f"{shown}, ..." if len(names) > MAX_NAMES_SHOWN else shown
