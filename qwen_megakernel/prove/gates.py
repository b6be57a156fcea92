"""Every gate: its limit, its meaning, and the usual cause of a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition."""

    part: str
    limit: float
    meaning: str
    suspects: str
    """Where to look first after a failure."""
    at_least: bool = False
    """Whether the value must be at least the limit. Otherwise it must be at most the limit."""


GATES: Mapping[str, Gate] = {
    "ran": Gate(
        "all", 1, "whether the part could run", "the message, and the doctor's findings", at_least=True,
    ),
    "prompt rows": Gate(
        "fidelity", 1e-4,
        "largest difference of a prompt or text row to the official one, over the largest value",
        "text tokens, template, language tag, layout, another voice's speaker embedding",
    ),
    "greedy frames": Gate(
        "fidelity", 1.0, "part of the greedy frames that equal the official ones",
        "repetition penalty, suppression, or whatever a gate on logits names", at_least=True,
    ),
    "unexplained differences": Gate(
        "fidelity", 0, "utterances whose first different code is no tie within the rounding error",
        "repetition penalty, suppression, or whatever a gate on logits names",
    ),
    "talker logits": Gate(
        "fidelity", 1.0,
        "KL divergence of code 0 from official fp32, teacher-forced, over the allowed one",
        "RoPE theta, interleaved RoPE instead of rotated halves, norms, key-value cache, weights",
    ),
    "predictor logits": Gate(
        "fidelity", 1.0,
        "the same of codes 1 to 15: the worst codebook",
        "with right talker logits: pre-norm hidden row to the predictor, its positions, two codebooks "
        "swapped",
    ),
    "EOS probability": Gate(
        "fidelity", 1.0, "largest difference of the probability of EOS, over the allowed one",
        "EOS suppressed or penalised, late text fed as padding, talker logits",
    ),
    "sampling parameters": Gate(
        "draws", 0, "parameters that the official package reads otherwise from the checkpoint",
        "repetition penalty, predictor temperature, top-k of generation_config.json",
    ),
    "suppressed codes": Gate(
        "draws", 0, "draws of codes that are never allowed", "missing suppression of control codes",
    ),
    "beyond top-k": Gate(
        "draws", 0, "draws below the last candidate, by more than the rounding error",
        "top-k with one candidate too many",
    ),
    "last candidate, talker": Gate(
        "draws", 4, "how unlikely the count of draws of the k-th candidate is, -log10 p",
        "top-k with one candidate too few or too many",
    ),
    "last candidate, predictor": Gate(
        "draws", 4, "the same of the code predictor", "top-k with one candidate too few or too many",
    ),
    "talker temperature": Gate(
        "draws", 4, "how unlikely the mean log-probability of the drawn codes 0 is, -log10 p",
        "talker temperature, noise that repeats",
    ),
    "predictor temperature": Gate(
        "draws", 4, "the same of codes 1 to 15",
        "predictor temperature (0 is greedy), noise that repeats",
    ),
    "repeated codes": Gate(
        "draws", 4, "how unlikely the count of codes 0 that were drawn before is, -log10 p",
        "repetition penalty",
    ),
    "EOS drawn": Gate(
        "draws", 4, "how unlikely the count of drawn EOS is, -log10 p",
        "EOS never drawn, or drawn too often",
    ),
    "used slot": Gate(
        "draws", 0, "codes and samples of an utterance that differ once others have used its slot",
        "caches not reset: key-value cache, seen codes, draws, codec history",
    ),
    "codec samples": Gate(
        "sound", 1e-4, "largest difference of a sample to the official decoder's",
        "codec history: a left context that is one frame short; two codebooks swapped",
    ),
    "samples a frame": Gate(
        "sound", 0, "samples a frame beside 1,920", "another sample rate, such as 16 kHz called 24 kHz",
    ),
    "speaker embedding": Gate(
        "sound", 0.9999, "smallest cosine of a recording's embedding to the official one",
        "resampling, 16 kHz samples called 24 kHz, the mel spectrogram", at_least=True,
    ),
    "codes of a recording": Gate(
        "sound", 1.0, "part of the reference codes that equal the official ones",
        "resampling, the codec encoder", at_least=True,
    ),
    "clone in context": Gate(
        "sound", 1e-4, "largest difference of a sample of a clone in context, same codes",
        "the codec's state after the reference, the reference's length",
    ),
    "word error rate": Gate(
        "speech", 0.02, "95 % bound of the difference of word error rates to the official package",
        "any of the gates above; listen to the worst cases",
    ),
    "character error rate": Gate(
        "speech", 0.02, "the same of characters", "as the word error rate",
    ),
    "speaker similarity": Gate(
        "speech", -0.02, "95 % bound of the difference of cosines to the voice's embedding",
        "another voice's embedding", at_least=True,
    ),
    "duration": Gate(
        "speech", 0.15, "relative difference of seconds a character",
        "16 kHz samples called 24 kHz (1.5 times too fast), frames lost or repeated, EOS",
    ),
    "silence": Gate(
        "speech", 0.1, "difference of leading or trailing silence, seconds",
        "EOS, chunk borders, late text",
    ),
    "loudness": Gate("speech", 1.5, "difference of loudness, dB", "sample format, codec"),
    "clipping": Gate("speech", 0.001, "difference of clipped samples, a part", "sample format, codec"),
    "runaway": Gate(
        "speech", 0.01, "95 % bound of the difference of utterances that did not end by EOS",
        "an EOS never drawn, repetition penalty",
    ),
    "early stop": Gate(
        "speech", 0.01, "95 % bound of the difference of utterances under half the usual length",
        "EOS drawn too often, frames lost",
    ),
    "paths": Gate(
        "paths", 0, "ways to the same utterance whose samples are not the same bits",
        "batch, chunks, live text, or the wire form that the table names",
    ),
    "real time": Gate(
        "speed", 1.0, "median real-time factor of one voice", "the backend that runs; see the doctor",
    ),
    "underruns": Gate(
        "speed", 0, "underruns of one voice", "the backend that runs; a machine that is busy otherwise",
    ),
    "golden record": Gate(
        "golden", 0, "figures that differ from the record beyond what rounding explains",
        "the versions and the machine that the record names beside this one's",
    ),
}  # fmt: skip


