"""The sessions that are open, whatever carries them, and how they are drained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from qwen_megakernel.serving.admission import Admission
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session, SessionRules
from qwen_megakernel.turn import RequestError


class OpenSessions:
    """All open sessions of a server."""

    def __init__(self, admission: Admission, get_ready: Callable[[], ServerState]) -> None:
        """Begin with none.

        Args:
            admission: decides who is let in.
            get_ready: what sessions share; raises `NotAdmitted` while the server takes no clients.
        """
        self._admission, self.get_ready = admission, get_ready
        self._sessions: set[Session] = set()
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def unsent_bytes(self) -> int:
        """Bytes held for all clients."""
        return sum(session.unsent_bytes for session in self._sessions)

    @contextmanager
    def admit(self, address: str | None, rules: SessionRules | None = None) -> Iterator[Session]:
        """A session for one client. It counts, and is closed, with the context.

        Args:
            address: what the client is counted by with others (`access.client_address`).
            rules: of the dialect, where it is known.

        Raises:
            NotAdmitted: the server is not ready, or full, or the address has enough.
        """
        server = self.get_ready()
        session = Session(server, str(next(self._numbers)), rules, address)
        self._admission.enter(session)
        self._sessions.add(session)
        try:
            yield session
        finally:
            session.close()
            self._sessions.discard(session)
            self._admission.leave(session)

    async def drain(self, limit_s: float) -> None:
        """Let running turns end, up to a limit in seconds; then stop them and finish every session."""
        for session in self._sessions:
            session.drain()
        await self._until(self._idle, limit_s)
        for session in self._sessions:
            if session.busy:
                session.cancel()
        await self._until(self._idle, 1.0)
        for session in self._sessions:
            session.finish("going_away")
        await self._until(lambda: not self._sessions, 2.0)

    async def fail(self, failure: RequestError) -> None:
        """Tell all clients that nothing more can be spoken, and finish every session."""
        for session in self._sessions:
            session.fail(failure)
        await self._until(lambda: not self._sessions, 2.0)

    def _idle(self) -> bool:
        return not any(session.busy for session in self._sessions)

    @staticmethod
    async def _until(condition: Callable[[], bool], limit_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + limit_s
        while not condition() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
