"""All open sessions, whatever carries them, and how they are drained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

from qwen_megakernel.serving.admission import Admission, NotAdmitted
from qwen_megakernel.serving.observe import edge_log
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.turn import RequestError

GIVE_WAY_S = 60.0
"""Seconds of silence after which a connection may be closed for a new one."""
request_token: ContextVar[str | None] = ContextVar("request_token", default=None)
"""The name of the current request's token. It is set where tokens are checked, so that no dialect can
forget to count it."""


class OpenSessions:
    """All open sessions of a server."""

    def __init__(self, admission: Admission, get_ready: Callable[[], ServerState]) -> None:
        """Begin without sessions.

        Args:
            admission: decides who is let in.
            get_ready: gives what sessions share. Raises `NotAdmitted` while the server takes no clients.
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
        """A session for one client. It counts until the `with` block ends, and is closed then.

        Args:
            address: the address that the client counts under (`access.client_address`).
            rules: of the dialect; None if the first message decides on the dialect.

        Raises:
            NotAdmitted: the server is not ready or full, or the address or the token has no connection
                left.
        """
        server = self.get_ready()
        session = Session(server, str(next(self._numbers)), rules, address, request_token.get())
        try:
            self._enter(session)
        except NotAdmitted:
            session.close()
            raise
        self._sessions.add(session)
        try:
            yield session
        finally:
            session.close()
            self._sessions.discard(session)
            self._admission.leave(session)

    def _enter(self, session: Session) -> None:
        """Count a session. If all connections are taken, the one with the longest silence gives way, if
        that is at least `GIVE_WAY_S`."""
        try:
            self._admission.enter(session)
        except NotAdmitted as refusal:
            silent = max(self._sessions, key=lambda other: other.silent_s, default=session)
            if refusal.own_limit or silent.silent_s < GIVE_WAY_S:
                raise
            edge_log.info(
                "connection %s: gives way after %.0f s of silence", silent.name, silent.silent_s
            )
            silent.finish("idle")
            self._sessions.discard(silent)
            self._admission.leave(silent)
            self._admission.enter(session)

    async def drain(self, limit_s: float) -> None:
        """Let running turns end within `limit_s`. Then stop them and finish every session."""
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
        """Tell all clients that the server can speak no more, and finish every session."""
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
