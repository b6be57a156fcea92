"""Golden records: what a checkpoint says here, to be held against another machine or version."""

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
EMBEDDING = 1e-4
QUIET_DB = -60.0
TIES = 1
"""Utterances whose draws may differ: fp32 sums of other orders decide a tie otherwise."""


def record(subject: Subject, cloner: VoiceCloner | None, said: Sequence[Utterance]) -> Found:
    """Figures of a few utterances; JSON values."""
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
    """What follows from given codes: their log-probabilities, their sound."""
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
    """Of codes [frames, c] under logits [frames, c, vocabulary]."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    sums = top + np.log(np.exp(wide - top[..., None]).sum(-1))
    codes = np.minimum(codes, logits.shape[-1] - 1)  # an EOS frame's other codes say nothing
    own: np.ndarray = np.take_along_axis(wide, codes[..., None], -1)[..., 0] - sums
    return own


def compare(kept: Mapping[str, Any], subject: Subject, cloner: VoiceCloner | None) -> Found:
    """Hold what is said here against a record."""
    section = Section("golden")
    exact = subject.dtype == "fp32" and kept["made_with"]["dtype"] == "fp32"
    said = [Utterance(*(u[name] for name in Utterance.__slots__)) for u in kept["utterances"]]
    now = record(subject, cloner, said)
    table, wrong = [], 0

    def line(figure: str, value: Any, allowed: Any, good: bool | None) -> None:
        nonlocal wrong
        wrong += good is False
        table.append(
            [figure, value, allowed, {True: "as recorded", False: "DIFFERS", None: "told only"}[good]]
        )

    greedy_ties, drawn_ties, log_p, level, rows, bits = 0, 0, 0.0, 0.0, 0, 0
    for utterance, old, new in zip(said, kept["utterances"], now["utterances"], strict=True):
        fixed = _of_codes(subject, utterance, old["greedy"])
        greedy_ties += old["greedy"] != new["greedy"]
        drawn_ties += old["drawn"] != new["drawn"]
        log_p = max(log_p, float(np.abs(np.array(fixed["log_p"]) - old["log_p"]).max()))
        loud = np.array(old["level_db"]) > QUIET_DB
        level = max(
            level, float(np.abs(np.array(fixed["level_db"]) - old["level_db"])[loud].max(initial=0))
        )
        scale = FP32_ERROR if exact else 0.02
        rows += fixed["rows"][0] != old["rows"][0] or abs(fixed["rows"][1] / old["rows"][1] - 1) > scale
        bits += fixed["samples"] != old["samples"]
    line("prompts whose rows differ", rows, 0, rows == 0)
    line(
        "utterances whose greedy codes differ", greedy_ties, TIES, greedy_ties <= TIES if exact else None
    )
    line("utterances whose drawn codes differ", drawn_ties, TIES, drawn_ties <= TIES if exact else None)
    allowed = FP32_ERROR if exact else BF16_LOG_P
    line("largest difference of a log-probability", f"{log_p:.2g}", allowed, log_p <= allowed)
    allowed = LEVEL_DB if exact else BF16_LEVEL_DB
    line("largest difference of a frame's level, dB", f"{level:.2g}", allowed, level <= allowed)
    line("utterances whose 16-bit samples differ", bits, "", None)
    if kept["embedding"] and now["embedding"]:
        a, b = np.array(kept["embedding"]), np.array(now["embedding"])
        off = float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        line(
            "speaker embedding, 1 - cosine",
            f"{off:.2g}",
            EMBEDDING if exact else 0.02,
            off <= (EMBEDDING if exact else 0.02),
        )
    section.judge(
        "golden record", wrong, detail="; ".join(row[0] for row in table if row[3] == "DIFFERS")
    )
    section.table("Against the record", ["figure", "here", "allowed", ""], table)
    names = sorted(now["made_with"])
    section.table(
        "Made with", ["", *names],
        [["record", *(kept["made_with"].get(n, "") for n in names)],
         ["here", *(now["made_with"][n] for n in names)]],
    )  # fmt: skip
    return section.found()
