"""A session: the contexts of one client, over WebSocket or HTTP.

    client -> carrier -> dialect --- append, flush, end, cancel --> Session --> turns of the engine
    client <- carrier <- dialect <-- events of `take` ------------- Session <-- their events

The dialect's rules decide whether contexts are spoken side by side, or in the order in which they
were opened. A context's segments become turns, one after the other. The next turn is opened when the
one before has finished. Generation runs ahead of playback, so the seam is not heard.

A session knows no message format. The carrier, a WebSocket or an HTTP answer, takes events when its
client has room for them. If too much audio waits for the carrier, the engine waits. All code here runs
on the event loop and needs no lock: a mailbox brings the events of the engine's thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from qwen_megakernel.serving.context import Context, WaitingPhrase
from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextQuiet,
    ContextStarted,
    Reply,
    SessionEnd,
    SessionEvent,
    SessionFailed,
    SessionOver,
)
from qwen_megakernel.serving.message_rate import MessageRate
from qwen_megakernel.serving.observe import edge_log
from qwen_megakernel.serving.options import SpeechOptions, TurnOptions
from qwen_megakernel.serving.outbox import Ended, Entry, Outbox, Output
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.turn import Audio, Finished, RequestError, Started, TurnEvent

MAX_UNSENT_BYTES = 65_536
"""Bytes of audio that may wait for the carrier before the engine waits. It goes on at half of this."""
MAX_GROWTH = 4
"""With respellings a context's text may have this many times `max_text_chars` characters."""
QUIET_S = 1.0
"""A context without an event for so many seconds is reported as quiet."""
_REMEMBERED_IDS = 1000
_NO_CHOICES = SpeechOptions()


