"""How long a caller waits for an answer: a recorded question goes into the pipeline, and is timed.

The clock starts at the last audible sample of the question, and stops when the first audible sample of
the answer is played. There is no device: recording and answer are heard and played in real time.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from pipecat.frames.frames import (
    AggregatedTextFrame,
    CancelFrame,
    EndFrame,
    Frame,
    InputAudioRawFrame,
    LLMContextFrame,
    LLMTextFrame,
    OutputAudioRawFrame,
    StartFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.transports.base_input import BaseInputTransport
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import BaseTransport, TransportParams

QUESTION = "What is the weather like in Berlin today?"
RATE = 16_000
"""Samples a second of the recorded question."""
AUDIBLE = 10 ** (-46 / 20)
"""A sample beyond this is heard: -46 dBFS."""
MAX_ANSWER_S = 90.0
_STEP_S = 0.02
_PAUSE_S = 1.5
"""Seconds of silence before each question."""

PARTS: tuple[tuple[str, type[Frame]], ...] = (
    ("voice detector: the speech has ended", VADUserStoppedSpeakingFrame),
    ("recogniser: its text", TranscriptionFrame),
    ("end of the turn: the LLM is asked", LLMContextFrame),
    ("LLM: first token", LLMTextFrame),
    ("LLM: first sentence", AggregatedTextFrame),
    ("TTS: first audio", TTSAudioRawFrame),
)
"""The parts of the wait, in order, by what ends them. In token mode there is no first sentence."""
PLAYED, AUDIBLE_PLAYED, TOTAL = "output: begins to play", "leading silence", "voice to voice"


class Stopwatch(BaseObserver):
    """When each part of an answer ended, by `time.monotonic()`."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, float] = {}
        self.transcript = ""
        self._answered = asyncio.Event()

    def reset(self) -> None:
        """Begin to measure: the question has ended. Earlier marks belong to a pause in it."""
        self.times.clear()
        self._answered.clear()

    def mark(self, part: str, at: float | None = None) -> None:
        """Note that a part has ended. Only its first end counts."""
        self.times.setdefault(part, time.monotonic() if at is None else at)

    async def on_push_frame(self, data: FramePushed) -> None:
        """Look at a frame that goes from one processor to the next."""
        for part, kind in PARTS:
            if isinstance(data.frame, kind):
                self.mark(part)
        if isinstance(data.frame, TranscriptionFrame):
            self.transcript = data.frame.text.strip()
        # The output passes this frame on after the last sample. The end of speech may be a gap.
        played_out = isinstance(data.frame, TTSStoppedFrame) and isinstance(data.source, _Mouth)
        if played_out and PLAYED in self.times:
            self._answered.set()

    async def until_answered(self) -> None:
        """Wait for the end of the answer. Raises `TimeoutError` if there is none."""
        await asyncio.wait_for(self._answered.wait(), MAX_ANSWER_S)


class _Ear(BaseInputTransport):
    """An input that plays questions to the pipeline, and silence between them."""

    def __init__(self, params: TransportParams, stopwatch: Stopwatch) -> None:
        super().__init__(params)
        self._stopwatch = stopwatch
        self._pieces: asyncio.Queue[tuple[bytes, asyncio.Future[float] | None]] = asyncio.Queue()
        self._hearing: asyncio.Task[None] | None = None

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)
        self._hearing = self.create_task(self._hear(), name="hear")

    async def stop(self, frame: EndFrame) -> None:
        await self._leave()
        await super().stop(frame)

    async def cancel(self, frame: CancelFrame) -> None:
        await self._leave()
        await super().cancel(frame)

    async def _leave(self) -> None:
        if self._hearing is not None:
            await self.cancel_task(self._hearing)
            self._hearing = None

    async def hear(self, samples: np.ndarray) -> float:
        """Play int16 [n] at 16 kHz to the pipeline. Returns when its last audible sample was heard."""
        step = round(_STEP_S * RATE)
        last = int(np.flatnonzero(np.abs(samples / 32_768) > AUDIBLE)[-1])
        ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        for start in range(0, len(samples), step):
            piece = samples[start : start + step].tobytes()
            self._pieces.put_nowait((piece, ended if start <= last < start + step else None))
        return await ended

    async def _hear(self) -> None:
        due, silence = time.monotonic(), bytes(2 * round(_STEP_S * RATE))
        while True:
            piece, ended = (silence, None) if self._pieces.empty() else self._pieces.get_nowait()
            # A microphone gives a piece when its last sample is there.
            due += _STEP_S
            await asyncio.sleep(due - time.monotonic())
            await self.push_audio_frame(InputAudioRawFrame(piece, RATE, 1))
            if ended is not None:
                self._stopwatch.reset()
                ended.set_result(due)


