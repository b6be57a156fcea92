"""A Pipecat service that keeps a connection to the server and sends what its journal holds.

It reconnects when the connection breaks, and sends the contents of the journal again.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import Any

from loguru import logger
from pipecat.frames.frames import ErrorFrame, TTSStoppedFrame
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.services.tts_service import WebsocketTTSService
from pipecat.services.websocket_service import ReportErrorCallback, WebsocketService
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.network import QuickFailureTracker, exponential_backoff_time
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from pipecat_client.handshake import ServerError, open_connection
from pipecat_client.journal import Journal
from qwen_megakernel.serving.native_messages import Ready, encode

RETRY_S = 1.0
"""Seconds until refused text is sent again, if the server has not said when."""
MAX_RETRY_S = 60.0
"""The longest wait in seconds that a server can ask for."""
KEEP_ALIVE_S = 1.0
"""Seconds between two signs to Pipecat that a waiting reply is not over. It gives up after 10 s."""


class JournalTTSService(WebsocketTTSService):
    """The connection of a service. The subclass handles incoming messages."""

    def __init__(
        self,
        *,
        url: str,
        token: str | None,
        sample_rate: int,
        max_reconnect_attempts: int,
        **kwargs: Any,
    ) -> None:
        """The arguments are those of `MegakernelTTSService`."""
        kwargs.setdefault("reconnect_backoff_min_wait", 0.5)
        kwargs.setdefault("reconnect_backoff_max_wait", 5.0)
        super().__init__(sample_rate=sample_rate, **kwargs)
        self._url = url
        self._token = token
        self._requested_sample_rate = sample_rate
        self._max_reconnect_attempts = max_reconnect_attempts
        # Counts connections in a row that broke within seconds and brought nothing new.
        self._quick_failure_tracker = QuickFailureTracker(
            max_consecutive_failures=max_reconnect_attempts
        )
        self._journal = Journal()
        self._sending = asyncio.Lock()
        self._receive_task: asyncio.Task[None] | None = None
        self._retry_task: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        """When refused text is sent again, by the event loop's clock."""

    # Pipecat's processors take another argument than its BaseObject.
    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]
        """Set up and connect."""
        await super().setup(setup)
        await self._connect()

    @abstractmethod
    async def _on_ready(self, ready: Ready) -> None:
        """Called when a connection is open, before anything is sent on it."""

    @abstractmethod
    async def _finish(self, context_id: str) -> None:
        """Called when a reply was spoken to its end."""

    @abstractmethod
    async def _fail(self, context_id: str) -> None:
        """Called when a reply will not be spoken to its end."""

    # --- connection

    async def _connect(self) -> None:
        await super()._connect()
        if self._receive_task is not None and not self._receive_task.done():
            return
        try:
            await self._connect_websocket()
        except Exception as error:
            await self._report_error(ErrorFrame(f"{error}", exception=error))
        self._receive_task = self.create_task(self._receive_until_given_up(), name="receive")

    async def _disconnect(self) -> None:
        await super()._disconnect()
        for task in (self._receive_task, self._retry_task):
            if task is not None:
                await self.cancel_task(task)
        self._receive_task = self._retry_task = None
        self._journal.clear()
        await self._disconnect_websocket()

    async def _connect_websocket(self) -> None:
        if self._is_connected():
            return
        websocket, ready = await open_connection(
            self._websocket_connect, self._url, self._token, self._requested_sample_rate
        )
        self._journal.restart(ready.limits, trims=bool(ready.trim_leading_silence))
        self._websocket = websocket
        logger.debug(f"{self}: connected to {ready.server} at {self._url}")
        await self._call_event_handler("on_connected")
        await self._on_ready(ready)
        await self._send_due()

    def _classify_error(self, exception: Exception) -> ErrorCategory | None:
        if isinstance(exception, ServerError) and exception.final:
            return ErrorCategory.INVALID_REQUEST
        return super()._classify_error(exception)

    async def _disconnect_websocket(self) -> None:
        websocket, self._websocket = self._websocket, None
        if websocket is not None:
            await websocket.close()
            await self._call_event_handler("on_disconnected")

    def _is_connected(self) -> bool:
        return self._websocket is not None and self._websocket.state is State.OPEN

    async def _receive_until_given_up(self) -> None:
        """Receive and reconnect. At the end, fail the replies that are not spoken."""
        connected = self._websocket is not None
        if not connected and self._reconnect_on_error:
            connected = await self._try_reconnect(report_error=self._report_error)
        if connected:
            await self._receive_task_handler(self._report_error)
        for reply in self._journal:
            self._journal.drop(reply.context_id)
            await self._fail(reply.context_id)

    async def _try_reconnect(
        self, max_retries: int | None = None, report_error: ReportErrorCallback | None = None
    ) -> bool:
        return await super()._try_reconnect(max_retries or self._max_reconnect_attempts, report_error)

    async def _reconnect_websocket(self, attempt_number: int) -> bool:
        if self._websocket is not None:
            message = f"{self._url}: connection lost; speech goes on when it is back"
            await self._report_error(ErrorFrame(message, category=ErrorCategory.CONNECTIVITY))
        self._keep_alive()
        num_failures = self._quick_failure_tracker.count
        if attempt_number == 1 and num_failures > 1:
            await asyncio.sleep(
                exponential_backoff_time(
                    num_failures - 1,
                    min_wait=self._reconnect_backoff_min_wait,
                    max_wait=self._reconnect_backoff_max_wait,
                )
            )
            self._keep_alive()
        try:
            # Not the base class's method: that closes the contexts, which this class can resume.
            return await WebsocketService._reconnect_websocket(self, attempt_number)
        finally:
            self._keep_alive()

    def _keep_alive(self) -> None:
        for reply in self._journal:
            self._refresh_audio_context(reply.context_id)

    # --- sending

    async def _send_due(self) -> None:
        """Send what the journal has. What a broken connection loses goes out over the next one."""
        async with self._sending:
            try:
                while (websocket := self._websocket) is not None and self._is_connected():
                    if (message := self._journal.take()) is None:
                        break
                    await websocket.send(encode(message))
            except ConnectionClosed:
                logger.debug(f"{self}: connection lost while sending")
        await self._finish_spoken()

    async def _finish_spoken(self) -> None:
        for context_id in self._journal.take_finished():
            await self._finish(context_id)

    def _retry_in(self, delay_s: float) -> None:
        """Send refused text again after `delay_s`. After several refusals the latest time counts."""
        delay_s = min(delay_s, MAX_RETRY_S)
        self._retry_at = max(self._retry_at, asyncio.get_running_loop().time() + delay_s)
        if self._retry_task is None or self._retry_task.done():
            self._retry_task = self.create_task(self._retry(), name="retry")

    async def _retry(self) -> None:
        loop = asyncio.get_running_loop()
        while (left_s := self._retry_at - loop.time()) > 0:
            await asyncio.sleep(min(left_s, KEEP_ALIVE_S))
            self._keep_alive()
        self._journal.on_hold = False
        await self._send_due()

    async def _close(self, context_id: str) -> None:
        """Close a context, because all its audio is here."""
        if self.audio_context_available(context_id):
            await self.append_to_audio_context(context_id, TTSStoppedFrame(context_id=context_id))
            await self.remove_audio_context(context_id)
