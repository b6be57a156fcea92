"""The search for a frame kernel's fastest setting: what is tried, compared and chosen.

It does not use the GPU. Its arguments are functions that return times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen_megakernel.bench.against import ratio_bound
from qwen_megakernel.config import ModelConfig, TransformerConfig
from qwen_megakernel.decoding.weight_packing import STRIP_ROWS, split_of
from qwen_megakernel.installation.kernel_tuning import Setting

L2_SHARES = (0.0, 0.25, 0.75)
"""Values to try in addition to `kernel_tuning.DEFAULT_L2_SHARE`."""
RING_STEPS = (-8, -4, 4, 8)
"""Numbers of slots to try, relative to the default."""
ROUNDS = 2
"""Measurements of a pair of settings, each in the order A B B A, on every instance."""

FrameTime = Callable[[Setting, int], float]
"""Microseconds of a frame with a setting, for a number of streams."""
DrawsSameCodes = Callable[[Setting], bool]
Knobs = Mapping[str, Sequence[int | float]]
"""Names of fields of `Setting`, and the values to try."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting in comparison with another, the base."""

    base: Setting
    setting: Setting
    ratios: dict[int, tuple[float, float]]
    """For each number of streams: the ratio of a frame's time to the base's, and its upper 95 % bound.
    Empty if the setting was not timed."""
    same_codes: bool = True

    @property
    def is_faster(self) -> bool:
        """Whether the setting is certainly faster for every number of streams."""
        bounds = [bound for _, bound in self.ratios.values()]
        return self.same_codes and bool(bounds) and max(bounds) < 1

    @property
    def worst(self) -> float:
        """The ratio for the number of streams that gains least."""
        return max(ratio for ratio, _ in self.ratios.values())


# --- what is tried -------------------------------------------------------------------------------


def ring_candidates(default: int, least: int, most: int) -> list[int]:
    """Numbers of slots to try. Each makes another kernel than the default.

    Args:
        default: the number in the sources, limited to what fits.
        least, most: what the kernel takes, and what shared memory has room for.
    """
    near = {min(max(default + step, least), most) for step in RING_STEPS}
    return sorted(near - {default})


def grid_candidates(config: ModelConfig, most: int, least: int) -> list[int]:
    """Smaller grids in which no CTA computes more items of any product than in the largest grid.

    Fewer CTAs poll fewer packets. In the last round of the largest grid some CTAs are idle.

    Args:
        config: the shape.
        most: CTAs of the largest grid.
        least: CTAs of the smallest grid that the kernel takes.
    """
    items = [count for part in (config.talker, config.predictor) for count in _items(part)]

    def rounds(grid: int) -> list[int]:
        return [-(-count // grid) for count in items]

    smallest = next(grid for grid in range(least, most + 1) if rounds(grid) == rounds(most))
    return sorted({smallest, (smallest + most) // 2} - {most})


def _items(c: TransformerConfig) -> list[int]:
    """Items of each product of a layer and of the head, as in csrc/products.cuh."""
    heads = c.num_heads * c.head_dim
    strips = [heads + 2 * c.num_kv_heads * c.head_dim, 2 * c.intermediate_size, c.vocab_size]
    split = [
        c.hidden_size * split_of(c.hidden_size, heads),
        c.hidden_size * split_of(c.hidden_size, c.intermediate_size),
    ]
    return [rows // STRIP_ROWS for rows in (*strips, *split)]


# --- what is chosen ------------------------------------------------------------------------------


def compare(
    base: Setting, setting: Setting, streams: Sequence[int], instances: Sequence[FrameTime]
) -> Trial:
    """Time two settings alternately.

    Args:
        base, setting: A and B.
        streams: numbers of streams.
        instances: the same measurement with weights at other addresses, at least two.
    """
    ratios = {}
    for n in streams:
        pairs = [_paired_ratios(base, setting, n, time) for time in instances]
        found = np.array(pairs)
        # A pair has one set of addresses, so its ratio spreads less than its times.
        bound = ratio_bound(np.ones_like(found), found)
        ratios[n] = (float(np.median(np.median(found, axis=1))), bound)
    return Trial(base, setting, ratios)


def _paired_ratios(base: Setting, setting: Setting, n: int, time: FrameTime) -> list[float]:
    """Time of B over that of A, for each pair, in the order A B B A. A drift meets both alike."""
    ratios = []
    for _ in range(ROUNDS):
        a, b = time(base, n), time(setting, n)
        ratios.append(b / a)
        b, a = time(setting, n), time(base, n)
        ratios.append(b / a)
    return ratios


def search(
    knobs: Knobs,
    streams: Sequence[int],
    instances: Sequence[FrameTime],
    draws_same_codes: DrawsSameCodes,
    report: Callable[[Trial], None],
) -> Setting:
    """Vary one field after the other, and keep what is faster for every number of streams.

    One of several trials may win by chance, so pass the result to `confirm`.

    Args:
        knobs: what to try.
        streams, instances: see `compare`.
        draws_same_codes: whether a setting draws the default's codes. One that does not is not timed.
        report: told of every trial.
    """
    best = Setting()
    for name, values in knobs.items():
        trials = []
        for value in values:
            turned: dict[str, Any] = {name: value}
            setting = replace(best, **turned)
            same = draws_same_codes(setting)
            trial = (
                compare(best, setting, streams, instances) if same else Trial(best, setting, {}, False)
            )
            report(trial)
            trials.append(trial)
        faster = [trial for trial in trials if trial.is_faster]
        if faster:
            best = min(faster, key=lambda trial: trial.worst).setting
    return best


def confirm(setting: Setting, streams: Sequence[int], instances: Sequence[FrameTime]) -> Trial:
    """Compare the result of a search with the default, by measurements that did not choose it."""
    return compare(Setting(), setting, streams, instances)
