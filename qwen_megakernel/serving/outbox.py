"""The queue of events for one client, until its carrier takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from qwen_megakernel.serving.context import Context
from qwen_megakernel.serving.events import SegmentDone, SessionEvent
from qwen_megakernel.turn import Audio

MAX_MESSAGES = 64
"""`until_short` waits while more entries than this, without those of audio, are in the queue."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Ends a context, once the carrier has taken all entries before it."""


@dataclass(frozen=True, slots=True)
class Output:
    """Output of a context. The session accounts for it when the carrier takes it."""

    context: Context
    what: Audio | SegmentDone | Ended


Entry = Output | SessionEvent


class Outbox:
    """A queue with one reader. It counts the bytes of audio that wait in it."""

    def __init__(self) -> None:
        self.unsent_bytes = 0
        """Bytes of float32 audio in the queue."""
        self._entries: deque[Entry] = deque()
        self._num_messages = 0
        self._filled = asyncio.Event()
        self._short = asyncio.Event()

    def put(self, entry: Entry) -> None:
        """Add an entry. The session bounds audio, and `until_short` bounds replies."""
        self._count(entry, 1)
        self._entries.append(entry)
        self._filled.set()

    async def get(self) -> Entry:
        """Wait for the next entry and take it."""
        while not self._entries:
            self._filled.clear()
            await self._filled.wait()
        entry = self._entries.popleft()
        self._count(entry, -1)
        return entry

    def drop(self, context: Context) -> None:
        """Remove the audio and the segment ends of a context. The context's own end keeps its place."""
        entries, self._entries = self._entries, deque()
        for entry in entries:
            match entry:
                case Output(owner, Audio() | SegmentDone()) if owner is context:
                    self._count(entry, -1)
                case _:
                    self._entries.append(entry)

    async def until_short(self) -> None:
        """Wait while the queue has too many entries that are not audio."""
        if self._num_messages > MAX_MESSAGES:
            self._short.clear()
            await self._short.wait()

    def _count(self, entry: Entry, sign: int) -> None:
        if isinstance(entry, Output) and isinstance(entry.what, Audio):
            self.unsent_bytes += sign * entry.what.samples.nbytes
            return
        self._num_messages += sign
        if self._num_messages <= MAX_MESSAGES // 2:
            self._short.set()
