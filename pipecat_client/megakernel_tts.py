"""The server as a Pipecat text-to-speech service.

    tts = MegakernelTTSService(
        url="ws://127.0.0.1:8765",
        settings=MegakernelTTSService.Settings(voice="default", language="en"),
    )

One connection carries all turns. A Pipecat context (a bot turn) is a context of the server, a
sentence is one of its segments. Interruptions cancel the context and keep the connection; settings
change from one sentence to the next; a server that restarts is waited for, and speech goes on
where it broke off (`journal`). Words are timed by estimate (`word_timing`).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

from loguru import logger
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    MetricsFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TextAggregationMode, WebsocketTTSService
from pipecat.services.websocket_service import ReportErrorCallback, WebsocketService
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.network import QuickFailureTracker, exponential_backoff_time
from pipecat.utils.tracing.service_decorators import traced_tts
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from pipecat_client.handshake import ServerError, open_connection
from pipecat_client.journal import Journal, Reply
from pipecat_client.settings import MegakernelTTSSettings, ServerTTSMetricsData
from pipecat_client.word_timing import Pace, TimedWord, WordClock
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Done,
    Error,
    Progress,
    Segment,
    Started,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.wire import LANGUAGE_CODES, ProtocolError

RETRY_S = 1.0
"""Until text is sent again that a busy server has refused."""
MAX_REFUSALS = 30
_CATEGORIES = {"overloaded": ErrorCategory.RATE_LIMIT, "internal": ErrorCategory.SERVER}
"""Of an error inside a context; never one that would mute the bot for the session."""


@dataclass(slots=True)
class _Playback:
    """What is known of a context until it has been played."""

    clock: WordClock
    asked_at: float
    """Wall clock, like all of Pipecat's metrics."""
    first_audio_at: float | None = None
    ttfb_reported: bool = False


