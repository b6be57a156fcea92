"""Planted faults in this implementation: the gate for each finds and names it.

The reference is the official package in its own process, with the demonstration voice as checkpoint. It
computes each answer only once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import soxr
import torch
from live_server import ROOT

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.decoding import torch_backend
from qwen_megakernel.model.fused_layers import rms_norm
from qwen_megakernel.model.sampling import gather_sampling
from qwen_megakernel.prompt.voice import load_voices
from qwen_megakernel.prove import draws, fidelity, reference_voices, sound, speech
from qwen_megakernel.prove.gates import GATES, Section, verdict_line
from qwen_megakernel.prove.official import OfficialProcess
from qwen_megakernel.prove.subject import Drawn, Subject, load_cloner
from qwen_megakernel.prove.utterances import Utterance

pytestmark = pytest.mark.slow  # the official package's process takes its time
CHECKPOINT = ROOT / "demo_voice"
CPU = torch.device("cpu")
SAID = [
    Utterance("Good evening, this is the front desk.", "rms", 1),
    Utterance("The salt breeze came across from the sea.", "slt", 2),
]
DRAWS = 10_500
"""Draws of the predictor: enough for the rarest candidate."""


class Remembering:
    """The official process, which gets each question only once."""

    def __init__(self, process: OfficialProcess) -> None:
        self._process, self._known = process, {}

    def _get(self, method: str, do: str, arguments: dict):
        key = json.dumps([method, do, arguments], sort_keys=True)
        if key not in self._known:
            self._known[key] = getattr(self._process, method)(do, **arguments)
        return self._known[key]

    def ask(self, do: str, **arguments):
        return self._get("ask", do, arguments)

    def ask_arrays(self, do: str, **arguments):
        return self._get("ask_arrays", do, arguments)


@dataclass
class Bench:
    """The official side, and the speech of a correct subject."""

    official: Remembering
    checkpoint: Checkpoint
    voices: dict
    sampling: dict
    drawn: Sequence[Drawn] = ()

    def subject(self, checkpoint=None) -> Subject:
        source = checkpoint or self.checkpoint
        return Subject(
            source, self.voices, backend="torch", device=CPU, dtype="fp32", report=lambda line: None
        )

    @property
    def codes(self) -> list[list[list[int]]]:
        return [d.codes[:24] for d in self.drawn]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    if find_spec("qwen_tts") is None:
        pytest.skip("no official package")
    checkpoint = Checkpoint(CHECKPOINT)
    voices = load_voices(CHECKPOINT / "voices", load_cloner(checkpoint, CPU))
    with OfficialProcess(sys.executable, tmp_path_factory.mktemp("official")) as process:
        loaded = process.ask("load", model=str(CHECKPOINT), device="cpu", dtypes=["fp32", "bf16"])
        made = Bench(Remembering(process), checkpoint, voices, loaded["sampling"])
        params = draws.as_params(loaded["sampling"])
        made.drawn = draws.natural(made.subject(), SAID, params)
        yield made


def failed(section: Section) -> set[str]:
    found = section.found()
    names = {gate["name"] for gate in found["gates"] if gate["passed"] is False}
    assert all(name in verdict_line(found) for name in names)
    return names


def names_fault(names: set[str], gate: str, fault: str) -> None:
    assert gate in names
    assert fault in GATES[gate].suspects


# ---------------------------------------------------------------------------- logits


def with_config(bench: Bench, **parts) -> SimpleNamespace:
    """The checkpoint with another configuration of some parts."""
    checkpoint = bench.checkpoint
    return SimpleNamespace(
        config=replace(checkpoint.config, **parts), folder=checkpoint.folder, load=checkpoint.load
    )


def wrong_theta(bench: Bench) -> Subject:
    talker = replace(bench.checkpoint.config.talker, rope_theta=1e4)
    return bench.subject(with_config(bench, talker=talker))


def interleaved_rope(bench: Bench) -> Subject:
    """Rotating neighbours equals rotating halves of a permuted head, with q and k permuted alike."""
    checkpoint = with_config(bench)

    def load(prefix: str, module, **options) -> None:
        bench.checkpoint.load(prefix, module, **options)
        for layer in module.model.layers if prefix == "talker." else ():
            attention, dim = layer.self_attn, bench.checkpoint.config.talker.head_dim
            order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
            with torch.no_grad():
                for product in (attention.q_proj, attention.k_proj):
                    product.weight.copy_(product.weight.unflatten(0, (-1, dim))[:, order].flatten(0, 1))
                for norm in (attention.q_norm, attention.k_norm):
                    norm.weight.copy_(norm.weight[order])

    checkpoint.load = load
    return bench.subject(checkpoint)


def pre_norm_hidden(bench: Bench) -> Subject:
    subject, kept = bench.subject(), []
    layers, predict = subject.decoder._layers, subject.decoder._predict

    def run(x, rope, attend):
        for index, layer in enumerate(layers.layers):
            x = layer(x, rope, index, attend)
        kept[:] = [x[:, 0]]
        return rms_norm(x, layers._norm, layers._eps)

    subject.decoder._layers = run
    subject.decoder._predict = lambda hidden, *rest: predict(kept[0], *rest)
    return subject


def swapped_heads(bench: Bench) -> Subject:
    subject = bench.subject()
    heads = subject.decoder._talker.code_predictor.lm_head
    heads[4], heads[5] = heads[5], heads[4]
    return subject


def judged_logits(bench: Bench, subject: Subject) -> set[str]:
    section = Section("fidelity")
    fidelity.logits(section, {"PyTorch fp32": subject}, bench.official, SAID[:1], bench.codes[:1])
    return failed(section)


def test_a_right_subject_passes(bench):
    subject = bench.subject()
    assert judged_logits(bench, subject) == set()
    section = Section("fidelity")
    fidelity.rows(section, subject, bench.official, SAID)
    fidelity.greedy(section, subject, bench.official, SAID[:1], 24)
    sound.samples(section, subject, bench.official, bench.codes[:1])
    draws.used_slot(section, subject, SAID, 8)
    assert failed(section) == set()
    assert len(section.gates) == 6


@pytest.mark.parametrize(
    ("plant", "gate", "fault"),
    [
        (wrong_theta, "talker logits", "RoPE theta"),
        (interleaved_rope, "talker logits", "interleaved RoPE"),
        (pre_norm_hidden, "predictor logits", "pre-norm hidden row"),
        (swapped_heads, "predictor logits", "two codebooks swapped"),
    ],
)
def test_wrong_arithmetic(bench, plant: Callable[[Bench], Subject], gate: str, fault: str):
    names = judged_logits(bench, plant(bench))
    names_fault(names, gate, fault)
    if gate == "predictor logits":
        assert "talker logits" not in names


def test_another_voices_embedding(bench):
    subject = bench.subject()
    # The official side gets the right voice, because items are made from the utterance's own voices.
    wrong = replace(SAID[0], voice="slt")
    subject.rows, rows = lambda said, count: rows(wrong, count), subject.rows
    section = Section("fidelity")
    fidelity.rows(section, subject, bench.official, SAID[:1])
    names_fault(failed(section), "prompt rows", "another voice's speaker embedding")


# ---------------------------------------------------------------------------- draws


def sampling(monkeypatch, change: Callable) -> None:
    """Make the backend draw with changed parameters; `change(params, is_talker)`."""

    def gather(params, vocab_size, device):
        talker = vocab_size > 1024
        return gather_sampling(tuple(change(p, talker) for p in params), vocab_size, device)

    monkeypatch.setattr(torch_backend, "gather_sampling", gather)


def natural(bench: Bench, subject: Subject, frames: int) -> set[str]:
    params, section = draws.as_params(bench.sampling), Section("draws")
    spoken = draws.natural(subject, SAID, params, frames)
    draws.of_natural(section, draws.judge(subject, bench.official, SAID, spoken, params))
    return failed(section)


def hot(bench: Bench, subject: Subject, count: int) -> set[str]:
    section, number = Section("draws"), -(-count // 15 // draws.HOT_FRAMES)
    said = [replace(SAID[i % 2], seed=i) for i in range(number)]
    params = [replace(draws.HOT, seed=u.seed) for u in said]
    drawn = subject.draw(said, params, draws.HOT_FRAMES)
    judged = draws.judge(subject, bench.official, said, drawn, draws.HOT)
    assert len(judged["predictor.rank"]) >= count
    draws.of_hot(section, judged, (fidelity.FP32_ERROR,) * 2)
    return failed(section)


def wide(bench: Bench, subject: Subject) -> set[str]:
    section = Section("draws")
    drawn = subject.draw(SAID[:1], [draws.WIDE], draws.WIDE_FRAMES)
    draws.of_wide(section, draws.judge(subject, bench.official, SAID[:1], drawn, draws.WIDE))
    return failed(section)


def test_right_draws_pass(bench):
    assert natural(bench, bench.subject(), 96) == set()


def test_predictor_temperature_zero(bench, monkeypatch):
    sampling(monkeypatch, lambda p, talker: p if talker else replace(p, temperature=0.0))
    names = natural(bench, bench.subject(), 24)
    names_fault(names, "predictor temperature", "predictor temperature (0 is greedy)")
    assert "talker temperature" not in names


def test_an_eos_never_drawn(bench):
    subject = bench.subject()
    subject.decoder._suppress[:, subject.config.talker.codec_eos_id] = True
    names_fault(natural(bench, subject, 72), "EOS drawn", "EOS never drawn")


def test_missing_suppression(bench):
    subject = bench.subject()
    subject.decoder._suppress[:] = False
    names_fault(wide(bench, subject), "suppressed codes", "missing suppression")
    assert wide(bench, bench.subject()) == set()


@pytest.mark.parametrize("talker_excess", [1, -1])
def test_one_candidate_too_many_or_too_few(bench, monkeypatch, talker_excess):
    """One fault in the talker, the opposite one in the predictor."""
    sampling(
        monkeypatch, lambda p, talker: replace(p, top_k=p.top_k + (1 if talker else -1) * talker_excess)
    )
    names = hot(bench, bench.subject(), DRAWS)
    few, many = ("predictor", "talker") if talker_excess > 0 else ("talker", "predictor")
    names_fault(names, "beyond top-k", "one candidate too many")
    names_fault(names, f"last candidate, {few}", "one candidate too few")
    assert "suppressed codes" not in names, many


def penalised(bench: Bench, subject: Subject) -> set[str]:
    section, params = Section("draws"), [replace(draws.PENALISED, seed=u.seed) for u in SAID]
    drawn = subject.draw(SAID, params, draws.PENALISED_FRAMES)
    draws.of_penalised(section, draws.judge(subject, bench.official, SAID, drawn, draws.PENALISED))
    return failed(section)


def test_repetition_penalty_one(bench, monkeypatch):
    assert penalised(bench, bench.subject()) == set()
    sampling(monkeypatch, lambda p, talker: replace(p, repetition_penalty=1.0))
    names_fault(penalised(bench, bench.subject()), "repeated codes", "repetition penalty")


def test_repetition_penalty_one_in_the_parameters(bench):
    ours = draws.as_params({**bench.sampling, "repetition_penalty": 1.0})
    assert draws.sampling_differences(ours, bench.sampling) == ["repetition_penalty: 1.0, official 1.05"]
    assert draws.sampling_differences(draws.as_params(bench.sampling), bench.sampling) == []


def forget_codec_reset(subject: Subject) -> None:
    subject.codec.reset = lambda slot: None


def forget_seen_codes(subject: Subject) -> None:
    prefill = subject.decoder.prefill

    def keep(slot, *rest) -> None:
        seen = subject.decoder._seen[slot].clone()
        prefill(slot, *rest)
        subject.decoder._seen[slot] |= seen

    subject.decoder.prefill = keep


@pytest.mark.parametrize("plant", [forget_codec_reset, forget_seen_codes])
def test_caches_not_reset(bench, plant):
    subject, section = bench.subject(), Section("draws")
    plant(subject)
    draws.used_slot(section, subject, SAID, 24)
    names_fault(failed(section), "used slot", "caches not reset")


# ---------------------------------------------------------------------------- sound


def short_context(bench: Bench) -> Subject:
    codec = bench.checkpoint.config.codec
    shorter = replace(codec, sliding_window=codec.sliding_window - 1)
    return bench.subject(with_config(bench, codec=shorter))


def swapped_codebooks(bench: Bench) -> Subject:
    subject = bench.subject()
    launch = subject.codec.launch
    order = [0, 1, 2, 4, 3, *range(5, 16)]
    subject.codec.launch = lambda slots, codes: launch(slots, codes[:, order])
    return subject


def sixteen_kilohertz(bench: Bench) -> Subject:
    subject = bench.subject()
    launch = subject.codec.launch

    def slow(slots, codes):
        made = launch(slots, codes).samples()
        return SimpleNamespace(samples=lambda: soxr.resample(made.T, 24_000, 16_000).T)

    subject.codec.launch = slow
    return subject


@pytest.mark.parametrize(
    ("plant", "gate", "fault"),
    [
        (short_context, "codec samples", "a left context that is one frame short"),
        (swapped_codebooks, "codec samples", "two codebooks swapped"),
        (sixteen_kilohertz, "samples a frame", "16 kHz called 24 kHz"),
    ],
)
def test_wrong_sound(bench, plant: Callable[[Bench], Subject], gate: str, fault: str):
    section = Section("sound")
    sound.samples(section, plant(bench), bench.official, bench.codes[:1])
    names_fault(failed(section), gate, fault)


def test_speech_of_another_rate_and_another_voice():
    """The gates on speech, on invented rows: 40 pairs, 1.5 times as fast and unlike the voice."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(40):
        right = {
            "stopped": True, "s_per_char": 0.06 + 0.005 * rng.normal(), "leading_silence_s": 0.05,
            "trailing_silence_s": 0.1, "loudness_dbfs": -20.0, "clipped": 0.0, "similarity": 0.9,
            "errors": int(rng.integers(0, 2)), "words": 8, "char_errors": 1, "chars": 40,
        }  # fmt: skip
        wrong = right | {"s_per_char": right["s_per_char"] / 1.5, "similarity": 0.4, "errors": 3}
        wrong["stopped"] = pair % 2 > 0
        rows.append({"text": f"text {pair}", "ours": wrong, "official": right})
    found = speech.measure(rows, "")
    names = {gate["name"] for gate in found["gates"] if gate["passed"] is False}
    assert names == {"duration", "speaker similarity", "word error rate", "runaway"}
    same = speech.measure([{**row, "ours": row["official"]} for row in rows], "")
    assert all(gate["passed"] for gate in same["gates"])
    assert "16 kHz samples called 24 kHz" in GATES["duration"].suspects


