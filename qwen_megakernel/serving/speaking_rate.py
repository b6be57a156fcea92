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
"""Samples that the filter is given at a time: it holds the last ones back."""


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
        self._num_taken = 0

    def change(self, samples: np.ndarray) -> np.ndarray:
        """What is to be played now that a chunk has come, float32 [n]; a little is held back."""
        from av import AudioFrame

        pieces = []
        for start in range(0, len(samples), _STEP):
            piece = samples[None, start : start + _STEP].astype(np.float32)
            frame = AudioFrame.from_ndarray(piece, format="flt", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, self._num_taken
            self._num_taken += piece.shape[1]
            self._source.push(frame)
            pieces.append(self._pull())
        return np.concatenate([*pieces, np.zeros(0, np.float32)])

    def end(self) -> np.ndarray:
        """What was held back."""
        self._source.push(None)
        return self._pull() if self._num_taken else np.zeros(0, np.float32)

    def _pull(self) -> np.ndarray:
        from av.error import BlockingIOError as NothingYet
        from av.error import EOFError as Ended

        pieces = []
        while True:
            try:
                pieces.append(self._sink.pull().to_ndarray()[0])
            except (NothingYet, Ended):
                return np.concatenate([*pieces, np.zeros(0, np.float32)])
