"""A Pipecat service that hands words on with the times at which they are heard."""

from __future__ import annotations

import asyncio
from typing import Any

from pipecat.frames.frames import AggregatedTextProgressFrame, Frame, TTSTextFrame

from pipecat_client.journal_service import JournalTTSService
from pipecat_client.playback import HOLD_S, Playback
from qwen_megakernel.serving.word_timing import TimedWord


class WordTTSService(JournalTTSService):
    """The words of a service. The subclass keeps the playbacks."""

    def __init__(self, *, times_words: bool, **kwargs: Any) -> None:
        """`times_words`: whether words are handed on, and not whole sentences."""
        super().__init__(**kwargs)
        self._times_words = times_words
        self._playbacks: dict[str, Playback] = {}
        """Contexts that are not over, by Pipecat's ids."""

    async def _tell_words(self, context_id: str) -> None:
        """Hand on the words that are about to be heard, now and until all audio has been played."""
        playback = self._playbacks.get(context_id)
        if playback is None:
            return
        await self._add_words(context_id, playback.due_words())
        if playback.next_words is not None:
            playback.next_words.cancel()
        playback.next_words = None
        if playback.unplayed_s:  # audio may come no more, or much later
            loop = asyncio.get_running_loop()
            playback.next_words = loop.call_later(HOLD_S / 2, self._on_words_due, context_id)

    def _on_words_due(self, context_id: str) -> None:
        if context_id in self._playbacks:
            self.create_task(self._tell_words(context_id), name="words")

    async def _add_words(self, context_id: str, words: list[TimedWord]) -> None:
        if self._times_words:
            for word in words:
                if context_id not in self._playbacks:
                    return  # the reply was interrupted at the last word
                await self.add_word_timestamps(
                    [(word.text, word.time_s)],
                    context_id,
                    includes_inter_frame_spaces=not word.spaced,
                )

    async def _push_sequencer_frames(self, frames: list[Frame], context_id: str | None) -> None:
        # Words that Pipecat has held back come before the queued ones.
        if context_id and context_id == self._audio_context_manager.playing_context_id:
            await self._push_word_frames(frames)
        else:
            await super()._push_sequencer_frames(frames, context_id)

    async def _apply_force_complete(self, context_id: str) -> None:
        """Keep the rest of the text in the conversation only if it was heard."""
        playback = self._playbacks.get(context_id)
        if playback is not None and playback.state == "spoken":
            await super()._apply_force_complete(context_id)
            return
        sequencer = self._aggregated_frame_sequencer
        if self._times_words:
            # Words that were heard may still wait for the end of their sentence.
            await self._push_word_frames(await sequencer.finalize(context_id))
        frames = sequencer.force_complete(context_id, self._word_timestamp_tracker.last_pts)
        unheard = (TTSTextFrame, AggregatedTextProgressFrame)
        await self._push_word_frames([each for each in frames if not isinstance(each, unheard)])
