"""Carries calls from the engine's thread to the event loop. Calls that come together wake it once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from qwen_megakernel.serving.observe import log


class Mailbox:
    """Calls for an event loop, in order."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False

    def post(self, loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
        """Let the loop call a function, from the engine's thread. A closed loop calls nothing."""
        self._calls.append((function, args))
        if self._woken:
            return  # the loop is awake and will take this call too
        self._woken = True
        try:
            loop.call_soon_threadsafe(self._empty)
        except RuntimeError:  # the loop is closed: the process ends, and nobody listens
            self._calls.clear()
            self._woken = False

    def _empty(self) -> None:
        self._woken = False  # before the loop looks: any later post wakes it again
        for _ in range(len(self._calls)):
            function, args = self._calls.popleft()
            try:
                function(*args)
            except Exception:
                log.exception("an event of the engine could not be delivered")
