"""Golden records: recorded codes, sound and messages, and the comparison with those of today.

A record is a JSON file under tests/golden/. Codes are compared exactly. Sound is compared through a
digest of eight numbers a frame, within `TOLERANCE`. `python -m pytest tests/test_golden.py --record`
writes the records of a test file anew (`-k` chooses cases). It refuses a case with a draw so close that
the rounding of another machine could change it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from live_server import ROOT
from torch import Tensor

from qwen_megakernel.config import HOP

FOLDER = ROOT / "tests" / "golden"

MIN_MARGIN = 1e-3
"""The least distance, in scaled logits, between a drawn code and any other outcome. Rounding moves these
logits by at most 2e-5 (AVX2 against no vector instructions)."""
TOLERANCE = 5e-5
"""Tolerance of the digest: about the RMS of a difference, with full scale 1 (-86 dBFS). Rounding makes
1e-6, and 1e-5 if it moves 16-bit samples by a step."""
_NUM_PROJECTIONS = 8
_SIGNS = np.random.RandomState(0).randint(0, 2, (HOP, _NUM_PROJECTIONS)) * 2.0 - 1.0
"""The legacy generator: NumPy promises that its numbers never change."""


# --- sound --------------------------------------------------------------------------------------


def digest(samples: np.ndarray) -> list[str]:
    """A line of eight numbers for each 1920 samples; the last ones are padded with zeros.

    Each number is a random projection. If two frames differ by an RMS of x, their projections differ by
    about x. So a shift, a gain, a click or noise shows.
    """
    padded = np.zeros(-(-len(samples) // HOP) * HOP)
    padded[: len(samples)] = samples
    projections = padded.reshape(-1, HOP) @ _SIGNS / np.sqrt(HOP)
    return [" ".join(f"{value:.6f}" for value in row) for row in projections]


def sound_difference(record: list[str], found: list[str]) -> str | None:
    """The first frame that differs by more than the tolerance; None if none does."""
    if len(record) != len(found):
        return f"the sound has {len(found)} frames, the record {len(record)}"
    for frame, lines in enumerate(zip(record, found, strict=True)):
        one, other = (np.array([float(value) for value in line.split()]) for line in lines)
        if (error := np.abs(one - other).max()) > TOLERANCE:
            return f"the sound of frame {frame} differs by {error:.1e}, allowed: {TOLERANCE:.0e}"
    return None


def codes_difference(record: list[str], found: list[str]) -> str | None:
    """The first code that differs, by frame and codebook; None if all are the same."""
    for frame, lines in enumerate(zip(record, found, strict=False)):
        for codebook, (one, other) in enumerate(zip(*(line.split() for line in lines), strict=True)):
            if one != other:
                return f"frame {frame}, codebook {codebook}: the code is {other}, the record has {one}"
    if len(record) != len(found):
        return f"there are {len(found)} frames of codes, the record has {len(record)}"
    return None


# --- margins ------------------------------------------------------------------------------------


class Margins:
    """How close the draws of a backend came to another outcome."""

    def __init__(self) -> None:
        self.smallest = float("inf")

    def check(self, case: str) -> None:
        """Fail if a draw was close."""
        if self.smallest < MIN_MARGIN:
            pytest.fail(
                f"{case} is not recorded: a draw has a margin of {self.smallest:.1e}, allowed: "
                f"{MIN_MARGIN} up; choose another seed",
                pytrace=False,
            )


@contextmanager
def watched_margins(backend: object) -> Iterator[Margins]:
    """Measure every draw that a PyTorch backend makes meanwhile."""
    module, margins = sys.modules[type(backend).__module__], Margins()
    process, draw = module.process_logits, module.draw
    untruncated: list[Tensor] = []

    def watch_process(logits: Tensor, batch, *masks: Tensor) -> Tensor:
        untruncated.append(process(logits, replace(batch, max_top_k=0, uses_top_p=False), *masks))
        return process(logits, batch, *masks)

    def watch_draw(scores: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
        found = margin(untruncated.pop(), scores, torch.where(temperature > 0, noise, 0.0))
        margins.smallest = min(margins.smallest, found)
        return draw(scores, temperature, noise)

    module.process_logits, module.draw = watch_process, watch_draw
    try:
        yield margins
    finally:
        module.process_logits, module.draw = process, draw


def margin(untruncated: Tensor, scores: Tensor, noise: Tensor) -> float:
    """The least change of scores that would give another code, over all rows.

    Args:
        untruncated, scores: fp32 [n, vocabulary], before and after top-k and top-p.
        noise: fp32 [n, vocabulary], zeros where the draw is greedy.
    """
    noisy = scores + noise
    best = noisy.topk(2, dim=-1).values
    kept = scores > -torch.inf
    threshold = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    outside = untruncated.masked_fill(kept, -torch.inf)
    # Either a code that was left out would come in and win, or the winner would fall out.
    enters = torch.maximum(threshold - outside, best[:, :1] - (outside + noise))
    winner = untruncated.gather(-1, noisy.argmax(-1, keepdim=True))
    falls = winner - outside.amax(-1, keepdim=True)
    runner_up = (best[:, :1] - best[:, 1:]).nan_to_num(torch.inf, torch.inf)
    return float(torch.cat([runner_up, enters, falls], dim=-1).min())


# --- files --------------------------------------------------------------------------------------


class Golden:
    """The record of one test file: cases by name."""

    def __init__(self, name: str, recording: bool) -> None:
        self.recording = recording
        self._path = FOLDER / f"{name}.json"
        self._command = f"python -m pytest tests/test_{name}.py --record"

    def case(self, name: str) -> dict:
        """The record of a case. The test fails if there is none."""
        cases = self._read()
        if name not in cases:
            pytest.fail(f"nothing is recorded of {name}; record it: {self._command}", pytrace=False)
        return cases[name]

    def write(self, name: str, found: dict) -> None:
        """Record a case."""
        cases = self._read() | {name: found}
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps(dict(sorted(cases.items())), indent=1, ensure_ascii=False)
        self._path.write_text(text + "\n", encoding="utf-8")

    def fail(self, name: str, difference: str) -> None:
        """Fail a case that differs from its record."""
        pytest.fail(
            f"{name}: {difference}\nIf this is meant to change, record it anew: {self._command}",
            pytrace=False,
        )

    def _read(self) -> dict[str, dict]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
