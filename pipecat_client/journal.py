"""Text that the server has not spoken yet: what to send, and what to send again.

The service first writes every text into the journal, and then sends what `take` gives. A broken
connection loses nothing: `restart` takes back the text that was not spoken, and the interrupted sentence
goes on at the sample where it broke off. For this, each segment has a seed of its own: the same text,
voice and seed give the same speech, so samples that were heard before are dropped when they come again.
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
    """The options in `Speak`."""
    opens_context: bool
    """Whether it needs a new context, because the one of the segment before has no room for it."""
    texts: list[str] = field(default_factory=list)
    complete: bool = False
    num_sent: int = 0
    """Texts that were sent on this connection."""
    flushed: bool = False
    num_received: int = 0
    """New samples that have come, over all connections."""
    num_to_drop: int = 0
    """Samples that will come again and are dropped."""

    @property
    def blank(self) -> bool:
        """Whether there is nothing to say yet. The server makes no segment of such text."""
        return not any(text.strip() for text in self.texts)

    def rewind(self) -> None:
        """Send it again from the start, and drop the samples that were heard before."""
        self.texts = ["".join(self.texts)]
        self.num_sent, self.flushed = 0, False
        self.num_to_drop = self.num_received


@dataclass(slots=True)
class Reply:
    """One Pipecat context. It has another id on the wire, because the server takes each id only once."""

    context_id: str
    wire_id: str
    segments: deque[Segment] = field(default_factory=deque)
    """The segments that are not wholly spoken."""
    ended: bool = False
    num_samples: int = 0
    """Samples that `receive` has returned."""
    num_refusals: int = 0
    """Refusals in a row, without new audio between them."""
    num_chars: int = 0
    is_open: bool = False
    end_sent: bool = False
    num_segments_spoken: int = 0
    """Segments that were spoken in the present context of the server."""

    @property
    def goes_on(self) -> bool:
        """Whether segments that are wholly spoken have made a sound, or a pause."""
        return self.num_samples > sum(segment.num_received for segment in self.segments)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to say, and nothing more will come from the server."""
        return self.ended and not self.segments and not self.is_open

    def receive(self, samples: bytes) -> bytes:
        """Take audio. Returns the part of it that is new."""
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
        """Remove the segments up to `index`: the server has spoken them."""
        while self.segments and self.num_segments_spoken <= index:
            self.segments.popleft()
            self.num_segments_spoken += 1

    def close(self) -> None:
        """End the server's context. Segments that it has never seen need another one."""
        while self.segments and self.segments[0].num_sent:
            self.segments.popleft()

    def rewind(self, wire_id: str) -> None:
        """Send what is not spoken again, in a new context of the server."""
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
        """The server's limits, once it is connected."""
        self.on_hold = False
        """Whether to send no text for the moment. Cancels still go out."""
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
        """Add text to a reply. `complete` ends its segment. `options` apply if the text begins one."""
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
        """Complete the text of a reply's last segment, if it has something to say."""
        reply = self._replies.get(context_id)
        if reply is not None and reply.segments and not reply.segments[-1].blank:
            reply.segments[-1].complete = True

    def end(self, context_id: str) -> None:
        """Complete the reply's text."""
        reply = self._replies.get(context_id)
        if reply is not None:
            reply.ended = True
            if reply.segments:
                reply.segments[-1].complete = True

    def cancel(self, context_id: str) -> None:
        """Forget a reply, and let the server stop it."""
        reply = self._replies.pop(context_id, None)
        if reply is not None and reply.is_open:
            self._cancels.append(reply.wire_id)

    # --- what goes out

    def take(self) -> ClientMessage | None:
        """The next message to send, if any. It counts as sent from now on."""
        if self._cancels:
            return Cancel(self._cancels.popleft())
        if self.on_hold:
            return None
        # Replies beyond the limit wait until a `done` makes room.
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
                # The server adds a segment's index to the seed. Here each segment has its own seed.
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
        """Whether a reply goes on in another context, which must be spoken before later replies."""
        return reply.end_sent and any(segment.num_sent == 0 for segment in reply.segments)

    # --- what comes in

    def done(self, reply: Reply) -> None:
        """Note that the server has ended the reply's context."""
        reply.close()
        reply.rewind(self._wire_id(reply.context_id))

    def postpone(self, reply: Reply) -> None:
        """Keep a reply for later, because the server has refused or given up its context."""
        reply.num_refusals += 1
        reply.rewind(self._wire_id(reply.context_id))
        self.on_hold = True

    def restart(self, limits: Limits, *, trims: bool = False) -> None:
        """Start over on a new connection, on which the server knows no context.

        `trims`: whether the server by default leaves out the silence before a context's first sound.
        """
        self.limits, self.trims = limits, trims
        self.on_hold = False
        self._cancels.clear()
        for reply in self:
            reply.rewind(self._wire_id(reply.context_id))

    def take_finished(self) -> list[str]:
        """Forget the replies that are over. Returns their ids."""
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