class MegakernelTTSService(WebsocketTTSService):
    """Qwen3-TTS from this project's server, over one WebSocket.

    Where metrics are enabled, the server's own figures of each turn come as `ServerTTSMetricsData`.
    """

    Settings = MegakernelTTSSettings
    _settings: MegakernelTTSSettings

    def __init__(
        self,
        *,
        url: str = "ws://127.0.0.1:8765",
        token: str | None = None,
        settings: MegakernelTTSSettings | None = None,
        text_aggregation_mode: TextAggregationMode | None = None,
        word_timestamps: Literal["estimated", "off"] = "estimated",
        sample_rate: int = 24_000,
        max_reconnect_attempts: int = 20,
        **kwargs: Any,
    ) -> None:
        """Make the service; it connects when the pipeline is set up.

        Args:
            url: Where `server.py` listens.
            token: The server's secret, if it has one.
            settings: Voice, language and the rest; see `Settings`.
            text_aggregation_mode: `SENTENCE` (default) speaks whole sentences; `TOKEN` hands each
                token of the LLM on, and speech begins some words into the first sentence.
            word_timestamps: `estimated` has the conversation hold what was heard when the bot is
                interrupted; `off` has it hold whole sentences once they were sent.
            sample_rate: 8000, 16000, 24000 (the model's own) or 48000, made by the server.
            max_reconnect_attempts: Tries before the service gives up; 20 take about 90 s. A connection
                that breaks within 5 s and has brought no new speech counts as a try.
            **kwargs: Of `WebsocketTTSService`.
        """
        store = self.Settings.defaults()
        if settings is not None:
            store.apply_update(settings)
        kwargs.setdefault("reconnect_backoff_min_wait", 0.5)
        kwargs.setdefault("reconnect_backoff_max_wait", 5.0)
        # Longer than any pause between two signs of life: progress messages and reconnects.
        kwargs.setdefault("stop_frame_timeout_s", 10.0)
        super().__init__(
            text_aggregation_mode=text_aggregation_mode,
            push_start_frame=True,
            push_stop_frames=True,
            push_text_frames=word_timestamps == "off",
            pause_frame_processing=False,
            sample_rate=sample_rate,
            settings=store,
            **kwargs,
        )
        self._url = url
        self._token = token
        self._times_words = word_timestamps == "estimated"
        self._max_reconnect_attempts = max_reconnect_attempts
        # Connections in a row that broke within seconds and brought nothing new.
        self._quick_failure_tracker = QuickFailureTracker(
            max_consecutive_failures=max_reconnect_attempts
        )
        self._journal = Journal()
        self._playbacks: dict[str, _Playback] = {}
        self._paces: defaultdict[str | None, Pace] = defaultdict(Pace)
        self._stream: Started | None = None
        self._next_sequence = 0
        self._sending = asyncio.Lock()
        self._receive_task: asyncio.Task[None] | None = None
        self._retry_task: asyncio.Task[None] | None = None

    # --- what Pipecat asks

    def can_generate_metrics(self) -> bool:
        """Yes: TTFB, TTFA and usage, and the server's figures."""
        return True

    def language_to_service_language(self, language: Language) -> str:
        """English names, as the server has them; a region (`en-GB`) counts as its language."""
        code = str(language.value).split("-")[0].lower()
        return LANGUAGE_CODES.get(code, code)

    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]
        """Set up and connect."""
        await super().setup(setup)
        await self._connect()

    @traced_tts
    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Ask for a sentence, or in token mode for a piece of one; audio comes on its own."""
        if len(text) > self._journal.limits.max_text_chars:
            limit = self._journal.limits.max_text_chars
            yield ErrorFrame(
                f"a text of {len(text)} characters was not spoken; the server takes {limit}",
                category=ErrorCategory.APPLICATION,
            )
            return
        options = self._settings.speak_fields()
        complete = not self._is_streaming_tokens
        self._journal.speak(context_id, text, complete=complete, **options)
        playback = self._playbacks.get(context_id)
        if playback is None:
            clock = WordClock(self._paces[options["voice"]])
            playback = self._playbacks[context_id] = _Playback(clock, asked_at=time.time())
        playback.clock.append(text)
        if complete:
            playback.clock.complete_segment()
        await self.start_tts_usage_metrics(text)
        if self._receive_task is None or self._receive_task.done():
            await self._connect()
        await self._send_due()
        yield None

    async def flush_audio(self, context_id: str | None = None) -> None:
        """The turn's text is complete."""
        context_id = context_id or self.get_active_audio_context_id()
        if context_id:
            self._journal.end(context_id)
            await self._send_due()

    async def on_turn_context_completed(self) -> None:
        """Close the context of a turn that was never asked for: no `done` would."""
        context_id = self._turn_context_id
        await super().on_turn_context_completed()
        if context_id and context_id not in self._journal:
            await self._finish(context_id)

    async def on_audio_context_interrupted(self, context_id: str) -> None:
        """Stop the server at its next frame."""
        await self._forget(context_id)
        await super().on_audio_context_interrupted(context_id)

    async def on_audio_context_completed(self, context_id: str) -> None:
        """Free what is left; the server still speaks only if Pipecat has given the context up."""
        await self._forget(context_id)
        await super().on_audio_context_completed(context_id)

    async def _forget(self, context_id: str) -> None:
        self._playbacks.pop(context_id, None)
        self._journal.cancel(context_id)
        await self._send_due()

    async def _update_settings(self, delta: TTSSettings) -> dict[str, Any]:  # type: ignore[override]
        changed = await super()._update_settings(delta)
        if "model" in changed:
            self._warn_unhandled_updated_settings({"model"})  # the server's to choose
        return changed

    # --- time to first byte: one for each context, as contexts overlap

    async def start_ttfb_metrics(self, *, start_time: float | None = None) -> None:
        """Nothing: `run_tts` notes when each context was asked for."""

    async def stop_ttfb_metrics(self, *, end_time: float | None = None) -> None:
        """Report the context that has begun to play, from the arrival of its first audio."""
        playback = self._playbacks.get(self.get_active_audio_context_id() or "")
        if playback is None or playback.first_audio_at is None or playback.ttfb_reported:
            return
        playback.ttfb_reported = True
        await super().start_ttfb_metrics(start_time=playback.asked_at)
        await super().stop_ttfb_metrics(end_time=playback.first_audio_at)

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
        self._playbacks.clear()
        await self._disconnect_websocket()

    async def _connect_websocket(self) -> None:
        if self._is_connected():
            return
        assert self._init_sample_rate is not None  # __init__ gives it
        websocket, ready = await open_connection(
            self._websocket_connect, self._url, self._token, self._init_sample_rate
        )
        self._journal.restart(ready.limits)
        self._stream = None
        self._websocket = websocket
        logger.debug(f"{self}: connected to {ready.server} at {self._url}")
        await self._call_event_handler("on_connected")
        voice = self._settings.voice
        if isinstance(voice, str) and voice.lower() not in map(str.lower, ready.voices):
            known = ", ".join(ready.voices) or "none"
            await self.push_error(
                f"voice {voice} is unknown at {self._url}; known: {known}",
                category=ErrorCategory.APPLICATION,
            )
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
        """Receive and reconnect; what is left unspoken at the end is closed."""
        connected = self._websocket is not None
        if not connected and self._reconnect_on_error:
            connected = await self._try_reconnect(report_error=self._report_error)
        if connected:
            await self._receive_task_handler(self._report_error)
        for reply in self._journal:
            self._journal.drop(reply.context_id)
            await self._finish(reply.context_id)

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
            # Not our base's: it would close the contexts, and we can resume them.
            return await WebsocketService._reconnect_websocket(self, attempt_number)
        finally:
            self._keep_alive()

    def _keep_alive(self) -> None:
        for reply in self._journal:
            self._refresh_audio_context(reply.context_id)

    # --- sending

    async def _send_due(self) -> None:
        """Send what the journal has; what a broken connection swallows is sent over the next."""
        async with self._sending:
            try:
                while (
                    self._is_connected()
                    and self._websocket is not None
                    and (message := self._journal.take()) is not None
                ):
                    await self._websocket.send(encode(message))
            except ConnectionClosed:
                logger.debug(f"{self}: connection lost while sending")
        await self._finish_spoken()

    async def _finish_spoken(self) -> None:
        for context_id in self._journal.take_finished():
            await self._finish(context_id)

    def _retry_soon(self) -> None:
        if self._retry_task is None or self._retry_task.done():
            self._retry_task = self.create_task(self._retry(), name="retry")

    async def _retry(self) -> None:
        await asyncio.sleep(RETRY_S)
        self._keep_alive()
        self._journal.on_hold = False
        await self._send_due()

    # --- receiving

    async def _receive_messages(self) -> None:
        assert self._websocket is not None, "not connected"
        async for data in self._websocket:
            try:
                message = parse_server_message(data)
            except ProtocolError as error:
                logger.debug(f"{self}: passed over: {error}")
                continue
            match message:
                case AudioChunk():
                    await self._on_audio(message)
                case Started():  # contexts are spoken one after another
                    self._stream, self._next_sequence = message, 0
                case Progress():
                    reply = self._journal.find(message.context_id)
                    if reply is not None and message.state != "waiting_for_text":
                        self._refresh_audio_context(reply.context_id)
                case Segment():
                    await self._on_segment(message)
                case Done():
                    await self._on_done(message)
                case Error():
                    await self._on_error(message)

    async def _on_audio(self, chunk: AudioChunk) -> None:
        if self._stream is None or chunk.stream != self._stream.stream:
            logger.error(f"{self}: audio of stream {chunk.stream}, which has not started")
            return
        if chunk.sequence != self._next_sequence:
            logger.error(f"{self}: audio {chunk.sequence} came instead of {self._next_sequence}")
        self._next_sequence = chunk.sequence + 1
        reply = self._journal.find(self._stream.context_id)
        if reply is None:
            return  # cancelled meanwhile
        samples = reply.receive(chunk.samples)
        if not samples:
            # Heard before the connection broke; the next new sample may be a while away.
            self._refresh_audio_context(reply.context_id)
            return
        self._quick_failure_tracker.reset()
        playback = self._playbacks.get(reply.context_id)
        if playback is not None and playback.first_audio_at is None:
            playback.first_audio_at = time.time()
        frame = TTSAudioRawFrame(samples, self.sample_rate, 1, context_id=reply.context_id)
        await self.append_to_audio_context(reply.context_id, frame)
        if playback is not None:
            words = playback.clock.advance(reply.num_samples / self.sample_rate)
            await self._add_words(reply.context_id, words)

    async def _on_segment(self, segment: Segment) -> None:
        reply = self._journal.find(segment.context_id)
        if reply is None:
            return
        self._quick_failure_tracker.reset()
        reply.end_segment(segment.index)
        playback = self._playbacks.get(reply.context_id)
        if playback is not None:
            words = playback.clock.end_segment(reply.num_samples / self.sample_rate)
            await self._add_words(reply.context_id, words)

    async def _on_done(self, done: Done) -> None:
        reply = self._journal.find(done.context_id)
        if reply is None:
            return  # the answer to a cancel
        await self._push_server_metrics(done)
        if done.finish_reason == "error":
            self._journal.drop(reply.context_id)
            await self._finish(reply.context_id)
        elif done.finish_reason == "cancelled":
            await self._postpone(reply, "the server has stopped it")
        else:
            self._journal.done(reply)
            await self._send_due()

    async def _on_error(self, error: Error) -> None:
        reply = self._journal.find(error.context_id)
        if error.context_id is not None and reply is None:
            logger.debug(f"{self}: about a context that is over: {error.message} ({error.code})")
        elif error.code == "overloaded" and reply is not None:
            await self._postpone(reply, error.message)
        else:
            category = _CATEGORIES.get(error.code, ErrorCategory.APPLICATION)
            await self.push_error(f"{error.message} ({error.code})", category=category)

    async def _postpone(self, reply: Reply, reason: str) -> None:
        """Ask again in a while, unless that has been done too often."""
        logger.warning(f"{self}: {reason}; asking again in {RETRY_S:g} s")
        self._journal.postpone(reply)
        if reply.num_refusals > MAX_REFUSALS:
            self._journal.drop(reply.context_id)
            message = f"gave up after {MAX_REFUSALS} refusals: {reason}"
            await self.push_error(message, category=ErrorCategory.RATE_LIMIT)
            await self._finish(reply.context_id)
        self._refresh_audio_context(reply.context_id)
        self._retry_soon()

    # --- handing on

    async def _add_words(self, context_id: str, words: list[TimedWord]) -> None:
        if self._times_words:
            for word in words:
                await self.add_word_timestamps(
                    [(word.text, word.time_s)],
                    context_id,
                    includes_inter_frame_spaces=not word.spaced,
                )

    async def _finish(self, context_id: str) -> None:
        """All audio of a context is here."""
        if self.audio_context_available(context_id):
            await self.append_to_audio_context(context_id, TTSStoppedFrame(context_id=context_id))
            await self.remove_audio_context(context_id)

    async def _push_server_metrics(self, done: Done) -> None:
        if self.metrics_enabled:
            model = self._settings.model
            data = ServerTTSMetricsData.of(done, self.name, model if isinstance(model, str) else None)
            await self.push_frame(MetricsFrame(data=[data]))
