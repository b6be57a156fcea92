"""Prompt rows, greedy codes and logits beside the official package's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, Guards, SamplingParams
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.official import OfficialProcess, by_item
from qwen_megakernel.prove.subject import Logits, Subject
from qwen_megakernel.prove.utterances import Utterance, item

PENALTY = 1.05
GREEDY = GenerationParams(
    talker=SamplingParams(0.0, 0, 1.0, PENALTY),
    predictor=SamplingParams(0.0, 0, 1.0, 1.0),
    guards=Guards(repeat_frames=0, silence_s=0, frames_per_token=0),
)
FP32_ERROR = 1e-3
"""Error allowed for a logit. Two orders of the same fp32 sums differ by less."""
FP32_KL = 1e-6
"""KL divergence allowed in fp32, in nats. Wrong arithmetic gives more than 1e-3."""
BF16_EXCESS = 1.5
"""KL divergence allowed in bf16, as a multiple of that of the official package in bf16."""
SIGMAS = 6.0
"""Standard deviations of the rounding error. A smaller margin counts as a tie."""
BF16_ROWS = 0.02
EOS_FP32 = 1e-3
KL_FLOOR = 1e-5


def rows(
    section: Section, subject: Subject, official: OfficialProcess, said: Sequence[Utterance]
) -> None:
    """Compare prompt rows, and the text rows of the frames after the prompt, in both layouts."""
    both = [
        Utterance(u.text, u.voice, u.seed, u.language, streaming)
        for u in said
        for streaming in (True, False)
    ]
    items = [item(u, subject.voices) for u in both]
    _, arrays = official.ask_arrays("rows", items=items, dtype=subject.dtype)
    worst, table = 0.0, []
    for index, utterance in enumerate(both):
        theirs, trailing = arrays[f"rows.{index}"], arrays[f"trailing.{index}"]
        made, text = subject.rows(utterance, len(trailing))
        difference = float("inf")
        if made.shape == theirs.shape:
            scale = max(np.abs(theirs).max(), np.abs(trailing).max())
            difference = max(np.abs(made - theirs).max(), np.abs(text - trailing).max()) / scale
        worst = max(worst, difference)
        layout = "streaming" if utterance.streaming else "whole text first"
        table.append([utterance.voice, layout, len(theirs), len(made), f"{difference:.2e}"])
    limit = BF16_ROWS if subject.dtype == "bf16" else None
    section.judge("prompt rows", worst, limit=limit, detail=f"{len(both)} prompts")
    section.table(
        "Prompt rows", ["voice", "layout", "official rows", "our rows", "largest difference"], table
    )


def rounding_errors(
    official: OfficialProcess, dtype: str, items: Sequence[Mapping], codes: Sequence[Sequence]
) -> tuple[float, float]:
    """The error of a logit that rounding explains, for talker and predictor: `SIGMAS` times the official
    package's in bf16."""
    if dtype == "fp32":
        return FP32_ERROR, FP32_ERROR
    both = [
        official.ask_arrays("forced", items=list(items), codes=list(codes), dtype=name)[1]
        for name in ("bf16", "fp32")
    ]
    errors = []
    for part in ("talker", "predictor"):
        off = [a - b for a, b in zip(*(by_item(x, part, len(items)) for x in both), strict=True)]
        errors.append(SIGMAS * float(np.sqrt(np.mean(np.square(np.concatenate(off))))))
    return errors[0], errors[1]


