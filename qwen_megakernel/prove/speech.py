"""Speech as a listener gets it: utterances by the official package and by ours, in pairs.

Both sides speak the same text in the same voice with the checkpoint's own sampling. Their draws differ,
so that two utterances of a pair are alike in distribution only: figures are compared over many pairs.
"""

from __future__ import annotations

import base64
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qwen_megakernel.config import MAX_UTTERANCE_FRAMES as MAX_FRAMES
from qwen_megakernel.config import SAMPLE_RATE, GenerationParams
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.prove import acoustics
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.independent_encoder import IndependentEncoder
from qwen_megakernel.prove.official import OfficialProcess
from qwen_megakernel.prove.resume import Findings
from qwen_megakernel.prove.transcripts import Recogniser, character_errors, word_errors
from qwen_megakernel.prove.utterances import Utterance, item
from qwen_megakernel.tts_model import TTSDecoder
from qwen_megakernel.turn import Audio, Finished, TurnEvent

BLOCK = 20
"""Number of utterances that are spoken together and whose results are kept together."""
SIDES = ("ours", "official")
EARLY = 0.5
"""An utterance stopped early if it takes less than this part of the median time for a character."""
RESAMPLES = 4000
REVISION = 1
"""Revision of the kept results. A change makes earlier ones invalid."""
MIN_SIMILARITY_S = 0.5

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spoken:
    """One side's utterance."""

    samples: np.ndarray
    """float32 [n] at 24 kHz."""
    reason: str
    """Its `FinishReason`."""

    @property
    def stopped(self) -> bool:
        """Whether it ended by EOS."""
        return self.reason == "stop"


def speak(tts: TTSDecoder, utterances: Sequence[Utterance], voices: Mapping[str, Voice]) -> list[Spoken]:
    """Speak through the engine, side by side, each with its own seed."""
    queues: list[queue.SimpleQueue[TurnEvent]] = [queue.SimpleQueue() for _ in utterances]
    for utterance, events in zip(utterances, queues, strict=True):
        tts.open_turn(
            utterance.text, sink=events.put, ended=True, voice=voices[utterance.voice],
            language=utterance.language, streaming=utterance.streaming,
            params=replace(tts.default_params, seed=utterance.seed),
        )  # fmt: skip
    return [_collect(events) for events in queues]


def _collect(events: queue.SimpleQueue[TurnEvent]) -> Spoken:
    chunks = [np.zeros(0, np.float32)]
    while not isinstance(event := events.get(), Finished):
        if isinstance(event, Audio):
            chunks.append(event.samples)
    return Spoken(np.concatenate(chunks), event.reason)


def speak_officially(
    official: OfficialProcess,
    utterances: Sequence[Utterance],
    voices: Mapping[str, Voice],
    *,
    budgets: Sequence[int],
    params: GenerationParams,
    dtype: str,
    seed: int,
) -> list[Spoken]:
    """Speak the utterances by the official package, as one batch.

    Args:
        official: has loaded the checkpoint in `dtype`.
        utterances: of one layout.
        voices: by name.
        budgets: frames that each may take.
        params: sampling.
        dtype: `fp32` or `bf16`.
        seed: of the batch.
    """
    reply, arrays = official.ask_arrays(
        "sample",
        items=[item(utterance, voices) for utterance in utterances],
        dtype=dtype, seed=seed, budgets=list(budgets), sampling=official_sampling(params),
    )  # fmt: skip
    return [
        Spoken(arrays[str(index)], "stop" if stopped else "length")
        for index, stopped in enumerate(reply["stopped"])
    ]


def official_sampling(params: GenerationParams) -> dict[str, Any]:
    """Sampling as keyword arguments of the official `generate`."""
    found: dict[str, Any] = {"repetition_penalty": params.talker.repetition_penalty}
    for prefix, switch, one in (
        ("", "do_sample", params.talker),
        ("subtalker_", "subtalker_dosample", params.predictor),
    ):
        found[switch] = one.temperature > 0
        found[f"{prefix}top_k"], found[f"{prefix}top_p"] = one.top_k, one.top_p
        found[f"{prefix}temperature"] = one.temperature or 1.0
    return found


