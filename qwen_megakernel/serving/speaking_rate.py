"""Speak faster or slower at the same pitch: FFmpeg's `atempo`, through PyAV, on audio as it comes."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE

_LEAST_SPEED = 0.5
"""Of one filter; two in a row do a quarter."""
_STEP = SAMPLE_RATE // 100
"""Samples that the filter is given at a time: it holds the last ones back, and fails on a few alone."""


def available() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


class SpeakingRate:
    """One turn's audio. How it is split into chunks changes no sample."""

    def __init__(self, speed: float) -> None:
        """`speed` from 0.25 to 4; 2 takes half as long. Needs PyAV."""
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
        """What is to be played now that a chunk has come, float32 [n]; a little is held back."""
        held = np.concatenate([self._held, samples], dtype=np.float32)
        whole = len(held) - len(held) % _STEP
        self._held = held[whole:]
        pieces = [self._give(held[start : start + _STEP]) for start in range(0, whole, _STEP)]
        return np.concatenate([*pieces, np.zeros(0, np.float32)])

    def end(self) -> np.ndarray:
        """What was held back, and silence up to a whole step."""
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
