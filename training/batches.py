"""Endless training batches of a few fixed shapes, made in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from qwen_megakernel.config import NUM_CODEBOOKS
from training.graphs import Batch
from training.rows import NONE, Layout, Utterance

SHAPES = ((56, 200), (88, 128), (168, 64))
"""(rows, utterances) of a batch. An utterance goes into the smallest shape that holds it."""
NUM_PREDICTED = 3072
"""Frames of a batch on which the code predictor is trained. All frames would be too many."""
NON_STREAMING = 0.25
AUTO_LANGUAGE = 0.5
MAX_CORRUPTION = 0.25
"""At most this share of an utterance's input codes comes from other frames. At run time the model
continues from codes that it drew itself, so it must tolerate wrong ones."""


LOOKED_S = 15
"""Seconds between two checks for more material."""


@dataclass
class Material:
    """All utterances to train on, and those that come later."""

    layout: Layout
    readings: list[list[Utterance]]
    """The same utterances tokenised in two ways: plainly, and with some merges left out."""
    eos: int
    more: Callable[[], list[list[Utterance]]] = lambda: []
    """Returns what has come since the last call, in the same readings. Returns an empty list if nothing
    has."""

    def grow(self) -> None:
        """Add what has come."""
        for reading, fresh in zip(self.readings, self.more(), strict=False):
            reading += fresh


class BatchStream(IterableDataset):
    """Draws batches without end. Each worker draws its own."""

    def __init__(self, material: Material, seed: int) -> None:
        self._material, self._seed = material, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self._seed, worker.id if worker else 0))
        waiting: list[list[tuple[Utterance, bool]]] = [[] for _ in SHAPES]
        first, looked = self._material.readings[0], monotonic()
        while True:
            for index in rng.permutation(len(first)):
                if monotonic() > looked + LOOKED_S:
                    count, looked = len(first), monotonic()
                    self._material.grow()
                    if len(first) > count:
                        break
                # The plain reading comes more often, because speech is made from it.
                reading = self._material.readings[int(rng.random() < 0.4) % len(self._material.readings)]
                utterance = reading[index]
                streaming = rng.random() >= NON_STREAMING
                shape = self._shape_for(utterance, streaming)
                if shape is None:
                    continue
                waiting[shape].append((utterance, streaming))
                if len(waiting[shape]) == SHAPES[shape][1]:
                    yield make_batch(self._material, waiting[shape], SHAPES[shape], rng)
                    waiting[shape] = []

    def _shape_for(self, utterance: Utterance, streaming: bool) -> int | None:
        need = self._material.layout.count(utterance, streaming=streaming)
        return next((i for i, (rows, _) in enumerate(SHAPES) if rows >= need), None)


def make_batch(
    material: Material,
    group: list[tuple[Utterance, bool]],
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> Batch:
    """Make one batch of utterances, each with whether it is laid out for streaming.

    Returns:
        text, control, target int64 [n, rows]; codes int64 [n, rows, 16]; speaker, voice int64 [n];
        picked int64 [NUM_PREDICTED], indices of flattened rows, and their frames, picked_codes int64
        [NUM_PREDICTED, 16]. NONE stands where there is nothing.
    """
    length, n = shape
    text, control, target = (np.full((n, length), NONE, dtype=np.int64) for _ in range(3))
    codes = np.full((n, length, NUM_CODEBOOKS), NONE, dtype=np.int64)
    speaker, voice = np.zeros(n, np.int64), np.zeros(n, np.int64)
    spots, frames = [], []
    for i, (utterance, streaming) in enumerate(group):
        language = "auto" if rng.random() < AUTO_LANGUAGE else "english"
        rows = material.layout.rows(utterance, streaming=streaming, language=language)
        count, first = len(rows.text), rows.first
        text[i, :count], control[i, :count] = rows.text, rows.control
        codes[i, :count] = rows.codes
        target[i, first:count] = [*utterance.codes[:, 0], material.eos]
        speaker[i], voice[i] = rows.speaker, utterance.voice
        spots.append(i * length + first + np.arange(len(utterance.codes)))
        frames.append(utterance.codes)
    _corrupt(codes, rng)
    spot, frame = np.concatenate(spots), np.concatenate(frames).astype(np.int64)
    picks = rng.choice(len(spot), NUM_PREDICTED, replace=len(spot) < NUM_PREDICTED)
    arrays = {
        "text": text, "control": control, "target": target, "codes": codes, "speaker": speaker,
        "voice": voice, "picked": spot[picks], "picked_codes": frame[picks],
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def plain_batch(material: Material) -> Batch:
    """The first utterances that fit the smallest shape, laid out for streaming. Always the same."""
    rows, most = SHAPES[0]
    fits = [u for u in material.readings[0] if material.layout.count(u, streaming=True) <= rows]
    group = [(utterance, True) for utterance in (fits * most)[:most]]
    return make_batch(material, group, SHAPES[0], np.random.default_rng(0))


def blank_batch(shape: tuple[int, int]) -> Batch:
    """A batch of the given shape with nothing in it but zeros."""
    length, n = shape
    sizes = {
        "text": (n, length), "control": (n, length), "target": (n, length),
        "codes": (n, length, NUM_CODEBOOKS), "speaker": (n,), "voice": (n,),
        "picked": (NUM_PREDICTED,), "picked_codes": (NUM_PREDICTED, NUM_CODEBOOKS),
    }  # fmt: skip
    return {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}


def _corrupt(codes: np.ndarray, rng: np.random.Generator) -> None:
    """Replace some codes by those of other frames, in place: single codes and whole frames."""
    real = np.flatnonzero(codes[:, :, 0].ravel() != NONE)
    flat = codes.reshape(-1, NUM_CODEBOOKS)
    rate = np.repeat(rng.random(len(codes)) * MAX_CORRUPTION, codes.shape[1])[real]
    others = flat[rng.permutation(real)]
    hit = rng.random((len(real), NUM_CODEBOOKS)) < rate[:, None]
    hit |= rng.random((len(real), 1)) < rate[:, None] / 4
    flat[real] = np.where(hit, others, flat[real])


def loader(material: Material, workers: int, seed: int) -> Iterator[Batch]:
    """Batches that `workers` processes make ahead. With 0 workers, this process makes them."""
    stream = BatchStream(material, seed)
    pinned = torch.cuda.is_available()
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pinned))
