"""Golden records: the figures of a checkpoint here, to compare with another machine or version."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

import qwen_megakernel
from qwen_megakernel.config import HOP
from qwen_megakernel.prompt.voice import VoiceCloner
from qwen_megakernel.prove.draws import HOT
from qwen_megakernel.prove.fidelity import FP32_ERROR, GREEDY
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.plan import device_name
from qwen_megakernel.prove.subject import Subject
from qwen_megakernel.prove.utterances import Utterance

FRAMES = 24
BF16_LOG_P = 0.5
BF16_LEVEL_DB = 3.0
LEVEL_DB = 0.05
BF16_ROWS = 0.02
EMBEDDING, BF16_EMBEDDING = 1e-4, 0.02
QUIET_DB = -60.0
TIES = 1
"""Utterances whose draws may differ: another order of fp32 sums may decide a tie differently."""


def record(subject: Subject, cloner: VoiceCloner | None, said: Sequence[Utterance]) -> Found:
    """Measure a few utterances. Returns JSON values."""
    found = []
    for utterance in said:
        codes = subject.draw([utterance], [GREEDY], FRAMES)[0].codes
        hot = subject.draw([utterance], [replace(HOT, seed=utterance.seed)], FRAMES)[0].codes
        found.append(
            asdict(utterance) | {"greedy": codes, "drawn": hot} | _of_codes(subject, utterance, codes)
        )
    samples = subject.decode(found[0]["greedy"])
    embedding = (
        [] if cloner is None else cloner.speaker_encoder.embed(torch.from_numpy(samples)).tolist()
    )
    return {
        "made_with": {
            "version": qwen_megakernel.__version__, "torch": torch.__version__,
            "machine": platform.machine(), "device": device_name(torch.device(subject.device)),
            "dtype": subject.dtype, "backend": subject.runs["backend"],
        },
        "utterances": found,
        "embedding": [round(value, 6) for value in embedding],
    }  # fmt: skip


def _of_codes(subject: Subject, utterance: Utterance, codes: list[list[int]]) -> Found:
    """The log-probabilities and the sound of given codes."""
    rows, _ = subject.rows(utterance, 1)
    talker, predictor = subject.forced(utterance, codes)
    drawn = np.array(codes)
    samples = subject.decode(codes)
    power = np.square(samples.astype(np.float64)).reshape(-1, HOP).mean(1)
    return {
        "rows": [len(rows), round(float(np.linalg.norm(rows)), 4)],
        "log_p": np.round(
            np.concatenate([_log_p(talker[:, None], drawn[:, :1]), _log_p(predictor, drawn[:, 1:])], 1),
            4,
        ).tolist(),
        "level_db": np.round(10 * np.log10(np.maximum(power, 1e-12)), 2).tolist(),
        "samples": hashlib.sha256(np.rint(samples * 32_767).astype("<i2").tobytes()).hexdigest()[:16],
    }


def _log_p(logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Log-probabilities of codes [frames, c] under logits [frames, c, vocabulary]."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    sums = top + np.log(np.exp(wide - top[..., None]).sum(-1))
    codes = np.minimum(codes, logits.shape[-1] - 1)  # an EOS frame's other codes say nothing
    own: np.ndarray = np.take_along_axis(wide, codes[..., None], -1)[..., 0] - sums
    return own


def compare(kept: Mapping[str, Any], subject: Subject, cloner: VoiceCloner | None) -> Found:
    """Hold what is said here against a record.

    In fp32 on both sides the figures must be the recorded ones but for ties. Else codes are told only.
    """
    section = Section("golden")
    exact = subject.dtype == "fp32" and kept["made_with"]["dtype"] == "fp32"
    said = [Utterance(*(u[name] for name in Utterance.__slots__)) for u in kept["utterances"]]
    now = record(subject, cloner, said)
    off = _differences(kept, now, subject, said, FP32_ERROR if exact else BF16_ROWS)
    ties = TIES if exact else None
    allowed: dict[str, float | None] = {
        "prompts whose rows differ": 0,
        "utterances whose greedy codes differ": ties,
        "utterances whose drawn codes differ": ties,
        "largest difference of a log-probability": FP32_ERROR if exact else BF16_LOG_P,
        "largest difference of a frame's level, dB": LEVEL_DB if exact else BF16_LEVEL_DB,
        "speaker embedding, 1 - cosine": EMBEDDING if exact else BF16_EMBEDDING,
        "utterances whose 16-bit samples differ": None,
    }
    rows, wrong = [], []
    for figure, value in off.items():
        most = allowed[figure]
        if most is not None and not value <= most:
            wrong.append(figure)
        word = "told only" if most is None else "DIFFERS" if figure in wrong else "as recorded"
        rows.append([figure, f"{value:.2g}", "" if most is None else most, word])
    section.judge("golden record", len(wrong), detail="; ".join(wrong))
    section.table("Against the record", ["figure", "here", "allowed", ""], rows)
    names = sorted(now["made_with"])
    made = [
        [side, *(one["made_with"].get(n, "") for n in names)]
        for side, one in (("record", kept), ("here", now))
    ]
    section.table("Made with", ["", *names], made)
    return section.found()


def _differences(
    kept: Mapping[str, Any], now: Found, subject: Subject, said: Sequence[Utterance], rows_error: float
) -> dict[str, float]:
    """Differences to the record, by figure. Log-probabilities and levels are those of the recorded
    codes."""
    counts = dict.fromkeys(("rows", "greedy", "drawn", "bits"), 0)
    log_p = level = 0.0
    for utterance, old, new in zip(said, kept["utterances"], now["utterances"], strict=True):
        fixed = _of_codes(subject, utterance, old["greedy"])
        counts["greedy"] += old["greedy"] != new["greedy"]
        counts["drawn"] += old["drawn"] != new["drawn"]
        counts["bits"] += fixed["samples"] != old["samples"]
        (length, norm), (old_length, old_norm) = fixed["rows"], old["rows"]
        counts["rows"] += length != old_length or abs(norm / old_norm - 1) > rows_error
        log_p = max(log_p, float(np.abs(np.array(fixed["log_p"]) - old["log_p"]).max()))
        loud = np.array(old["level_db"]) > QUIET_DB
        levels = np.abs(np.array(fixed["level_db"]) - old["level_db"])
        level = max(level, float(levels[loud].max(initial=0)))
    found = {
        "prompts whose rows differ": float(counts["rows"]),
        "utterances whose greedy codes differ": float(counts["greedy"]),
        "utterances whose drawn codes differ": float(counts["drawn"]),
        "largest difference of a log-probability": log_p,
        "largest difference of a frame's level, dB": level,
        "utterances whose 16-bit samples differ": float(counts["bits"]),
    }
    if kept["embedding"] and now["embedding"]:
        a, b = np.array(kept["embedding"]), np.array(now["embedding"])
        found["speaker embedding, 1 - cosine"] = float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return found
