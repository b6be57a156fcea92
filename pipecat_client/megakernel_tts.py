"""The server as a Pipecat text-to-speech service.

    tts = MegakernelTTSService(
        url="ws://127.0.0.1:8765",
        settings=MegakernelTTSService.Settings(voice="default", language="en"),
    )

One connection carries all turns. A Pipecat context (a bot turn) is a context of the server, and a
sentence is one of its segments. An interruption cancels the context and keeps the connection. Settings
can change with each sentence. The service waits for a server that restarts, and speech goes on where it
broke off (`journal`). The times of words are estimates (`word_timing`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any, Literal

from loguru import logger
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMTextFrame,
    MetricsFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSTextFrame,
)
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.settings import NotGiven, TTSSettings
from pipecat.services.tts_service import TextAggregationMode
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.tracing.service_decorators import traced_tts

from pipecat_client.journal import Reply
from pipecat_client.journal_service import RETRY_S
from pipecat_client.playback import Gaps, Playback
from pipecat_client.sentence_ends import SentenceEnds
from pipecat_client.settings import MegakernelTTSSettings, ServerTTSMetricsData
from pipecat_client.tags import TagWriters, new_aggregator
from pipecat_client.word_service import WordTTSService
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Done,
    Error,
    Progress,
    Ready,
    Segment,
    Started,
    parse_server_message,
)
from qwen_megakernel.serving.wire import LANGUAGE_CODES, ProtocolError
from qwen_megakernel.serving.word_timing import Pace
from qwen_megakernel.surrogates import SurrogateJoiner, repair

MAX_REFUSALS = 30
SENTENCE_PAUSE_S = 0.3
"""If no text comes for so many seconds after the end of a sentence, the sentence counts as complete."""
MAX_PAUSE_S = 30.0
"""If no text comes for so many seconds within a sentence, the words so far are spoken as a sentence of
their own. The server would give the sentence up after a minute."""
_CATEGORIES = {"overloaded": ErrorCategory.RATE_LIMIT, "internal": ErrorCategory.SERVER}
"""Pipecat's categories for errors inside a context. None of them mutes the bot for the session."""
_ENDED_BY_DONE = ("unknown_voice", "unknown_language", "unsupported", "internal")
"""Errors after which the server itself ends the context."""