@dataclass(slots=True)
class Section:
    """The findings of a part. `asdict` gives its JSON."""

    part: str
    gates: list[Found] = field(default_factory=list)
    tables: list[Found] = field(default_factory=list)
    plots: list[Found] = field(default_factory=list)
    clips: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: Found = field(default_factory=dict)

    def judge(self, name: str, value: float, *, limit: float | None = None, detail: str = "") -> None:
        """Compare a value with the limit of its gate. `limit` replaces the gate's own."""
        gate = GATES[name]
        held = gate.limit if limit is None else limit
        value = float(value)
        good = value >= held if gate.at_least else value <= held  # NaN fails
        self.gates.append(
            {"name": name, "value": value, "limit": held, "passed": bool(good), "detail": detail}
        )

    def skip(self, name: str, why: str) -> None:
        """Note a gate that does not apply here."""
        self.gates.append(
            {"name": name, "value": None, "limit": GATES[name].limit, "passed": None, "detail": why}
        )

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table to the report. Cells are text or numbers."""
        self.tables.append({"title": title, "head": list(head), "rows": [list(row) for row in rows]})

    def plot(self, title: str, x: str, y: str, series: Mapping[str, Sequence[float]]) -> None:
        """Add a plot to the report: a line over 0, 1, 2 ... for each name."""
        self.plots.append(
            {
                "title": title,
                "x": x,
                "y": y,
                "series": {k: [float(v) for v in s] for k, s in series.items()},
            }
        )

    def found(self) -> Found:
        """The findings as JSON values."""
        return asdict(self)


def verdict_line(section: Mapping[str, Any]) -> str:
    """One line for a part: how many gates passed, which failed, and where to look."""
    failed = [gate for gate in section["gates"] if gate["passed"] is False]
    passed = sum(gate["passed"] is True for gate in section["gates"])
    skipped = sum(gate["passed"] is None for gate in section["gates"])
    aside = f", {skipped} not measured" if skipped else ""
    if not failed:
        return f"{section['part']}: passed, {passed} gates{aside}"
    named = "; ".join(f"{gate['name']} is {shown(gate)}" for gate in failed)
    return f"{section['part']}: FAILED, {passed} gates passed{aside}: {named}"


def shown(gate: Mapping[str, Any]) -> str:
    """A gate's value and limit, such as `0.031, allowed: at most 0.02`."""
    if gate["value"] is None:
        return f"not measured: {gate['detail']}"
    word = "at least" if GATES[gate["name"]].at_least else "at most"
    return f"{gate['value']:.4g}, allowed: {word} {gate['limit']:.4g}"


# ---------------------------------------------------------------------------- chance


def normal_surprise(total: float, expected: float, variance: float) -> float:
    """-log10 of the two-sided probability of a sum this far from the expected one."""
    if variance <= 0:
        return 0.0 if abs(total - expected) < 1e-6 * max(1.0, abs(expected)) else math.inf
    z = abs(total - expected) / math.sqrt(variance)
    if z < 30:
        return -math.log10(max(math.erfc(z / math.sqrt(2)), 1e-300))
    return z * z / 2 / math.log(10)


def count_surprise(observed: int, expected: float) -> float:
    """The same for a count of rare events, by Poisson's distribution."""
    if expected <= 0:
        return math.inf if observed else 0.0

    def probability(k: int) -> float:
        return math.exp(k * math.log(expected) - expected - math.lgamma(k + 1))

    if observed <= expected:
        tail = sum(probability(k) for k in range(observed + 1))
    else:
        reach = observed + int(20 * math.sqrt(observed)) + 20
        tail = sum(probability(k) for k in range(observed, reach))
    return -math.log10(min(1.0, max(2 * tail, 1e-300)))