class Session:
    """The contexts of one client. Methods for the client's messages raise `RequestError`."""

    def __init__(
        self,
        server: ServerState,
        name: str,
        rules: SessionRules | None = None,
        address: str | None = None,
        token: str | None = None,
    ) -> None:
        """`name` is for the log. `rules` are the dialect's, None if the first message decides on it.
        Clients of one `address` or `token` share its limits; None has no limits."""
        self.server, self.name, self.address, self.token = server, name, address, token
        self.rules = rules or SessionRules()
        """A dialect that the first message has chosen sets its rules before it opens a context."""
        self.bytes_in_carrier: Callable[[], int] = lambda: 0
        """Returns how many bytes the carrier itself holds for the client. The carrier sets it."""
        self._outbox = Outbox()
        self._contexts: dict[str, Context] = {}
        """The open contexts, in order. A context is open until the carrier takes its end."""
        self._used_ids: deque[str] = deque(maxlen=_REMEMBERED_IDS)
        self._numbers = count(1)
        self._retry: asyncio.TimerHandle | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._active_at = time.monotonic()
        """When the client last sent a message, or the carrier last took output of a context."""
        self._rate = MessageRate(server.max_messages_per_s, self._active_at)
        self._idle: asyncio.TimerHandle | None = None
        self._check_idle()

    @property
    def silent_s(self) -> float:
        """Seconds since the client sent a message, or since the carrier took output of a context."""
        return time.monotonic() - self._active_at

    @property
    def busy(self) -> bool:
        """Whether a context is open."""
        return bool(self._contexts)

    @property
    def owner(self) -> tuple[str | None, ...]:
        """The owner of the session's turns in the engine: its token, its address if that is counted,
        and its name."""
        return (self.token, self.name) if self.address is None else (self.token, self.address, self.name)

    @property
    def num_turns(self) -> int:
        """The number of the session's turns that wait or speak, without cancelled ones."""
        return sum(c.speaking and not c.cancelled for c in self._contexts.values())

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the session and the carrier hold for the client."""
        return self._outbox.unsent_bytes + self.bytes_in_carrier()

    # -- what the client says ---------------------------------------------------------------

    def check_room(self) -> None:
        """Raise `RequestError` if the server or this session takes no new context."""
        self.server.check_accepting()
        if len(self._contexts) >= self.rules.max_contexts:
            raise RequestError("overloaded", self.rules.when_full)

    def is_open(self, context_id: str) -> bool:
        """Whether a context is open. It no longer is once its end has happened at once (a cancel or a
        failure), or the carrier has taken its end."""
        return context_id in self._contexts

    def takes_text(self, context_id: str) -> bool:
        """Whether the context is open and could still speak text that is appended now."""
        context = self._contexts.get(context_id)
        return context is not None and context.takes_text

    def append(
        self, context_id: str, text: str, choices: SpeechOptions = _NO_CHOICES, *, ended: bool = False
    ) -> list[Span]:
        """Append text to a context. A new id opens a context.

        Args:
            context_id: a new context needs an id that was not used before.
            text: may end anywhere, even within a word.
            choices: used if the text begins a segment.
            ended: whether the context's text is complete.

        Returns:
            The spans of the text, written and spoken, that no later text can change.

        Raises:
            RequestError: the text is refused, and nothing has changed. Choices that cannot be served
                do not raise: the context fails, and its end is an event.
        """
        context = self._contexts.get(context_id)
        if context is None:
            self._check_id(context_id)
            self.check_room()
        elif context.ended:
            raise RequestError("bad_request", f"context {context_id} has ended")
        num_chars = len(text) + (context.account.num_chars if context else 0)
        limit = self.server.max_text_chars
        if num_chars > limit:
            raise RequestError("text_too_long", f"text is longer than {limit} characters")
        if context is None:
            context = self._open(context_id)
            if choices.seed is None:
                # Without a given seed every take differs. The log has the seed of each.
                choices = replace(choices, seed=secrets.randbits(32))
        context.account.num_chars = num_chars
        spans: list[Span] = []
        try:
            if context.tail is None:
                options = self.server.choose(context.options, choices)
                if self.rules.one_turn:  # there is no place for a pause
                    options = replace(options, markup=False)
                context.add_segment(options, self.server.reader(options))
            spans += context.append(text, MAX_GROWTH * limit)
            if ended:
                spans += context.end()
        except RequestError as failure:
            self._stop(context, failure)
        self._advance()
        return spans

    def flush(self, context_id: str) -> list[Span]:
        """Complete the segment, unless it has nothing to say. Returns the last spans of its text. Raises
        `RequestError` if the context is not open or has ended, as `end` does."""
        spans = self._find_growing(context_id).flush()
        self._advance()
        return spans

    def end(self, context_id: str) -> list[Span]:
        """Complete the context. Returns the last spans of its text."""
        spans = self._find_growing(context_id).end()
        self._advance()
        return spans

    def cancel(self, context_id: str | None = None) -> None:
        """Stop a context, or all if `context_id` is None. Raises `RequestError` if it is not open."""
        for context in list(self._contexts.values()) if context_id is None else [self._find(context_id)]:
            if self.rules.one_turn and context.num_turns:
                context.cancel()
                context.stop_turn()
                self._outbox.drop(context)
            else:
                self._stop(context)
        self._advance()

    # -- what the server says ---------------------------------------------------------------

    def drain(self) -> None:
        """Fail the contexts that have no turn yet."""
        for context in list(self._contexts.values()):
            if not context.num_turns:
                self._stop(context, RequestError("overloaded", "the server is shutting down"))

    def fail(self, failure: RequestError) -> None:
        """Fail all contexts, tell the client that the server has failed, and let the carrier close."""
        for context in list(self._contexts.values()):
            self._stop(context, failure)
        self._outbox.put(SessionFailed(failure.code, str(failure)))
        self.finish("server_failed")

    def finish(self, reason: SessionEnd) -> None:
        """Let the carrier close, after it has taken all events that wait."""
        self._outbox.put(SessionOver(reason))

    def close(self) -> None:
        """The client is gone: stop its turns now. A second call does nothing."""
        for context in list(self._contexts.values()):
            self._stop(context, tell=False)
        for timer in (self._retry, self._quiet, self._idle):
            if timer is not None:
                timer.cancel()

    # -- what goes to the client ------------------------------------------------------------

    def reply(self, message: str | bytes) -> None:
        """Queue a message of the dialect's own behind all waiting events."""
        self._outbox.put(Reply(message))

    async def take(self) -> list[SessionEvent]:
        """Wait for the next events. The carrier sends them together. The session counts them as sent, so
        a later message of the client cannot stop them."""
        while True:
            events = self._resolve(await self._outbox.get())
            if events:
                return events

    async def keep_pace(self) -> None:
        """Count a message of the client, and wait before the carrier reads on.

        It waits while the client leaves too many messages unread, and while it sends too fast.
        """
        self._active_at = time.monotonic()
        await self._outbox.until_short()
        if delay_s := self._rate.delay_s(time.monotonic()):
            await asyncio.sleep(delay_s)

    def _resolve(self, entry: Entry) -> list[SessionEvent]:
        if not isinstance(entry, Output):
            return [entry]
        context, what = entry.context, entry.what
        context.quiet_since = self._active_at = time.monotonic()
        if isinstance(what, Ended):
            return self._conclude(context)
        events: list[SessionEvent] = []
        if not context.announced:
            context.announced = True
            events.append(ContextStarted(context.context_id))
        if isinstance(what, Audio):
            context.account.mark_sent(len(what.samples))
            self._release()
            events.append(ContextAudio(context.context_id, what.samples))
        else:
            events.append(what)
        return events

    def _conclude(self, context: Context) -> list[SessionEvent]:
        if context.closed:
            return []
        self._forget(context)
        self._record(context)
        self._advance()
        return [context.end_event()]

    # -- contexts ---------------------------------------------------------------------------

    def _check_id(self, context_id: str) -> None:
        if context_id in self._used_ids:
            raise RequestError("bad_request", f"context {context_id} was used before; take a new id")

    def _open(self, context_id: str) -> Context:
        number = context_id if self.rules.own_ids else next(self._numbers)
        options = TurnOptions(
            params=self.server.decoder.default_params,
            trim_leading_silence=self.server.trim_leading_silence,
            markup=self.server.markup,
        )
        context = Context(context_id, f"{self.name}-{number}", options)
        self._used_ids.append(context_id)
        self._contexts[context_id] = context
        self._watch()
        return context

    def _find(self, context_id: str) -> Context:
        context = self._contexts.get(context_id)
        if context is None:
            raise RequestError("unknown_context", f"context {context_id} is not open")
        return context

    def _find_growing(self, context_id: str) -> Context:
        context = self._find(context_id)
        if context.ended:
            raise RequestError("bad_request", f"context {context_id} has ended")
        return context

    def _stop(self, context: Context, failure: RequestError | None = None, *, tell: bool = True) -> None:
        """End a context at once; as cancelled if there is no failure."""
        self._forget(context)
        self._outbox.drop(context)
        if failure is None:
            context.cancel()
        else:
            context.fail(failure)
        if context.speaking:
            context.stop_turn()  # its `Finished` makes the record
        else:
            self._record(context)
        if tell:
            self._outbox.put(context.end_event())

    def _forget(self, context: Context) -> None:
        context.closed = True
        self._contexts.pop(context.context_id, None)

    def _record(self, context: Context) -> None:
        if context.num_turns or not self.rules.one_turn:
            self.server.metrics.record(context.record(self.server.decoder.default_voice))

    # -- turns ------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Let the first context go on, or all of them if they are spoken side by side."""
        if self.rules.side_by_side:
            for context in list(self._contexts.values()):
                while self._advance_context(context):
                    pass
        else:
            while (first := self._next_context()) and self._advance_context(first):
                pass

    def _advance_context(self, context: Context) -> bool:
        """Let a context take a step. Returns False if it has to wait or is over."""
        if context.closed or context.speaking or context.complete:
            return False  # `_deliver`, or `take`, comes here again
        if context.spoken is not None and context.spoken.owes and not self.rules.one_turn:
            if context.spoken.pause_s and self._must_wait(context):
                return False
            if (due := context.settle()) is not None:
                self._outbox.put(Output(context, due))
            return True
        phrase = context.next_phrase(even_blank=self.rules.one_turn)
        if phrase is not None:
            if self._must_wait(context):
                return False
            if phrase.blank and phrase.silent:
                context.begin_silence()
            else:
                self._open_turn(context, phrase)
        elif not context.ended:
            return False
        else:
            context.complete = True
            self._outbox.put(Output(context, Ended()))
        return True

    def _next_context(self) -> Context | None:
        contexts = self._contexts.values()
        return next((c for c in contexts if self.rules.one_turn or not c.complete), None)

    def _must_wait(self, context: Context) -> bool:
        """Whether the client must catch up before another turn. `_advance` runs again when it has."""
        if self._outbox.unsent_bytes >= MAX_UNSENT_BYTES:
            return True  # `_release` calls again
        ahead_s = context.lead_s() - self.server.lead_limit_s(self.rules)
        if ahead_s <= 0:
            return False
        loop = asyncio.get_running_loop()
        if self._retry is not None:
            if loop.time() < self._retry.when() <= loop.time() + ahead_s:
                return True  # the timer of another context comes first
            self._retry.cancel()
        self._retry = loop.call_later(ahead_s, self._advance)
        return True

    def _open_turn(self, context: Context, phrase: WaitingPhrase) -> None:
        loop = asyncio.get_running_loop()

        def sink(event: TurnEvent) -> None:
            self.server.mailbox.post(loop, self._deliver, context, event)

        options = phrase.options
        context.start_clock()
        try:
            if not context.num_turns:  # later turns of a context are always let in
                self.server.admission.check_turn(self, self.server.decoder.capacity(self.owner))
            turn = self.server.decoder.open_turn(
                phrase.text,
                sink=sink,
                ended=phrase.flushed,
                voice=options.voice,
                language=options.language,
                instruct=options.instruct,
                params=context.params_of(phrase),
                chunk_frames=options.chunk_frames,
                streaming=options.streaming,
                max_lead_s=self.server.lead_limit_s(self.rules) - context.lead_s(),
                owner=self.owner,
            )
        except RequestError as failure:
            if failure.code == "overloaded":
                self.server.metrics.count_refusal("turn")
            self._stop(context, failure)
        else:
            context.begin_turn(turn)

    def _deliver(self, context: Context, event: TurnEvent) -> None:
        """Take an event of the engine, on the event loop."""
        if isinstance(event, Started):
            context.mark_started()
        elif isinstance(event, Audio):
            self._put_audio(context, context.add_audio(event))
        else:
            context.finish_turn(event)
            if context.closed:
                self._record(context)
            else:
                self._finish_turn(context, event)
                self._advance()

    def _put_audio(self, context: Context, audio: Audio) -> None:
        if len(audio.samples) and not (context.closed or context.cancelled):
            self._outbox.put(Output(context, audio))
            self._hold(context)

    def _finish_turn(self, context: Context, finished: Finished) -> None:
        if self.rules.one_turn:
            context.end()
            if finished.reason == "error":
                context.fail(RequestError("internal", str(finished.error)))
                return
        elif finished.reason in ("error", "cancelled"):  # cancelled: the engine is closing
            why = finished.error or "shut down"
            self._stop(context, RequestError("internal", f"{context.name} failed: {why}"))
            return
        if not context.cancelled:
            self._put_audio(context, context.end_turn(finished))
            if self.rules.one_turn and (due := context.settle()) is not None:
                self._outbox.put(Output(context, due))

    def _hold(self, context: Context) -> None:
        """Let the engine wait while too much audio waits for the carrier."""
        if self._outbox.unsent_bytes >= MAX_UNSENT_BYTES:
            context.hold(True)

    def _release(self) -> None:
        if self._outbox.unsent_bytes > MAX_UNSENT_BYTES // 2:
            return
        for context in self._contexts.values():
            context.hold(False)
        self._advance()

    # -- silence ----------------------------------------------------------------------------

    def _check_idle(self) -> None:
        limits = [limit_s for limit_s in (self.server.idle_s, self.rules.idle_s) if limit_s]
        if not limits:
            return
        left_s = self._active_at + min(limits) - time.monotonic()
        if left_s > 0:
            self._idle = asyncio.get_running_loop().call_later(left_s, self._check_idle)
            return
        edge_log.info("connection %s: idle for %g s, closed", self.name, min(limits))
        self.finish("idle")

    def _watch(self) -> None:
        if self._quiet is None and self._contexts:
            since = min(context.quiet_since for context in self._contexts.values())
            delay = max(0.0, since + QUIET_S - time.monotonic())
            self._quiet = asyncio.get_running_loop().call_later(delay, self._report_quiet)

    def _report_quiet(self) -> None:
        self._quiet = None
        now = time.monotonic()
        for num_before, context in enumerate(list(self._contexts.values())):
            if now - context.quiet_since < QUIET_S:
                continue
            context.quiet_since = now
            if not self._outbox.unsent_bytes:  # otherwise the client is behind and has audio to read
                queued = bool(num_before) and not self.rules.side_by_side
                state = "queued" if queued else context.state
                self._outbox.put(ContextQuiet(context.context_id, state, num_before))
        self._watch()
