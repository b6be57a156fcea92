"""Which language a client speaks: its first message decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from qwen_megakernel.serving.connection import Dialect
from qwen_megakernel.serving.wire import ProtocolError, parse_object


class DialectSwitch:
    """A dialect that becomes one of two: native for an object with a `type`, else the original."""

    def __init__(self, native: Callable[[], Dialect], original: Callable[[], Dialect]) -> None:
        """Take what makes each of them."""
        self._native, self._original = native, original
        self._chosen: Dialect | None = None

    @property
    def busy(self) -> bool:
        """Whether a turn runs."""
        return self._chosen is not None and self._chosen.busy

    @property
    def unsent_bytes(self) -> int:
        """Audio that waits for the socket."""
        return self._chosen.unsent_bytes if self._chosen else 0

    def receive(self, data: str | bytes) -> None:
        """Choose, if that is not done, and hand on."""
        if self._chosen is None:
            self._chosen = self._native() if _is_native(data) else self._original()
        self._chosen.receive(data)

    async def write(self, item: Any, send: Callable[[str | bytes], Awaitable[None]]) -> None:
        """Only a chosen dialect posts items."""
        await self._chosen.write(item, send)

    def discard(self, item: Any) -> None:
        """As `write`."""
        self._chosen.discard(item)

    def cancel(self) -> None:
        """Nothing runs before the choice."""
        if self._chosen is not None:
            self._chosen.cancel()

    def drain(self) -> None:
        """As `cancel`."""
        if self._chosen is not None:
            self._chosen.drain()

    def close(self) -> None:
        """As `cancel`."""
        if self._chosen is not None:
            self._chosen.close()


def _is_native(data: str | bytes) -> bool:
    try:
        return "type" in parse_object(data)
    except ProtocolError:
        return False
