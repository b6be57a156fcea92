"""Speaks faster or slower at the same pitch: FFmpeg's `atempo`, through PyAV, on one chunk at a time."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE

_LEAST_SPEED = 0.5
"""The lowest speed of one filter. Two in a row reach a quarter."""
_STEP = SAMPLE_RATE // 100
"""Samples that the filter gets at a time: it holds the last ones back, and fails on a few alone."""


def available() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


class SpeakingRate:
    """Changes the rate of one turn's audio. The result does not depend on how chunks split it."""

    def __init__(self, speed: float) -> None:
        """`speed` is 0.25 to 4; 2 takes half as long. Raises `ImportError` without PyAV."""
        from av.filter import Graph  # here, because it takes a while and few need it

        self._graph = Graph()
        self._source = self._graph.add_abuffer(
            format="flt", sample_rate=SAMPLE_RATE, layout="mono", time_base=Fraction(1, SAMPLE_RATE)
        )
        steps = [speed] if speed >= _LEAST_SPEED else [_LEAST_SPEED, speed / _LEAST_SPEED]
        filters: list[Any] = [self._source]
        filters += [self._graph.add("atempo", str(step)) for step in steps]
        filters.append(self._graph.add("abuffersink"))
        for before, after in pairwise(filters):
            before.link_to(after)
        self._graph.configure()
        self._sink = filters[-1]
        self._held = np.zeros(0, np.float32)
        self._num_given = 0

    def change(self, samples: np.ndarray) -> np.ndarray:
        """Add a chunk, float32 [n] at 24 kHz. Returns the samples to play now, float32 [m], without the
        last few, which are held back."""
        held = np.concatenate([self._held, samples], dtype=np.float32)
        whole = len(held) - len(held) % _STEP
        self._held = held[whole:]
        pieces = [self._give(held[start : start + _STEP]) for start in range(0, whole, _STEP)]
        return np.concatenate([*pieces, np.zeros(0, np.float32)])

    def end(self) -> np.ndarray:
        """End the turn. Returns the samples that were held back, float32 [n], with silence up to a whole
        step of 10 ms."""
        rest = self.change(np.zeros(-len(self._held) % _STEP, np.float32))
        self._source.push(None)
        return np.concatenate([rest, self._pull()]) if self._num_given else rest

    def _give(self, piece: np.ndarray) -> np.ndarray:
        from av import AudioFrame

        frame = AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, self._num_given
        self._num_given += len(piece)
        self._source.push(frame)
        return self._pull()

    def _pull(self) -> np.ndarray:
        from av.error import BlockingIOError as NothingYet
        from av.error import EOFError as Ended

        pieces = []
        while True:
            try:
                pieces.append(self._sink.pull().to_ndarray()[0])
            except (NothingYet, Ended):
                return np.concatenate([*pieces, np.zeros(0, np.float32)])
