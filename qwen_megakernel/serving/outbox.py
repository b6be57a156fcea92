"""What is on its way to a client, in order, until the client's carrier takes it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from qwen_megakernel.serving.context import Context
from qwen_megakernel.serving.events import SegmentDone, SessionEvent
from qwen_megakernel.turn import Audio

MAX_MESSAGES = 64
"""Entries without audio that may wait before `until_short` does."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Ends a context, once all that waits before it was taken."""


@dataclass(frozen=True, slots=True)
class Output:
    """Something of a context that is accounted for when it is taken."""

    context: Context
    what: Audio | SegmentDone | Ended


Entry = Output | SessionEvent


class Outbox:
    """A queue with one reader that knows how many bytes of audio wait in it."""

    def __init__(self) -> None:
        self.unsent_bytes = 0
        """Of float32 audio."""
        self._entries: deque[Entry] = deque()
        self._num_messages = 0
        self._filled = asyncio.Event()
        self._short = asyncio.Event()

    def put(self, entry: Entry) -> None:
        """Add an entry. Audio is bounded by the session, replies by `until_short`."""
        self._count(entry, 1)
        self._entries.append(entry)
        self._filled.set()

    async def get(self) -> Entry:
        """The next entry, when there is one."""
        while not self._entries:
            self._filled.clear()
            await self._filled.wait()
        entry = self._entries.popleft()
        self._count(entry, -1)
        return entry

    def drop(self, context: Context) -> None:
        """Forget the audio and the segments of a context; its end stays in its place."""
        entries, self._entries = self._entries, deque()
        for entry in entries:
            match entry:
                case Output(owner, Audio() | SegmentDone()) if owner is context:
                    self._count(entry, -1)
                case _:
                    self._entries.append(entry)

    async def until_short(self) -> None:
        """Wait while too much waits that is not audio."""
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