def greedy(
    section: Section, subject: Subject, official: OfficialProcess, said: Sequence[Utterance], frames: int
) -> None:
    """Compare greedy codes. At each first difference, judge how near the logits of the two codes
    were."""
    items = [item(u, subject.voices) for u in said]
    reply = official.ask("greedy", items=items, dtype="fp32", frames=frames, repetition_penalty=PENALTY)
    theirs = reply["codes"]
    eos = subject.config.talker.codec_eos_id
    ours = [subject.draw([u], [GREEDY], frames)[0].codes for u in said]
    ours = [codes[:-1] if codes and codes[-1][0] == eos else codes for codes in ours]
    places = [_first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    equal = sum(place[0] if place else len(b) for place, b in zip(places, theirs, strict=True))
    total = sum(map(len, theirs))
    unexplained, table = 0, []
    for u, codes, mine, place in zip(said, theirs, ours, places, strict=True):
        if place is None:
            table.append([u.text, u.voice, len(codes), len(codes), "", ""])
            continue
        margin, allowed = _margin(subject, official, u, codes, mine, place)
        unexplained += not margin <= allowed
        where = f"frame {place[0]}, codebook {place[1]}"
        table.append([u.text, u.voice, len(codes), place[0], where, f"{margin:.3g} of {allowed:.3g}"])
    if subject.dtype == "fp32":
        section.judge("greedy frames", equal / max(1, total), detail=f"{equal} of {total} frames")
    else:
        section.skip("greedy frames", f"bf16 rounds: {equal} of {total} frames are equal")
    section.judge("unexplained differences", unexplained, detail=f"of {len(said)} utterances")
    head = ["text", "voice", "frames", "equal frames", "first difference", "logit margin of allowed"]
    section.table("Greedy codes", head, table)


def _first_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Frame and codebook of the first difference. A missing frame differs in its code 0."""
    for frame, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return frame, next(i for i in range(NUM_CODEBOOKS) if x[i] != y[i])
    return None if len(a) == len(b) else (min(len(a), len(b)), 0)


def _margin(
    subject: Subject,
    official: OfficialProcess,
    utterance: Utterance,
    theirs: list[list[int]],
    ours: list[list[int]],
    place: tuple[int, int],
) -> tuple[float, float]:
    """Official logit of the official code less that of ours at the first difference; what is allowed.

    The repetition penalty counts; a code that is suppressed has an infinite margin.
    """
    frame, codebook = place
    eos = subject.config.talker.codec_eos_id
    ending = [eos] + [0] * (NUM_CODEBOOKS - 1)
    their = theirs[frame] if frame < len(theirs) else ending
    own = ours[frame] if frame < len(ours) else ending
    official_item = [item(utterance, subject.voices)]
    codes = [[*theirs[:frame], their]]
    _, arrays = official.ask_arrays("forced", items=official_item, codes=codes, dtype="fp32")
    allowed = rounding_errors(official, subject.dtype, official_item, codes)
    if codebook:
        logits = arrays["predictor.0"][frame, codebook - 1]
        return float(logits[their[codebook]] - logits[own[codebook]]), allowed[1]
    logits = arrays["talker.0"][frame].copy()
    for code in {row[0] for row in theirs[:frame]}:
        logits[code] = logits[code] / PENALTY if logits[code] > 0 else logits[code] * PENALTY
    vocab = len(logits)
    if own[0] != eos and own[0] >= vocab - 1024:
        return float("inf"), allowed[0]
    return float(logits[their[0]] - logits[own[0]]), allowed[0]


def divergence(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """KL of the truth from logits, nats: [..., vocabulary] -> [...]."""
    p, q = _log_softmax(truth), _log_softmax(logits)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def logits(
    section: Section,
    subjects: Mapping[str, Subject],
    official: OfficialProcess,
    said: Sequence[Utterance],
    codes: Sequence[list[list[int]]],
) -> None:
    """Teacher-forced KL by codebook of every subject and of official bf16, each to official fp32.

    Args:
        section: is added to.
        subjects: by name, the one that is judged first.
        official: has the checkpoint in fp32 and bf16.
        said: utterances.
        codes: of each, frames that both sides are forced to.
    """
    items, count = [item(u, next(iter(subjects.values())).voices) for u in said], len(said)
    made: dict[str, list[Logits]] = {}
    for name in ("fp32", "bf16"):
        _, arrays = official.ask_arrays("forced", items=items, codes=list(codes), dtype=name)
        parts = (by_item(arrays, part, count) for part in ("talker", "predictor"))
        made[f"official {name}"] = list(zip(*parts, strict=True))
    for name, subject in subjects.items():
        made[name] = [subject.forced(u, frames) for u, frames in zip(said, codes, strict=True)]
    truth = made.pop("official fp32")
    judged = next(iter(subjects))
    eos = subjects[judged].config.talker.codec_eos_id
    kl = {name: _by_codebook(found, truth, codes, eos) for name, found in made.items()}
    exact = subjects[judged].dtype == "fp32"
    allowed = np.full(NUM_CODEBOOKS, FP32_KL) if exact else BF16_EXCESS * kl["official bf16"] + KL_FLOOR
    ratio = kl[judged] / allowed
    section.judge(
        "talker logits", ratio[0], detail=f"{kl[judged][0]:.2e} nats, allowed {allowed[0]:.2e}"
    )
    worst = 1 + int(ratio[1:].argmax())
    section.judge(
        "predictor logits", ratio[worst],
        detail=f"codebook {worst}: {kl[judged][worst]:.2e} nats, allowed {allowed[worst]:.2e}",
    )  # fmt: skip
    section.plot(
        "KL divergence to official fp32, by codebook (log10 nats)", "codebook", "log10 KL",
        {name: np.log10(np.maximum(values, 1e-12)).tolist() for name, values in kl.items()},
    )  # fmt: skip
    head = ["codebook", *kl]
    lines = [[i, *(f"{kl[name][i]:.2e}" for name in kl)] for i in range(NUM_CODEBOOKS)]
    section.table("KL divergence to official fp32, nats", head, lines)
    section.figures["kl"] = {name: values.tolist() for name, values in kl.items()}
    _eos(section, judged, made, truth, eos, exact=exact)


def _by_codebook(
    found: Sequence[Logits], truth: Sequence[Logits], codes: Sequence[list[list[int]]], eos: int
) -> np.ndarray:
    """Mean KL over all frames, [16]; a frame that is EOS has no codes 1 to 15."""
    sums, counts = np.zeros(NUM_CODEBOOKS), np.zeros(NUM_CODEBOOKS)
    for (talker, predictor), (talker_truth, predictor_truth), frames in zip(
        found, truth, codes, strict=True
    ):
        speech = np.array([frame[0] != eos for frame in frames])
        sums[0] += divergence(talker, talker_truth).sum()
        counts[0] += len(frames)
        sums[1:] += divergence(predictor, predictor_truth)[speech].sum(0)
        counts[1:] += speech.sum()
    return sums / np.maximum(counts, 1)


def _eos(
    section: Section,
    judged: str,
    made: Mapping[str, Sequence[Logits]],
    truth: Sequence[Logits],
    eos: int,
    *,
    exact: bool,
) -> None:
    """Compare the probability of EOS along each utterance."""

    def probability(found: Sequence[Logits]) -> list[np.ndarray]:
        return [np.exp(_log_softmax(talker))[:, eos] for talker, _ in found]

    ours, theirs = probability(made[judged]), probability(truth)
    rounded = probability(made["official bf16"])
    difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    allowed = EOS_FP32
    if not exact:
        allowed += 3 * max(np.abs(a - b).max() for a, b in zip(rounded, theirs, strict=True))
    section.judge("EOS probability", difference / allowed, detail=f"{difference:.2e} of {allowed:.2e}")
    section.plot(
        "Probability of EOS along the first utterance", "frame", "probability",
        {judged: ours[0].tolist(), "official fp32": theirs[0].tolist()},
    )  # fmt: skip


def measure(
    subjects: Mapping[str, Subject],
    official: OfficialProcess,
    said: Sequence[Utterance],
    codes: Sequence[list[list[int]]],
    frames: int,
) -> Found:
    """Run the whole part. The arguments are those of `logits`, and the greedy frames of each
    utterance."""
    section, subject = Section("fidelity"), next(iter(subjects.values()))
    rows(section, subject, official, said)
    greedy(section, subject, official, said, frames)
    logits(section, subjects, official, said, codes)
    return section.found()