class Judge:
    """Figures of one utterance: recogniser, speaker encoders, acoustics."""

    def __init__(
        self,
        recogniser: Recogniser | None,
        encoder: SpeakerEncoder | None,
        independent: IndependentEncoder | None = None,
        recordings: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Keep the encoders and the recogniser. Figures of one that is None are left out.

        Args:
            recogniser: writes speech down.
            encoder: the checkpoint's, which made the voices' embeddings.
            independent: another encoder, for the voices that have a recording.
            recordings: by voice, float32 [n] at 24 kHz.
        """
        self._recogniser, self._encoder, self._independent = recogniser, encoder, independent
        self._references = (
            {}
            if independent is None
            else {name: independent.embed(samples) for name, samples in (recordings or {}).items()}
        )
        self.name = recogniser.name if recogniser is not None else None

    def figures(self, utterance: Utterance, voice: Voice, spoken: Spoken) -> dict[str, Any]:
        """A row of the report, as JSON values."""
        sound = acoustics.measure(spoken.samples)
        row: dict[str, Any] = asdict(sound) | {
            "stopped": spoken.stopped,
            "s_per_char": sound.duration_s / max(1, len(utterance.text)),
        }
        if self._recogniser is not None:
            heard = ""
            if sound.loudness_dbfs > -120:
                heard = self._recogniser.write_down(spoken.samples, language=utterance.language)
            row["heard"] = heard
            row["errors"], row["words"] = word_errors(utterance.text, heard, utterance.language)
            row["char_errors"], row["chars"] = character_errors(utterance.text, heard)
        if self._encoder is not None and voice.speaker_embedding is not None:
            row["similarity"] = self._similarity(voice.speaker_embedding, spoken.samples)
        if self._independent is not None and utterance.voice in self._references:
            row["independent_similarity"] = None
            if len(spoken.samples) >= MIN_SIMILARITY_S * SAMPLE_RATE:
                own = self._independent.embed(spoken.samples)
                row["independent_similarity"] = float(own @ self._references[utterance.voice])
        return row

    def _similarity(self, embedding: torch.Tensor, samples: np.ndarray) -> float | None:
        """Cosine between the voice's embedding and that of its speech; None if there is too little
        sound."""
        encoder = self._encoder
        if encoder is None or len(samples) < MIN_SIMILARITY_S * SAMPLE_RATE:
            return None
        own = encoder.embed(torch.from_numpy(samples)).float().cpu()
        return float(F.cosine_similarity(own, embedding.float(), dim=0))


@dataclass(frozen=True, slots=True)
class Speakers:
    """Both sides, ready to speak."""

    tts: TTSDecoder
    official: OfficialProcess
    voices: Mapping[str, Voice]
    dtype: str
    """Precision of the official side."""
    count_tokens: Callable[[str], int]
    """Counts the tokens of a text, which limit an utterance."""


def pairs(
    findings: Findings, speakers: Speakers, judge: Judge, utterances: Sequence[Utterance], report: Report
) -> list[dict[str, Any]]:
    """The row of each pair. Blocks that an earlier run has spoken are read from its findings."""
    rows: list[dict[str, Any]] = []
    for number, begin in enumerate(range(0, len(utterances), BLOCK)):
        part = utterances[begin : begin + BLOCK]
        depends = {
            "revision": REVISION, "utterances": [asdict(u) for u in part], "dtype": speakers.dtype,
            "recogniser": judge.name, "sampling": asdict(speakers.tts.default_params),
        }  # fmt: skip
        found = findings.get(
            f"speech/block-{number:03}", depends, partial(block, speakers, judge, part, number)
        )
        rows += found["rows"]
        report(f"speech: {len(rows)} of {len(utterances)} pairs")
    return rows


def block(
    speakers: Speakers, judge: Judge, utterances: Sequence[Utterance], seed: int
) -> dict[str, Any]:
    """Speak and judge a block of pairs. Returns `rows` as JSON values."""
    tts, voices = speakers.tts, speakers.voices
    guards = tts.default_params.guards
    budgets = [guards.budget(speakers.count_tokens(u.text)) or MAX_FRAMES for u in utterances]
    sides = {
        "ours": speak(tts, utterances, voices),
        "official": speak_officially(
            speakers.official, utterances, voices,
            budgets=budgets, params=tts.default_params, dtype=speakers.dtype, seed=seed,
        ),
    }  # fmt: skip
    rows = []
    for index, utterance in enumerate(utterances):
        row: dict[str, Any] = asdict(utterance)
        for side in SIDES:
            spoken = sides[side][index]
            row[side] = judge.figures(utterance, voices[utterance.voice], spoken)
            row[side]["mp3"] = base64.b64encode(acoustics.as_mp3(spoken.samples)).decode()
        rows.append(row)
    return {"rows": rows}


# ---------------------------------------------------------------------------- figures of many


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of each side and of their difference, with 95 % intervals; JSON values.

    Intervals are of the bootstrap over texts. `wer_upper` is the upper 95 % bound (one-sided) of the
    difference of word error rates, ours less the official one.
    """
    found: dict[str, Any] = {"pairs": len(rows), "texts": len({row["text"] for row in rows})}
    median = float(np.median([row["official"]["s_per_char"] for row in rows]))
    table: dict[str, dict[str, np.ndarray]] = {}
    for name in ("s_per_char", "leading_silence_s", "trailing_silence_s", "loudness_dbfs", "clipped"):
        table[name] = {side: np.array([row[side][name] for row in rows]) for side in SIDES}
    table["runaway"] = {s: np.array([not row[s]["stopped"] for row in rows], float) for s in SIDES}
    table["early_stop"] = {
        s: np.array([row[s]["s_per_char"] < EARLY * median for row in rows], float) for s in SIDES
    }
    for name in ("similarity", "independent_similarity"):
        if all(row[side].get(name) is not None for row in rows for side in SIDES):
            table[name] = {s: np.array([row[s][name] for row in rows]) for s in SIDES}
    texts = [row["text"] for row in rows]
    ones = np.ones(len(rows))
    found["figures"] = {
        name: _compared(sides["ours"], sides["official"], ones, texts) for name, sides in table.items()
    }
    if all("errors" in row[side] for row in rows for side in SIDES):
        for name, errors, size in (("wer", "errors", "words"), ("cer", "char_errors", "chars")):
            ours, theirs = (np.array([row[s][errors] for row in rows], float) for s in SIDES)
            sizes = np.array([row["ours"][size] for row in rows], float)
            found["figures"][name] = _compared(ours, theirs, sizes, texts)
    return found


def _compared(
    ours: np.ndarray, theirs: np.ndarray, sizes: np.ndarray, texts: Sequence[str]
) -> dict[str, Any]:
    """Sums over sizes of both sides, and their difference; the bootstrap draws texts."""
    names = sorted(set(texts))
    place = {text: index for index, text in enumerate(names)}
    index = np.array([place[text] for text in texts])
    sums = np.stack([np.bincount(index, values, len(names)) for values in (ours, theirs, sizes)])
    chosen = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    ours_sum, theirs_sum, size_sum = sums[:, chosen].sum(-1)
    samples = {
        "ours": ours_sum / size_sum,
        "official": theirs_sum / size_sum,
        "difference": (ours_sum - theirs_sum) / size_sum,
    }
    totals = sums.sum(1)
    values = {
        "ours": totals[0] / totals[2],
        "official": totals[1] / totals[2],
        "difference": (totals[0] - totals[1]) / totals[2],
    }
    found: dict[str, Any] = {
        name: {"value": float(values[name]), "interval": np.percentile(drawn, (2.5, 97.5)).tolist()}
        for name, drawn in samples.items()
    }
    found["upper"], found["lower"] = np.percentile(samples["difference"], (95, 5)).tolist()
    found["standard_error"] = float(samples["difference"].std())
    return found


SHOWN = (
    ("wer", "word error rate"), ("cer", "character error rate"), ("similarity", "speaker similarity"),
    ("independent_similarity", "the same by the independent encoder"),
    ("s_per_char", "seconds a character"), ("leading_silence_s", "leading silence, s"),
    ("trailing_silence_s", "trailing silence, s"), ("loudness_dbfs", "loudness, dBFS"),
    ("clipped", "clipped samples"), ("runaway", "did not end by EOS"), ("early_stop", "stopped early"),
)  # fmt: skip
ENOUGH_PAIRS = 500
"""From this number of pairs on, the worse end of an interval is judged. Fewer pairs can show that
something is wrong, but not that all is right. For them the difference minus `FEW_ERRORS` standard
errors is judged."""
FEW_ERRORS = 4
FEW_DURATION = 0.25


def measure(rows: Sequence[Mapping[str, Any]], missing: str) -> Found:
    """Run the whole part. If there is no recogniser, `missing` says why."""
    section, found = Section("speech"), summary(rows)
    figures, enough = found["figures"], len(rows) >= ENOUGH_PAIRS
    section.figures = found
    pairs_of = f"{len(rows)} pairs, " + (
        "95 % bound" if enough else f"less {FEW_ERRORS} standard errors"
    )

    def worse(name: str) -> float:
        one = figures[name]
        few = one["difference"]["value"] - FEW_ERRORS * one["standard_error"]
        return float(one["upper"] if enough else few)

    for name, gate in (("wer", "word error rate"), ("cer", "character error rate")):
        if name in figures:
            section.judge(gate, worse(name), detail=pairs_of)
        else:
            section.skip(gate, missing)
    for name, gate in (("runaway", "runaway"), ("early_stop", "early stop")):
        section.judge(gate, worse(name), detail=pairs_of)
    kinds = [name for name in ("similarity", "independent_similarity") if name in figures]
    for one in (figures[name] for name in kinds):
        few = one["difference"]["value"] + FEW_ERRORS * one["standard_error"]
        section.judge("speaker similarity", one["lower"] if enough else few, detail=pairs_of)
    if not kinds:
        section.skip("speaker similarity", "no speaker encoder")
    ratio = figures["s_per_char"]["ours"]["value"] / figures["s_per_char"]["official"]["value"]
    section.judge(
        "duration", abs(ratio - 1), limit=None if enough else FEW_DURATION, detail=f"{ratio:.3f}"
    )
    silences = [
        abs(figures[f"{end}_silence_s"]["difference"]["value"]) for end in ("leading", "trailing")
    ]
    section.judge("silence", max(silences))
    section.judge("loudness", abs(figures["loudness_dbfs"]["difference"]["value"]))
    section.judge("clipping", abs(figures["clipped"]["difference"]["value"]))
    table = [
        [label, *(_with_interval(figures[name][side]) for side in (*SIDES, "difference"))]
        for name, label in SHOWN
        if name in figures
    ]
    head = ["figure", "ours", "official", "difference"]
    section.table(f"{found['pairs']} pairs, 95 % intervals", head, table)
    section.clips = [dict(row) for row in rows]
    return section.found()


def _with_interval(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['value']:.4g} ({low:.4g} to {high:.4g})"
