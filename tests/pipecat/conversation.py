"""Run the service in Pipecat's test pipeline, and examine the frames that come out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipecat.frames.frames import (
    CancelFrame,
    ErrorFrame,
    Frame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    MetricsFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.worker import PipelineParams
from pipecat.tests.utils import SleepFrame, run_test

from pipecat_client.megakernel_tts import MegakernelTTSService

TURN = ("One is the first. ", "Two comes after it. ", "Three is the last of them.")
EXACT = {"seed": 11, "chunk_frames": 1, "temperature": 2.0}
"""Options for speech that is the same each time, in messages of one frame."""
ENDLESS = "The quick brown fox jumps over the lazy dog, and then it does so once again." * 2
LONG_SETTINGS = {"temperature": 10.0, "top_k": 0}
"""With these the tiny checkpoint speaks for minutes."""


def make_service(url: str, **options: Any) -> MegakernelTTSService:
    """Settings and arguments alike; it comes back soon after a break."""
    names = (
        "voice", "language", "temperature", "top_k", "seed", "chunk_frames",
        "markup", "lexicon", "speed",
    )  # fmt: skip
    settings = {name: options.pop(name) for name in names if name in options}
    defaults = {
        "reconnect_backoff_min_wait": 0.1,
        "reconnect_backoff_max_wait": 0.3,
        "max_reconnect_attempts": 500,
    }
    return MegakernelTTSService(
        url=url, settings=MegakernelTTSService.Settings(**settings), **defaults | options
    )


def turn(*texts: str) -> list[Frame]:
    """The frames that an LLM pushes for one answer."""
    return [LLMFullResponseStartFrame(), *map(LLMTextFrame, texts), LLMFullResponseEndFrame()]


def until(condition: Callable[[], object], limit_s: float = 240.0) -> Iterator[SleepFrame]:
    """Wait for a condition between the frames of a script."""
    for _ in range(round(limit_s / 0.01)):
        if condition():
            return
        yield SleepFrame(sleep=0.01)
    raise AssertionError("what the script waits for does not happen")


async def play(
    service: MegakernelTTSService, script: Iterable[Frame], *, limit_s: float = 480.0
) -> tuple[list[Frame], list[ErrorFrame]]:
    """Frames that came out downstream, and errors."""
    failures: list[Exception] = []

    def guarded() -> Iterator[Frame]:
        # Without its feeder a pipeline would run for ever.
        try:
            yield from script
        except Exception as error:
            failures.append(error)
            yield CancelFrame()

    down, up = await asyncio.wait_for(
        run_test(
            service,
            frames_to_send=guarded(),
            start_timeout=60.0,
            pipeline_params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        ),
        limit_s,
    )
    if failures:
        raise failures[0]
    return list(down), [frame for frame in up if isinstance(frame, ErrorFrame)]


def only(frames: Iterable[Frame], kind: type) -> list[Any]:
    return [frame for frame in frames if isinstance(frame, kind)]


def pcm(frames: Iterable[Frame], context_id: str | None = None) -> bytes:
    audio = only(frames, TTSAudioRawFrame)
    return b"".join(f.audio for f in audio if context_id in (None, f.context_id))


def spoken(frames: Iterable[Frame]) -> str:
    """The words that came out, as the conversation would hold them."""
    return " ".join(frame.text for frame in only(frames, TTSTextFrame))


def metrics(frames: Iterable[Frame], kind: type) -> list[Any]:
    """Figures of a kind. Pipecat begins with zeros, which only say who will report."""
    data = (item for frame in only(frames, MetricsFrame) for item in frame.data)
    return [item for item in data if isinstance(item, kind) and getattr(item, "value", None) != 0.0]


def names(frames: Iterable[Frame], *left_out: type) -> list[str]:
    """Names of the frames' types in order. Repetitions count as one."""
    result: list[str] = []
    for frame in frames:
        name = type(frame).__name__
        if not isinstance(frame, left_out) and result[-1:] != [name]:
            result.append(name)
    return result
