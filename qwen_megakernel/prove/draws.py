"""Drawn codes, judged by the official distributions: no right sampler is unlikely for long.

Four sets are drawn. The natural one has the checkpoint's own sampling, until EOS. The hot one
has a high temperature, so that each candidate of the truncated set is drawn often: one too many or too
few shows. The wide one truncates nothing, so that a code that should be suppressed is drawn. The
penalised one goes on after the speech's end with a strong penalty: without it, silence repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, SamplingParams
from qwen_megakernel.prove.fidelity import rounding_errors
from qwen_megakernel.prove.gates import Found, Section, count_surprise, normal_surprise
from qwen_megakernel.prove.official import OfficialProcess
from qwen_megakernel.prove.subject import Drawn, Subject
from qwen_megakernel.prove.utterances import Utterance, item

HOT = GenerationParams(
    talker=SamplingParams(6.0, 50, 1.0, 1.3), predictor=SamplingParams(6.0, 50, 1.0), min_frames=10_000
)
HOT_FRAMES = 96
PENALISED = GenerationParams(
    talker=SamplingParams(1.0, 0, 1.0, 2.0), predictor=SamplingParams(0.9, 50, 1.0), min_frames=10_000
)
PENALISED_FRAMES = 64
WIDE = GenerationParams(
    talker=SamplingParams(10.0, 0, 1.0, 1.0), predictor=SamplingParams(10.0, 0, 1.0), min_frames=10_000
)
WIDE_FRAMES = 24
MAX_FRAMES = 320
BF16_SWAPS = 0.25
"""Share of the draws of the last candidate that rounding may give to its neighbours."""
EFFECT = 0.01
"""The most nats by which rounding to bf16 changes the mean log-probability."""

Judged = Mapping[str, np.ndarray]


def natural(
    subject: Subject, said: Sequence[Utterance], params: GenerationParams, frames: int = MAX_FRAMES
) -> list[Drawn]:
    """Utterances as a server would draw them, each with its own seed."""
    return subject.draw(said, [replace(params, seed=u.seed) for u in said], frames)


def sampling_differences(ours: GenerationParams, theirs: Mapping[str, Any]) -> list[str]:
    """Parameters that the official package reads differently from the checkpoint, as `name: ours,
    theirs`."""
    found = []
    for prefix, part in (("", ours.talker), ("subtalker_", ours.predictor)):
        switch = "subtalker_dosample" if prefix else "do_sample"
        values = {f"{prefix}{name}": getattr(part, name) for name in ("top_k", "top_p")}
        values[f"{prefix}temperature"] = part.temperature if theirs[switch] else 0.0
        if not prefix:
            values["repetition_penalty"] = part.repetition_penalty
        for name, value in values.items():
            expected = 0.0 if name.endswith("temperature") and not theirs[switch] else theirs[name]
            if value != expected:
                found.append(f"{name}: {value}, official {expected}")
    return found


def as_params(values: Mapping[str, Any]) -> GenerationParams:
    """The official package's sampling in this project's form."""
    parts = []
    for prefix, switch in (("", "do_sample"), ("subtalker_", "subtalker_dosample")):
        temperature = values[f"{prefix}temperature"] if values[switch] else 0.0
        penalty = values["repetition_penalty"] if not prefix else 1.0
        parts.append(
            SamplingParams(temperature, values[f"{prefix}top_k"], values[f"{prefix}top_p"], penalty)
        )
    return GenerationParams(talker=parts[0], predictor=parts[1])


def judge(
    subject: Subject,
    official: OfficialProcess,
    said: Sequence[Utterance],
    drawn: Sequence[Drawn],
    params: GenerationParams,
) -> Judged:
    """See `official_worker.Worker.judge`."""
    _, arrays = official.ask_arrays(
        "judge",
        items=[item(u, subject.voices) for u in said],
        codes=[d.codes for d in drawn],
        talker=asdict(params.talker), predictor=asdict(params.predictor), min_frames=params.min_frames,
    )  # fmt: skip
    return arrays


def _mean_surprise(judged: Judged, part: str) -> tuple[float, str]:
    """The surprise of the drawn codes' mean log-probability, and details. Differences below `EFFECT` do
    not count."""
    count = len(judged[f"{part}.log_p"])
    off = float(np.mean(judged[f"{part}.log_p"] - judged[f"{part}.mean_log_p"]))
    variance = float(judged[f"{part}.var_log_p"].sum()) + (EFFECT * count) ** 2
    detail = f"{off:+.3f} nats a draw, {count} draws"
    return normal_surprise(off * count, 0.0, variance), detail


def of_natural(section: Section, judged: Judged) -> None:
    """Judge temperature and EOS."""
    for part in ("talker", "predictor"):
        value, detail = _mean_surprise(judged, part)
        section.judge(f"{part} temperature", value, detail=detail)
    ends, expected = int(judged["talker.is_eos"].sum()), float(judged["talker.p_eos"].sum())
    section.judge(
        "EOS drawn", count_surprise(ends, expected), detail=f"{ends} times, expected {expected:.1f}"
    )


def of_hot(
    section: Section, judged: Judged, tolerances: tuple[float, float], swaps: float = 0.0
) -> None:
    """Judge the truncation to top-k."""
    beyond, details = 0, []
    for part, tolerance in zip(("talker", "predictor"), tolerances, strict=True):
        allowed = judged[f"{part}.allowed"] > 0
        ranks, margins = judged[f"{part}.rank"][allowed], judged[f"{part}.margin"][allowed]
        top_k = getattr(HOT, part).top_k
        beyond += int(((ranks > top_k) & (margins < -tolerance)).sum())
        details.append(f"{part}: {len(ranks)} draws, highest rank {int(ranks.max())} of {top_k}")
        last, expected = int(judged[f"{part}.is_last"].sum()), float(judged[f"{part}.p_last"].sum())
        section.judge(
            f"last candidate, {part}", count_surprise(last, _nearest(last, expected, swaps)),
            detail=f"{last} times, expected {expected:.1f}",
        )  # fmt: skip
        counts = np.bincount(ranks.astype(int), minlength=top_k + 4)[1 : top_k + 4]
        section.plot(f"Draws by official rank, {part}", "rank - 1", "draws", {part: counts.tolist()})
    section.judge("beyond top-k", beyond, detail="; ".join(details))


def of_penalised(section: Section, judged: Judged) -> None:
    """Judge the repetition penalty."""
    p, seen = judged["talker.p_seen"], int(judged["talker.is_seen"].sum())
    variance = float((p * (1 - p)).sum()) + (EFFECT * len(p)) ** 2
    section.judge(
        "repeated codes", normal_surprise(seen, float(p.sum()), variance),
        detail=f"{seen} of {len(p)}, expected {p.sum():.1f}",
    )  # fmt: skip


def of_wide(section: Section, judged: Judged) -> None:
    """Judge the suppression of control codes."""
    forbidden = [int((judged[f"{part}.allowed"] == 0).sum()) for part in ("talker", "predictor")]
    count = len(judged["talker.allowed"])
    section.judge("suppressed codes", sum(forbidden), detail=f"{count} draws of code 0, of all codes")


def _nearest(observed: int, expected: float, slack: float) -> float:
    """The count nearest to the observed one that the expected count, give or take `slack`, allows."""
    return float(np.clip(observed, expected * (1 - slack), expected * (1 + slack)))


def used_slot(section: Section, subject: Subject, said: Sequence[Utterance], frames: int) -> None:
    """Judge whether an utterance has the same codes and samples after others have used its slot."""
    params = replace(HOT, seed=1)
    runs = []
    for utterance in (said[0], said[-1], said[0]):
        codes = subject.draw([utterance], [params], frames)[0].codes
        runs.append((codes, subject.decode(codes)))
    (codes, samples), _, (again, samples_again) = runs
    different = sum(a != b for a, b in zip(codes, again, strict=True))
    silent = 0 if codes != again else int((samples != samples_again).sum())
    section.judge("used slot", different + silent, detail=f"{different} frames, {silent} samples")


def measure(
    subject: Subject,
    official: OfficialProcess,
    said: Sequence[Utterance],
    spoken: Sequence[Drawn],
    ours: GenerationParams,
    theirs: Mapping[str, Any],
    num_draws: int,
) -> Found:
    """The whole part.

    Args:
        subject, official: the two sides.
        said: utterances.
        spoken: what `natural` drew of them.
        ours: the sampling that we read from the checkpoint.
        theirs: what the official package read.
        num_draws: of the predictor in the hot set, at least.
    """
    section = Section("draws")
    differences = sampling_differences(ours, theirs)
    section.judge("sampling parameters", len(differences), detail="; ".join(differences))
    of_natural(section, judge(subject, official, said, spoken, as_params(theirs)))
    frames = -(-num_draws // (NUM_CODEBOOKS - 1))
    hot = [replace(said[i % len(said)], seed=i) for i in range(-(-frames // HOT_FRAMES))]
    drawn = subject.draw(hot, [replace(HOT, seed=u.seed) for u in hot], HOT_FRAMES)
    sample = [item(hot[0], subject.voices)], [drawn[0].codes]
    of_hot(
        section,
        judge(subject, official, hot, drawn, HOT),
        rounding_errors(official, subject.dtype, *sample),
        BF16_SWAPS if subject.dtype == "bf16" else 0.0,
    )
    few = [replace(said[i % len(said)], seed=i) for i in range(2)]
    drawn = subject.draw(few, [replace(WIDE, seed=u.seed) for u in few], WIDE_FRAMES)
    of_wide(section, judge(subject, official, few, drawn, WIDE))
    drawn = subject.draw(few, [replace(PENALISED, seed=u.seed) for u in few], PENALISED_FRAMES)
    of_penalised(section, judge(subject, official, few, drawn, PENALISED))
    used_slot(section, subject, said, WIDE_FRAMES)
    return section.found()
