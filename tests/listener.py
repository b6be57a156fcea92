"""A sink that keeps a turn's events, turns that run to their end, a model that gives only one code."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.config import Guards
from qwen_megakernel.turn import Audio, Finished

TEXT = "Hello there, how are you doing today? It is fine weather."
PARAMS = GenerationParams(seed=11, max_frames=30)
LONG = GenerationParams(seed=3, max_frames=2000, guards=Guards(frames_per_token=0))


class Listener:
    """A sink that keeps all events and their times."""

    def __init__(self) -> None:
        self.events: list = []
        self.times: list[float] = []
        self._done = threading.Event()

    def __call__(self, event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if isinstance(event, Finished):
            self._done.set()

    def wait(self, limit_s: float = 240.0) -> Finished:
        assert self._done.wait(limit_s), "the turn did not finish"
        return self.events[-1]

    def wait_for_audio(self, limit_s: float = 120.0) -> None:
        deadline = time.monotonic() + limit_s
        while not any(isinstance(e, Audio) for e in self.events):
            assert time.monotonic() < deadline, "no audio came"
            time.sleep(0.002)

    def wait_until_still(self, still_s: float = 1.0) -> int:
        """The number of samples, once none has come for `still_s`."""
        count, since = len(self.samples), time.monotonic()
        while time.monotonic() < since + still_s:
            time.sleep(0.02)
            if len(self.samples) != count:
                count, since = len(self.samples), time.monotonic()
        return count

    @property
    def samples(self) -> np.ndarray:
        chunks = [e.samples for e in self.events if isinstance(e, Audio)]
        return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)


def speak(tts: TTSDecoder, text=TEXT, **options) -> Listener:
    listener = Listener()
    options.setdefault("params", PARAMS)
    tts.open_turn(text, sink=listener, ended=True, **options)
    listener.wait()
    return listener


def wait_idle(tts: TTSDecoder) -> None:
    deadline = time.monotonic() + 10
    while (tts.num_active or tts.num_waiting) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert tts.num_active == tts.num_waiting == 0


@contextmanager
def always_says(tts: TTSDecoder, code: int) -> Iterator[None]:
    """Change the head so that the model gives this code: random weights hardly ever repeat a code."""
    weight = tts._engine._backend._talker.codec_head.weight
    original = weight.detach().clone()
    with torch.no_grad():
        # This row is as large as all others together can be: no hidden row of its sign favours another.
        weight.zero_()
        weight[code] = original[code] * 20
        weight[7] = -weight[code]
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)
