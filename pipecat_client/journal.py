"""Text that the server has not spoken yet: what to send, and what to send again.

The service writes every text in here first and sends what `take` gives. A connection that breaks
loses nothing: `restart` takes back what has not been spoken, and the sentence that was cut goes
on at the sample where it broke off. Each segment has a seed of its own for that: the same
text, voice and seed give the same speech, so what was heard before is dropped as it comes again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from qwen_megakernel.serving.native_messages import Cancel, ClientMessage, End, Flush, Limits, Speak

SAMPLE_BYTES = 2


@dataclass(slots=True)
class Segment:
    """A sentence, or as much of it as fits into one context of the server."""

    options: dict[str, Any]
    """Fields of `Speak`."""
    opens_context: bool
    """It would not fit into the context of the segment before."""
    texts: list[str] = field(default_factory=list)
    complete: bool = False
    num_sent: int = 0
    """Texts sent on this connection."""
    flushed: bool = False
    num_received: int = 0
    """Samples, over all connections."""
    num_to_drop: int = 0
    """Samples that come again."""

    @property
    def blank(self) -> bool:
        """Whether there is nothing to say as yet; the server makes no segment of that."""
        return not any(text.strip() for text in self.texts)

    def rewind(self) -> None:
        """Make it say itself again, up to where it was heard in silence."""
        self.texts = ["".join(self.texts)]
        self.num_sent, self.flushed = 0, False
        self.num_to_drop = self.num_received


@dataclass(slots=True)
class Reply:
    """One Pipecat context. Its id on the wire is another, as the server takes each only once."""

    context_id: str
    wire_id: str
    segments: deque[Segment] = field(default_factory=deque)
    """Those not wholly spoken."""
    ended: bool = False
    num_samples: int = 0
    """Handed out by `receive`."""
    num_refusals: int = 0
    """In a row, without new audio between them."""
    num_chars: int = 0
    is_open: bool = False
    end_sent: bool = False
    num_segments_spoken: int = 0
    """In this context of the server."""

    @property
    def goes_on(self) -> bool:
        """Whether segments that are wholly spoken have made a sound, or a pause."""
        return self.num_samples > sum(segment.num_received for segment in self.segments)

    @property
    def finished(self) -> bool:
        """Nothing is left to say, and the server owes nothing."""
        return self.ended and not self.segments and not self.is_open

    def receive(self, samples: bytes) -> bytes:
        """Take audio; what of it is new."""
        if not self.segments:
            return samples
        segment, num_samples = self.segments[0], len(samples) // SAMPLE_BYTES
        num_dropped = min(segment.num_to_drop, num_samples)
        segment.num_to_drop -= num_dropped
        if num_dropped < num_samples:
            self.num_refusals = 0
        segment.num_received += num_samples - num_dropped
        self.num_samples += num_samples - num_dropped
        return samples[num_dropped * SAMPLE_BYTES :]

    def end_segment(self, index: int) -> None:
        """The server has spoken the segments up to this one."""
        while self.segments and self.num_segments_spoken <= index:
            self.segments.popleft()
            self.num_segments_spoken += 1

    def close(self) -> None:
        """The server is done with the context; what it has never seen needs another one."""
        while self.segments and self.segments[0].num_sent:
            self.segments.popleft()

    def rewind(self, wire_id: str) -> None:
        """Start over with what is not spoken, as a new context of the server."""
        for segment in self.segments:
            segment.rewind()
        self.wire_id = wire_id
        self.is_open = self.end_sent = False
        self.num_segments_spoken = 0


class Journal:
    """All replies in the order in which they were begun."""

    def __init__(self) -> None:
        self.trims = False
        self.limits = Limits(max_text_chars=4096, max_contexts=8, max_message_bytes=65_536)
        """The server's, once it is connected."""
        self.on_hold = False
        """The server takes nothing new for the moment; cancels go out all the same."""
        self._replies: dict[str, Reply] = {}
        self._cancels: deque[str] = deque()
        self._numbers = count(1)

    def __iter__(self) -> Iterator[Reply]:
        """The open replies."""
        return iter(list(self._replies.values()))

    def __contains__(self, context_id: str) -> bool:
        return context_id in self._replies

    def get(self, context_id: str) -> Reply | None:
        """The open reply of a Pipecat context."""
        return self._replies.get(context_id)

    def find(self, wire_id: str | None) -> Reply | None:
        """The open reply that the server knows by this id."""
        return next((reply for reply in self if reply.wire_id == wire_id), None)

    # --- what the bot says

    def speak(self, context_id: str, text: str, *, complete: bool, **options: Any) -> Reply:
        """Add text to a reply. `complete` ends its segment; `options` count where one begins."""
        reply = self._replies.get(context_id)
        if reply is None:
            reply = self._replies[context_id] = Reply(context_id, self._wire_id(context_id))
        too_long = reply.num_chars + len(text) > self.limits.max_text_chars and reply.num_chars > 0
        if too_long:
            reply.num_chars = 0
        if too_long or not reply.segments or reply.segments[-1].complete:
            if too_long and reply.segments:
                reply.segments[-1].complete = True
            if options.get("seed") is None:
                options["seed"] = secrets.randbits(32)
            reply.segments.append(Segment(options, opens_context=too_long))
        segment = reply.segments[-1]
        segment.texts.append(text)
        segment.complete = complete
        reply.num_chars += len(text)
        return reply

    def complete(self, context_id: str) -> None:
        """The text of a reply's last segment is complete; nothing happens where it says nothing."""
        reply = self._replies.get(context_id)
        if reply is not None and reply.segments and not reply.segments[-1].blank:
            reply.segments[-1].complete = True

    def end(self, context_id: str) -> None:
        """The reply's text is complete."""
        reply = self._replies.get(context_id)
        if reply is not None:
            reply.ended = True
            if reply.segments:
                reply.segments[-1].complete = True

    def cancel(self, context_id: str) -> None:
        """Forget a reply, and have the server stop it."""
        reply = self._replies.pop(context_id, None)
        if reply is not None and reply.is_open:
            self._cancels.append(reply.wire_id)

    # --- what goes out

    def take(self) -> ClientMessage | None:
        """The next message to send, if there is one; it counts as sent."""
        if self._cancels:
            return Cancel(self._cancels.popleft())
        if self.on_hold:
            return None
        # Those beyond the limit wait until a `done` makes room.
        for reply in islice(self._replies.values(), self.limits.max_contexts):
            message = self._take_of(reply)
            if message is not None or self._waits_for_done(reply):
                return message
        return None

    def _take_of(self, reply: Reply) -> ClientMessage | None:
        if reply.end_sent:
            return None
        for index, segment in enumerate(reply.segments, reply.num_segments_spoken):
            if segment.num_sent == 0 and segment.opens_context and reply.is_open:
                reply.end_sent = True
                return End(reply.wire_id)
            if segment.num_sent < len(segment.texts):
                segment.num_sent += 1
                reply.is_open = True
                text = segment.texts[segment.num_sent - 1]
                if segment.num_sent > 1:
                    return Speak(reply.wire_id, text)
                # The server adds the index of a segment to its seed; here each has its own.
                options = segment.options | {"seed": (segment.options["seed"] - index) % 2**64}
                if index == 0 and reply.goes_on and (self.trims or options.get("trim_leading_silence")):
                    # Its silence was a pause within the reply. The same samples are to come again.
                    options["trim_leading_silence"] = False
                return Speak(reply.wire_id, text, **options)
            if segment.complete and not segment.flushed and segment is not self._last_of(reply):
                segment.flushed = True
                return Flush(reply.wire_id)
        if reply.ended and reply.is_open:
            reply.end_sent = True
            return End(reply.wire_id)
        return None

    @staticmethod
    def _last_of(reply: Reply) -> Segment | None:
        """The segment that `End` completes."""
        return reply.segments[-1] if reply.ended and reply.segments else None

    @staticmethod
    def _waits_for_done(reply: Reply) -> bool:
        """Whether a reply goes on in another context, which must be spoken before what follows."""
        return reply.end_sent and any(segment.num_sent == 0 for segment in reply.segments)

    # --- what comes in

    def done(self, reply: Reply) -> None:
        """The server is done with the reply's context."""
        reply.close()
        reply.rewind(self._wire_id(reply.context_id))

    def postpone(self, reply: Reply) -> None:
        """The server refused the reply's context, or gave it up: keep it for later."""
        reply.num_refusals += 1
        reply.rewind(self._wire_id(reply.context_id))
        self.on_hold = True

    def restart(self, limits: Limits, *, trims: bool = False) -> None:
        """A new connection: the server knows nothing of what was said.

        `trims`: it leaves out the silence before a context's first sound, if it is not told otherwise.
        """
        self.limits, self.trims = limits, trims
        self.on_hold = False
        self._cancels.clear()
        for reply in self:
            reply.rewind(self._wire_id(reply.context_id))

    def take_finished(self) -> list[str]:
        """Forget the replies that are over; their ids."""
        finished = [reply.context_id for reply in self if reply.finished]
        for context_id in finished:
            del self._replies[context_id]
        return finished

    def drop(self, context_id: str) -> None:
        """Forget a reply that the server has ended."""
        self._replies.pop(context_id, None)

    def clear(self) -> None:
        """Forget everything."""
        self._replies.clear()
        self._cancels.clear()
        self.on_hold = False

    def _wire_id(self, context_id: str) -> str:
        return f"{context_id[:50]}.{next(self._numbers)}"