class _Mouth(BaseOutputTransport):
    """An output that takes the time of playback, without a device."""

    def __init__(self, params: TransportParams, stopwatch: Stopwatch) -> None:
        super().__init__(params)
        self._stopwatch = stopwatch
        self._due = 0.0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        samples = np.frombuffer(frame.audio, np.int16) / 32_768
        begins = max(self._due, time.monotonic())
        self._stopwatch.mark(PLAYED, begins)
        if (loud := np.flatnonzero(np.abs(samples) > AUDIBLE)).size:
            self._stopwatch.mark(AUDIBLE_PLAYED, begins + loud[0] / frame.sample_rate)
        self._due = begins + len(samples) / frame.sample_rate
        await asyncio.sleep(self._due - time.monotonic())
        return True


class RecordedCall(BaseTransport):
    """A transport without a device, and the stopwatch to observe its pipeline with."""

    def __init__(self) -> None:
        super().__init__()
        self.stopwatch = Stopwatch()
        params = TransportParams(
            audio_in_enabled=True, audio_in_sample_rate=RATE, audio_out_enabled=True
        )
        self._ear, self._mouth = _Ear(params, self.stopwatch), _Mouth(params, self.stopwatch)

    def input(self) -> FrameProcessor:
        """The input of the pipeline."""
        return self._ear

    def output(self) -> FrameProcessor:
        """The output of the pipeline."""
        return self._mouth

    async def ask(self, question: np.ndarray) -> dict[str, float]:
        """Ask int16 [n] at 16 kHz; seconds of each part of the wait, and of all of it.

        Raises:
            TimeoutError: there was no answer.
        """
        await asyncio.sleep(_PAUSE_S)
        asked_at = await self._ear.hear(question)
        await self.stopwatch.until_answered()
        found, before = {}, asked_at
        for part in (*(name for name, _ in PARTS), PLAYED, AUDIBLE_PLAYED):
            if part in self.stopwatch.times:
                found[part] = self.stopwatch.times[part] - before
                before = self.stopwatch.times[part]
        return found | {TOTAL: before - asked_at}


def read_question(path: Path) -> np.ndarray:
    """Read a WAV file as int16 [n] at 16 kHz. Raises `ValueError` with one line."""
    try:
        with wave.open(str(path)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"{path}: {str(error) or 'no WAV file'}") from None
    if (width, channels) != (2, 1):
        raise ValueError(f"{path}: {8 * width} bits, {channels} channels; expected 16 bits, mono")
    return _checked(np.frombuffer(data, "<i2"), rate, str(path))


def speak_question(url: str, token: str | None, voice: str | None) -> np.ndarray:
    """Let the server at `url` speak the question: int16 [n] at 16 kHz. Raises `ValueError` with one
    line."""
    address = url.replace("ws", "http", 1).split("?")[0].rstrip("/") + "/v1/audio/speech"
    fields = {"input": QUESTION, "response_format": "pcm", "seed": 1} | (
        {"voice": voice} if voice else {}
    )
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {token}"} if token else {}
    )
    request = urllib.request.Request(address, json.dumps(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return _checked(np.frombuffer(answer.read(), "<i2"), 24_000, address)
    except OSError as error:
        raise ValueError(f"{address}: {error}") from None


def _checked(samples: np.ndarray, rate: int, source: str) -> np.ndarray:
    heard: np.ndarray = soxr.resample(samples, rate, RATE).astype(np.int16)
    if not np.any(np.abs(heard / 32_768) > AUDIBLE):
        raise ValueError(f"{source}: nothing can be heard in it")
    return heard


def table(answers: Sequence[dict[str, float]]) -> str:
    """Medians of each part, the smallest and the largest, in milliseconds."""
    lines = [f"{'ms':<40}{'median':>8}{'least':>8}{'most':>8}"]
    for part in (*(name for name, _ in PARTS), PLAYED, AUDIBLE_PLAYED, TOTAL):
        found = [answer[part] * 1000 for answer in answers if part in answer]
        if not found:
            continue
        low, middle, high = min(found), statistics.median(found), max(found)
        lines.append(f"{part:<40}{middle:>8.0f}{low:>8.0f}{high:>8.0f}")
    return "\n".join(lines)