class MegakernelTTSService(TagWriters, WordTTSService):
    """Qwen3-TTS from this project's server, over one WebSocket.

    If metrics are enabled, the server's own figures of each turn come as `ServerTTSMetricsData`.
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
        """Make the service. It connects when the pipeline is set up.

        Args:
            url: Where `server.py` listens.
            token: The server's secret, if it has one.
            settings: Voice, language and the rest; see `Settings`.
            text_aggregation_mode: `SENTENCE` (default) speaks whole sentences. `TOKEN` passes on each
                token of the LLM, and speech begins after a few words of a sentence.
            word_timestamps: `estimated`: when the bot is interrupted, the conversation keeps the words
                that were heard. `off`: it keeps whole sentences once they were sent.
            sample_rate: 8000, 16000, 24000 (the model's own) or 48000, made by the server.
            max_reconnect_attempts: Tries before the service gives up; 20 take about 90 s. A connection
                that breaks within 5 s without new speech counts as a try.
            **kwargs: Arguments of `WebsocketTTSService`.

        Raises:
            ValueError: no server takes one of the settings.
        """
        store = self.Settings.defaults()
        if settings is not None:
            store.apply_update(settings)
        store.check()
        # Longer than any pause between two signs of life: progress messages and reconnects.
        kwargs.setdefault("stop_frame_timeout_s", 10.0)
        super().__init__(
            url=url,
            token=token,
            max_reconnect_attempts=max_reconnect_attempts,
            text_aggregation_mode=text_aggregation_mode,
            push_start_frame=True,
            push_stop_frames=True,
            push_text_frames=word_timestamps == "off",
            pause_frame_processing=False,
            sample_rate=sample_rate,
            settings=store,
            times_words=word_timestamps == "estimated",
            **kwargs,
        )
        self._keep_tags_whole()
        self._paces: defaultdict[str | NotGiven | None, Pace] = defaultdict(Pace)
        self._surrogates = SurrogateJoiner()
        """Joins surrogates in the text that the LLM streams."""
        self._ready: Ready | None = None
        """The `ready` of the server; None before the first connection."""
        self._stream: Started | None = None
        self._next_sequence = 0

    # --- Pipecat's calls

    def can_generate_metrics(self) -> bool:
        """Yes: TTFB, TTFA and usage, and the server's figures."""
        return True

    def language_to_service_language(self, language: Language) -> str:
        """The server's name for a language. A region (`en-GB`) counts as its language."""
        code = str(language.value).split("-")[0].lower()
        return LANGUAGE_CODES.get(code, code)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Repair text that is not valid Unicode, which Pipecat cannot split into sentences."""
        if isinstance(frame, (LLMFullResponseEndFrame, EndFrame)):
            if half := self._surrogates.end():
                await super().process_frame(LLMTextFrame(half), direction)
        elif isinstance(frame, InterruptionFrame):
            self._surrogates.end()
        elif isinstance(frame, LLMTextFrame) or type(frame) is TextFrame:
            frame.text = self._surrogates.join(frame.text)
        elif isinstance(frame, (TextFrame, TTSSpeakFrame)):
            frame.text = repair(frame.text)
        await super().process_frame(frame, direction)

    @traced_tts
    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Ask for a sentence, or in token mode for a piece of one. The audio comes separately."""
        if len(text) > self._journal.limits.max_text_chars:
            limit = self._journal.limits.max_text_chars
            yield ErrorFrame(
                f"a text of {len(text)} characters was not spoken; the server takes {limit}",
                category=ErrorCategory.APPLICATION,
            )
            return
        playback = self._playbacks.get(context_id)
        if playback is None:
            pace = self._paces[self._settings.voice]
            playback = Playback.begin(pace, self.sample_rate, self._new_sentence_ends())
            self._playbacks[context_id] = playback
        if playback.state == "failed":
            yield None
            return
        if self._is_streaming_tokens:
            *sentences, rest = await playback.sentence_ends.split(text)
            for sentence in sentences:
                self._ask(context_id, playback, sentence, complete=True)
            self._ask(context_id, playback, rest, complete=False)
            loop = asyncio.get_running_loop()
            loop.call_later(SENTENCE_PAUSE_S, self._on_pause, context_id, playback.last_text_at)
        else:
            self._ask(context_id, playback, text, complete=True)
        await self.start_tts_usage_metrics(text)
        if self._receive_task is None or self._receive_task.done():
            await self._connect()
        await self._send_due()
        yield None

    def _ask(self, context_id: str, playback: Playback, text: str, *, complete: bool) -> None:
        """Ask for a text, which may end a sentence. An empty text can only end one."""
        if text:
            options = self._settings.speak_fields()
            self._journal.speak(context_id, text, complete=complete, **options)
            playback.append(text, lambda: self._settings.reader(self._ready))
        if complete:
            self._journal.complete(context_id)
            playback.complete_segment()

    def _new_sentence_ends(self) -> SentenceEnds:
        markup = self._settings.follows_tags(self._ready)
        return SentenceEnds(self.text_aggregation_language, markup=markup)

    def _keep_tags_whole(self) -> None:
        """If tags are followed, make Pipecat end no sentence within them."""
        if self._settings.markup is True:
            self._text_aggregator = new_aggregator(
                self._text_aggregation_mode, self.text_aggregation_language, markup=True
            )

    def _on_pause(self, context_id: str, last_text_at: float) -> None:
        """Complete the sentence if the LLM has ended one and written nothing since `last_text_at`."""
        playback = self._playbacks.get(context_id)
        if playback is None or playback.last_text_at != last_text_at:
            return
        if playback.sentence_ends.at_end:
            self.create_task(self._complete_sentence(context_id, playback), name="pause")

    async def _complete_sentence(self, context_id: str, playback: Playback) -> None:
        """Complete the sentence that the LLM has written, although the next one has not begun."""
        playback.end_sentence(self._new_sentence_ends())
        self._journal.complete(context_id)
        # Pipecat holds a sentence's words back until the next sentence begins.
        frames = await self._aggregated_frame_sequencer.finalize(context_id)
        await self._push_sequencer_frames(frames, context_id)
        await self._send_due()

    async def flush_audio(self, context_id: str | None = None) -> None:
        """Complete the turn's text."""
        context_id = context_id or self.get_active_audio_context_id()
        if context_id:
            self._journal.end(context_id)
            await self._send_due()

    async def on_turn_context_completed(self) -> None:
        """Close the context of a turn that was never asked for or has failed: it gets no `done`."""
        context_id = self._turn_context_id
        await super().on_turn_context_completed()
        playback = self._playbacks.get(context_id or "")
        spoken = playback is not None and playback.state == "spoken"
        if context_id and context_id not in self._journal and not spoken:
            await self._close(context_id)

    async def on_audio_context_interrupted(self, context_id: str) -> None:
        """Stop the server at its next frame."""
        await self._forget(context_id)
        await super().on_audio_context_interrupted(context_id)

    async def on_audio_context_completed(self, context_id: str) -> None:
        """Free the context. The server may still speak it, if Pipecat has given it up."""
        await self._forget(context_id)
        await super().on_audio_context_completed(context_id)

    async def _forget(self, context_id: str) -> None:
        self._playbacks.pop(context_id, None)
        self._journal.cancel(context_id)
        await self._send_due()

    async def _update_settings(self, delta: TTSSettings) -> dict[str, Any]:  # type: ignore[override]
        if (problem := self._problem_with(delta)) is not None:
            message = f"the settings stay as they are: {problem}"
            await self.push_error(message, category=ErrorCategory.APPLICATION)
            return {}
        changed = await super()._update_settings(delta)
        if "markup" in changed:
            self._keep_tags_whole()
        if "model" in changed:
            self._warn_unhandled_updated_settings({"model"})  # the server's to choose
        return changed

    def _problem_with(self, delta: TTSSettings) -> str | None:
        """Why the settings cannot be changed in this way; None if they can."""
        given = self.Settings()
        TTSSettings.apply_update(given, delta)  # `delta` may be of another class
        if isinstance(given.language, str):
            given.language = self._service_language(given.language)
        try:
            given.check()
        except ValueError as error:
            return str(error)
        return given.unserved(self._ready) if self._ready is not None else None

    # --- time to first byte: one for each context, as contexts overlap

    async def start_ttfb_metrics(self, *, start_time: float | None = None) -> None:
        """Do nothing: `run_tts` notes when each context was asked for."""

    async def stop_ttfb_metrics(self, *, end_time: float | None = None) -> None:
        """Report the context that has begun to play, from the arrival of its first audio."""
        playback = self._playbacks.get(self.get_active_audio_context_id() or "")
        if playback is None or playback.first_audio_at is None or playback.ttfb_reported:
            return
        playback.ttfb_reported = True
        await super().start_ttfb_metrics(start_time=playback.asked_at)
        await super().stop_ttfb_metrics(end_time=playback.first_audio_at)

    # --- connection

    async def _on_ready(self, ready: Ready) -> None:
        self._stream = None
        self._ready = ready
        if (problem := self._settings.unserved(ready)) is not None:
            message = f"{self._url}: {problem}"
            await self.push_error(message, category=ErrorCategory.APPLICATION)

    async def _disconnect(self) -> None:
        await super()._disconnect()
        self._playbacks.clear()

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
                    await self._on_progress(message)
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
            # These were heard before the connection broke. The next new sample may take a while.
            self._refresh_audio_context(reply.context_id)
            return
        self._quick_failure_tracker.reset()
        playback = self._playbacks.get(reply.context_id)
        if playback is not None:
            playback.receive(samples)
        frame = TTSAudioRawFrame(samples, self.sample_rate, 1, context_id=reply.context_id)
        await self.append_to_audio_context(reply.context_id, frame)
        if playback is not None:
            await self._tell_words(reply.context_id)

    async def _on_progress(self, progress: Progress) -> None:
        """Keep the context alive, even while its text is late."""
        reply = self._journal.find(progress.context_id)
        if reply is None:
            return
        self._refresh_audio_context(reply.context_id)
        playback = self._playbacks.get(reply.context_id)
        if playback is None or progress.state != "waiting_for_text":
            return
        if playback.pause_s > MAX_PAUSE_S:
            await self._complete_sentence(reply.context_id, playback)

    async def _on_segment(self, segment: Segment) -> None:
        reply = self._journal.find(segment.context_id)
        if reply is None:
            return
        self._quick_failure_tracker.reset()
        reply.end_segment(segment.index)
        playback = self._playbacks.get(reply.context_id)
        if playback is not None:
            if not reply.segments:
                playback.gaps.pause()
            await self._add_words(reply.context_id, playback.end_segment())

    async def _on_done(self, done: Done) -> None:
        reply = self._journal.find(done.context_id)
        if reply is None:
            return  # the answer to a cancel
        await self._push_server_metrics(done, reply.context_id)
        if done.finish_reason == "error":
            self._journal.drop(reply.context_id)
            await self._fail(reply.context_id)
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
            await self._postpone(reply, error.message, error.retry_after_s)
        else:
            category = _CATEGORIES.get(error.code, ErrorCategory.APPLICATION)
            await self.push_error(f"{error.message} ({error.code})", category=category)
            if reply is not None and error.code not in _ENDED_BY_DONE:
                # The context was not opened, or goes on without this text. No `done` will come.
                self._journal.cancel(reply.context_id)
                await self._send_due()
                await self._fail(reply.context_id)

    async def _postpone(self, reply: Reply, reason: str, retry_after_s: float | None = None) -> None:
        """Ask again when the server says, or after `RETRY_S`. Give up after `MAX_REFUSALS` refusals."""
        delay_s = RETRY_S if retry_after_s is None else retry_after_s
        logger.warning(f"{self}: {reason}; asking again in {delay_s:g} s")
        self._journal.postpone(reply)
        if reply.num_refusals > MAX_REFUSALS:
            self._journal.drop(reply.context_id)
            message = f"gave up after {MAX_REFUSALS} refusals: {reason}"
            await self.push_error(message, category=ErrorCategory.RATE_LIMIT)
            await self._fail(reply.context_id)
        self._refresh_audio_context(reply.context_id)
        self._retry_in(delay_s)

    # --- handing on

    async def _finish(self, context_id: str) -> None:
        if context_id in self._playbacks:
            self._playbacks[context_id].state = "spoken"
        await self._close(context_id)

    async def _fail(self, context_id: str) -> None:
        if context_id in self._playbacks:
            self._playbacks[context_id].state = "failed"
            # What has come of it is played.
            await self._add_words(context_id, self._playbacks[context_id].clock.advance())
        # While the LLM writes, Pipecat would reopen a closed context for each sentence.
        if context_id != self._turn_context_id:
            await self._close(context_id)

    async def append_to_audio_context(self, context_id: str | None, frame: Any) -> None:
        """Queue a frame of a context. Text that was never asked for stays out of the conversation."""
        if isinstance(frame, TTSTextFrame):  # whole sentences, if words are not timed
            playback = self._playbacks.get(context_id or "")
            if playback is None or playback.state == "failed":
                frame.append_to_context = False
        await super().append_to_audio_context(context_id, frame)

    async def _record_context_audio_outcome(self, context_id: str, received_audio: bool) -> None:
        # A text with nothing to say gives no audio. That is not a failure.
        playback = self._playbacks.get(context_id)
        spoken = playback is not None and playback.state == "spoken"
        await super()._record_context_audio_outcome(context_id, received_audio or spoken)

    async def _push_server_metrics(self, done: Done, context_id: str) -> None:
        gaps = self._playbacks[context_id].gaps if context_id in self._playbacks else Gaps()
        if gaps.count:
            logger.warning(f"{self}: {gaps.count} gaps in the speech, {gaps.seconds:.2f} s in all")
        if self.metrics_enabled:
            data = ServerTTSMetricsData.of(done, self.name, self._settings.model, gaps)
            await self.push_frame(MetricsFrame(data=[data]))
