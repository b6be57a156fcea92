"""The contexts of a connection, spoken in the order in which they were opened.

Each segment of a context is a turn of the engine. The next turn is opened when the one before has
finished: generation runs ahead of playback, so nothing is heard of the seam. There is no wire
here: a dialect says what its client wants, is told when something is to be sent (`Listener`), and
takes it when the socket has room.

Everything runs on the event loop; the engine's thread hands its events over.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from dataclasses import replace
from itertools import count
from typing import Protocol

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.serving.contexts import Context, ContextOver, OutEvent, Segment
from qwen_megakernel.serving.native_messages import FinishReason, Speak, State
from qwen_megakernel.serving.server_state import MAX_UNSENT_BYTES, ServerState
from qwen_megakernel.serving.wire import ProtocolError, language_name
from qwen_megakernel.turn import Audio, Finished, RequestError, Started, Turn, TurnEvent

MAX_CONTEXTS = 8
"""Open at a time on a connection."""
MAX_LEAD_S = 10.0
"""Seconds of audio a context may be ahead of its playback."""
PROGRESS_S = 1.0
_REMEMBERED_IDS = 1000


class Listener(Protocol):
    """What a dialect is told."""

    def on_output(self, context: Context) -> None:
        """One more event waits in `Conversation.take`."""

    def on_stopped(self, context: Context, reason: FinishReason, error: Exception | None) -> None:
        """A context ended here and now; whatever it had in waiting is gone."""

    def on_quiet(self, context: Context, state: State, queued: int) -> None:
        """Nothing was sent for an open context for a second."""


class Conversation:
    """The contexts of one connection."""

    def __init__(self, speech: ServerState, name: str, listener: Listener) -> None:
        self._speech, self._name, self._listener = speech, name, listener
        self._contexts: dict[str, Context] = {}
        """Open ones, in order: not stopped, and `ContextOver` not taken."""
        self._used_ids: deque[str] = deque(maxlen=_REMEMBERED_IDS)
        self._numbers = count(1)
        self._held: Turn | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._quiet: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a context is open."""
        return bool(self._contexts)

    @property
    def unsent_bytes(self) -> int:
        """Audio that waits to be taken."""
        return sum(context.unsent_bytes for context in self._contexts.values())

    # -- what the client says ---------------------------------------------------------------

    def speak(self, message: Speak) -> None:
        """Append text to a context, opening it if it is new.

        Raises:
            ProtocolError: refused; nothing has changed.
        """
        context = self._contexts.get(message.context_id)
        num_chars = len(message.text) + (context.num_chars if context else 0)
        if context is None:
            self._check_opening(message.context_id)
        elif context.ended:
            raise ProtocolError("bad_request", f"context {context.context_id} has ended")
        limit = self._speech.max_text_chars
        if num_chars > limit:
            raise ProtocolError("text_too_long", f"text is longer than {limit} characters")
        context = context or self._open(message.context_id)
        context.num_chars = num_chars
        try:
            self._append(context, message)
        except (ProtocolError, RequestError) as error:
            self._stop(context, "error", error)
        self._advance()

    def flush(self, context_id: str) -> None:
        """Complete the segment; nothing happens where there is nothing to say.

        Raises:
            ProtocolError: not an open context, or one that has ended.
        """
        context = self._find(context_id)
        if context.ended:
            raise ProtocolError("bad_request", f"context {context_id} has ended")
        if context.tail is not None and not context.tail.blank:
            context.tail.flush()
            self._advance()

    def end(self, context_id: str) -> None:
        """Complete the context. Raises as `flush` does."""
        context = self._find(context_id)
        if context.ended:
            raise ProtocolError("bad_request", f"context {context_id} has ended")
        context.ended = True
        if context.tail is not None:
            context.tail.flush()
        self._advance()

    def cancel(self, context_id: str | None = None) -> None:
        """Stop a context, or all, now. Raises `ProtocolError` for one that is not open."""
        for context in list(self._contexts.values()) if context_id is None else [self._find(context_id)]:
            self._stop(context, "cancelled")
        self._advance()

    def drain(self) -> None:
        """Refuse what has not begun."""
        error = ProtocolError("overloaded", "the server is shutting down")
        for context in list(self._contexts.values()):
            if not context.num_turns:
                self._stop(context, "error", error)

    def close(self) -> None:
        """The client is gone."""
        for context in list(self._contexts.values()):
            self._stop(context, "cancelled", tell=False)
        for timer in (self._retry, self._quiet):
            if timer is not None:
                timer.cancel()

    # -- what goes to the client ------------------------------------------------------------

    def take(self, context: Context) -> OutEvent | None:
        """The next event of a context to send; None if the context was stopped since."""
        if not context.out:
            return None
        event = context.out.popleft()
        context.mark_sent()
        if isinstance(event, Audio):
            context.unsent_bytes -= event.samples.nbytes
            self._release()
        elif isinstance(event, ContextOver):
            self._forget(context)
            self._record(context)
            self._advance()
        return event

    # -- inside -----------------------------------------------------------------------------

    def _check_opening(self, context_id: str) -> None:
        if context_id in self._used_ids:
            raise ProtocolError("bad_request", f"context {context_id} was used before; take a new id")
        self._speech.check_accepting()
        if len(self._contexts) >= MAX_CONTEXTS:
            raise ProtocolError("overloaded", f"{MAX_CONTEXTS} contexts are open on this connection")

    def _open(self, context_id: str) -> Context:
        context = Context(context_id, f"{self._name}-{next(self._numbers)}")
        self._used_ids.append(context_id)
        self._contexts[context_id] = context
        self._watch()
        return context

    def _find(self, context_id: str) -> Context:
        context = self._contexts.get(context_id)
        if context is None:
            raise ProtocolError("unknown_context", f"context {context_id} is not open")
        return context

    def _append(self, context: Context, message: Speak) -> None:
        if context.tail is None:
            context.choice = self._choose(context.choice, message)
            context.segments.append(Segment(context.choice))
        context.tail.append(message.text)

    def _choose(self, before: Speak, message: Speak) -> Speak:
        """What a new segment is spoken with: what its message says, else what was said before."""
        language = None if message.language is None else language_name(message.language)
        seed = before.seed if message.seed is None else message.seed
        choice = Speak(
            before.context_id,
            "",
            voice=self._speech.voice_name(message.voice or None) or before.voice,
            language=language or before.language or "auto",
            instruct=_either(message.instruct, before.instruct),
            temperature=_either(message.temperature, before.temperature),
            top_k=_either(message.top_k, before.top_k),
            seed=secrets.randbits(32) if seed is None else seed,
            chunk_frames=_either(message.chunk_frames, before.chunk_frames),
        )
        self._speech.decoder.check(choice.voice, choice.language, instruct=choice.instruct)
        return choice

    def _advance(self) -> None:
        """Let the first context that is not complete go on."""
        while context := next((c for c in self._contexts.values() if not c.complete), None):
            if context.current is not None:
                return  # when it has finished, `_deliver` comes here again
            segment = context.next_segment()
            if segment is not None:
                if self._must_wait(context):
                    return
                self._speak_segment(context, segment)
            elif not context.ended:
                return
            else:
                context.complete = True
                self._put(context, ContextOver())

    def _must_wait(self, context: Context) -> bool:
        """Whether the client is to catch up before another turn is opened."""
        if self.unsent_bytes >= MAX_UNSENT_BYTES:
            return True  # `_release` comes here again
        ahead_s = context.lead_s() - MAX_LEAD_S
        if ahead_s <= 0:
            return False
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(ahead_s, self._advance)
        return True

    def _speak_segment(self, context: Context, segment: Segment) -> None:
        loop = asyncio.get_running_loop()

        def sink(event: TurnEvent) -> None:
            # A closed loop means that the process is on its way out and nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver, context, segment, event)

        choice = segment.choice
        context.start_clock()
        try:
            segment.turn = self._speech.decoder.open_turn(
                segment.take_pending(),
                sink=sink,
                ended=segment.flushed,
                voice=choice.voice,
                language=choice.language,
                instruct=choice.instruct,
                params=_params(choice, context.num_turns),
                chunk_frames=choice.chunk_frames,
                max_lead_s=MAX_LEAD_S - context.lead_s(),
            )
            context.num_turns += 1
        except RequestError as error:
            self._stop(context, "error", error)

    def _deliver(self, context: Context, segment: Segment, event: TurnEvent) -> None:
        """An event of the engine, on the loop."""
        if isinstance(event, Started):
            segment.started = True
        elif isinstance(event, Finished):
            segment.finished = True
            context.account(event)
        if context.closed:
            if isinstance(event, Finished):
                self._record(context)
        elif isinstance(event, Audio):
            context.add_audio(event)
            self._listener.on_output(context)
            self._hold(segment.turn)
        elif isinstance(event, Finished):
            self._finish_segment(context, event)
            self._advance()

    def _finish_segment(self, context: Context, finished: Finished) -> None:
        if finished.reason in ("error", "cancelled"):  # cancelled: the engine is closing
            error = ProtocolError("internal", f"{context.name} failed: {finished.error or 'shut down'}")
            self._stop(context, "error", error)
            return
        context.add_segment(finished)
        self._listener.on_output(context)

    def _put(self, context: Context, event: OutEvent) -> None:
        context.out.append(event)
        self._listener.on_output(context)

    def _stop(
        self,
        context: Context,
        reason: FinishReason,
        error: Exception | None = None,
        *,
        tell: bool = True,
    ) -> None:
        """End a context here and now."""
        self._forget(context)
        context.out.clear()
        context.unsent_bytes = 0
        segment = context.current
        context.reason = reason
        # Other errors are the client's, and may repeat what it said: not for the log.
        context.error = str(error) if getattr(error, "code", None) == "internal" else None
        if segment is None:
            self._record(context)
        else:
            segment.turn.cancel()  # its `Finished` makes the record
            if segment.turn is self._held:
                self._held = None
        if tell:
            self._listener.on_stopped(context, reason, error)

    def _forget(self, context: Context) -> None:
        context.closed = True
        self._contexts.pop(context.context_id, None)

    def _record(self, context: Context) -> None:
        self._speech.metrics.record(context.record(self._speech.decoder.default_voice))

    def _hold(self, turn: Turn) -> None:
        """Stop the decoder while the socket cannot take what there is."""
        if self._held is None and self.unsent_bytes >= MAX_UNSENT_BYTES:
            self._held = turn
            turn.hold(True)

    def _release(self) -> None:
        if self.unsent_bytes > MAX_UNSENT_BYTES // 2:
            return
        if self._held is not None:
            self._held.hold(False)
            self._held = None
        self._advance()

    # -- silence ----------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._quiet is None and self._contexts:
            since = min(context.quiet_since for context in self._contexts.values())
            delay = max(0.0, since + PROGRESS_S - time.monotonic())
            self._quiet = asyncio.get_running_loop().call_later(delay, self._report_quiet)

    def _report_quiet(self) -> None:
        self._quiet = None
        now = time.monotonic()
        for queued, context in enumerate(list(self._contexts.values())):
            if now - context.quiet_since < PROGRESS_S:
                continue
            context.quiet_since = now
            if not self.unsent_bytes:  # else the socket has more than it can take
                self._listener.on_quiet(context, _state(context, queued), queued)
        self._watch()


def _state(context: Context, queued: int) -> State:
    segment = context.current
    if queued:
        return "queued"
    if segment is None or not segment.flushed:
        return "waiting_for_text"
    return "speaking" if segment.started else "queued"


def _params(choice: Speak, index: int) -> GenerationParams:
    params = GenerationParams(seed=(choice.seed + index) % 2**64)
    talker = params.talker
    if choice.temperature is not None:
        talker = replace(talker, temperature=choice.temperature)
    if choice.top_k is not None:
        talker = replace(talker, top_k=choice.top_k)
    return replace(params, talker=talker)


def _either(first: object, second: object) -> object:
    return second if first is None else first