# ---------------------------------------------------------------------------- cloning


def test_a_checkpoint_that_clones_in_context(tiny_base, tmp_path):
    """Random weights with a codec encoder: rows, codes of a recording and the clone's sound."""
    if find_spec("qwen_tts") is None:
        pytest.skip("no official package")
    checkpoint = Checkpoint(tiny_base)
    cloner, section = load_cloner(checkpoint, CPU), Section("sound")
    voices = reference_voices.cloned(cloner, lambda line: None)
    assert {voice.mode for voice in voices.values()} == {"x_vector", "icl"}
    subject = Subject(
        checkpoint, voices, backend="torch", device=CPU, dtype="fp32", report=lambda line: None
    )
    said = [replace(SAID[0], voice=name) for name in ("rms", "slt-in-context")]
    with OfficialProcess(sys.executable, tmp_path) as process:
        process.ask("load", model=str(tiny_base), device="cpu", dtypes=["fp32"])
        fidelity.rows(section, subject, process, said)
        codes = [d.codes for d in draws.natural(subject, said, draws.HOT, 12)]
        made = sound.samples(section, subject, process, codes)
        sound.speakers(section, cloner, process, sound.long_recording(made))
        sound.in_context(section, subject, process, said[0], (SAID[1].text, codes[0]))
    assert failed(section) == set()
    assert [gate["name"] for gate in section.gates if gate["passed"] is None] == []
