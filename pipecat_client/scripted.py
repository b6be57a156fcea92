"""Stand-ins for speech recognition and language model: the demo without keys, downloads or GPU."""

from __future__ import annotations

import asyncio
import re
from itertools import cycle

from pipecat.frames.frames import (
    Frame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TranscriptionFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.utils.time import time_now_iso8601

HEARD = "(something was said)"
REPLIES = (
    "Hello, I am reading from a script. Say something, type something, or just interrupt me. "
    "I stop at once, and I remember how far I came.",
    "I have no ears and no brain today, only a voice. Each of these sentences is made as you hear it. "
    "The first one leaves while the others are still being written.",
    "This one is long, so that you can interrupt it. One, two, three, four, five, six, seven. "
    "Eight, nine, ten, eleven, twelve. Nobody has stopped me so far, so I will go on for a while. "
    "And now I am done.",
)
WORDS_PER_SECOND = 30.0


class ScriptedSTT(FrameProcessor):
    """Notices that somebody has spoken, but not the words."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Give a transcript when the voice detector finds the end of speech."""
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)
        if isinstance(frame, VADUserStoppedSpeakingFrame) and direction is FrameDirection.UPSTREAM:
            await self.push_frame(
                TranscriptionFrame(HEARD, user_id="", timestamp=time_now_iso8601(), finalized=True)
            )


class ScriptedLLM(FrameProcessor):
    """Answers a typed text with an echo, and everything else from a script, word by word."""

    def __init__(self) -> None:
        super().__init__()
        self._replies = cycle(REPLIES)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Answer a context. As with any LLM, an interruption stops the answer where it is."""
        await super().process_frame(frame, direction)
        if not isinstance(frame, LLMContextFrame):
            await self.push_frame(frame, direction)
            return
        await self.push_frame(LLMFullResponseStartFrame())
        for word in re.findall(r"\S+\s*", self._answer(frame)):
            await self.push_frame(LLMTextFrame(word))
            await asyncio.sleep(1 / WORDS_PER_SECOND)
        await self.push_frame(LLMFullResponseEndFrame())

    def _answer(self, frame: LLMContextFrame) -> str:
        messages = frame.context.get_messages()
        last: object = messages[-1] if messages else None
        said = last.get("content") if isinstance(last, dict) and last.get("role") == "user" else None
        if isinstance(said, str) and HEARD not in said:
            return f"You said: {said}"
        return next(self._replies)
