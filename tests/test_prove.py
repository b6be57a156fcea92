"""The command `prove` without its measurements: figures, resuming, the report to send."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import ROOT

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.prompt.voice import load_voices
from qwen_megakernel.prove import acoustics, golden, speech
from qwen_megakernel.prove.command import GOLDEN_FILE
from qwen_megakernel.prove.gates import GATES, Section, count_surprise, normal_surprise, verdict_line
from qwen_megakernel.prove.independent_encoder import IndependentEncoder, features
from qwen_megakernel.prove.paths import difference, words
from qwen_megakernel.prove.privacy import scrubbed, secrets, without_sound
from qwen_megakernel.prove.report import html
from qwen_megakernel.prove.resume import Findings
from qwen_megakernel.prove.subject import Subject, load_cloner
from qwen_megakernel.prove.transcripts import character_errors, word_errors
from qwen_megakernel.prove.utterances import paired, read_list, sentences

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("said", "heard", "language", "expected"),
    [
        ("Good evening, front desk.", "good evening front desk", "english", (0, 4)),
        ("Good evening.", "Good even ink.", "english", (2, 2)),
        ("It's nine.", "", "english", (2, 2)),
        ("你好世界", "你好，世", "chinese", (1, 4)),
        ("Ça va?", "ca va", "french", (1, 2)),
    ],
)
def test_word_errors(said, heard, language, expected):
    assert word_errors(said, heard, language) == expected


def test_character_errors():
    assert character_errors("Front desk.", "front dusk") == (1, 9)


def test_acoustics_of_a_tone_between_silences():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    samples = np.concatenate([np.zeros(4_800), tone, np.zeros(2_400)]).astype(np.float32)
    found = acoustics.measure(samples)
    assert found.duration_s == pytest.approx(1.3)
    assert found.leading_silence_s == pytest.approx(0.2)
    assert found.trailing_silence_s == pytest.approx(0.1, abs=1e-6)
    assert found.loudness_dbfs == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.05)
    assert acoustics.measure(np.clip(4 * samples, -1, 1)).clipped > 0.3
    assert acoustics.measure(np.zeros(100, np.float32)).loudness_dbfs == -120


def test_surprise_of_counts_and_sums():
    assert count_surprise(10, 10.0) < 0.5
    assert count_surprise(0, 12.0) > 4
    assert count_surprise(40, 10.0) > 4
    assert count_surprise(1, 0.0) == np.inf
    assert normal_surprise(3.0, 0.0, 1.0) == pytest.approx(-np.log10(0.0027), abs=0.01)
    assert normal_surprise(100.0, 0.0, 1.0) > 1_000


def test_summary_of_pairs_gives_the_difference_and_its_bound():
    rng = np.random.default_rng(1)
    rows = []
    for pair in range(600):
        side = {"stopped": True, "s_per_char": 0.06, "words": 8, "char_errors": 0, "chars": 40}
        side |= dict.fromkeys(("leading_silence_s", "trailing_silence_s", "clipped"), 0.0)
        side["loudness_dbfs"] = -20.0
        ours, theirs = (side | {"errors": int(rng.random() < rate)} for rate in (0.8, 0.4))
        rows.append({"text": f"text {pair % 60}", "ours": ours, "official": theirs})
    found = speech.summary(rows)["figures"]["wer"]
    assert found["difference"]["value"] == pytest.approx(0.05, abs=0.01)
    assert 0.05 < found["upper"] < 0.065
    assert found["difference"]["interval"][0] > 0.03
    assert {g["name"]: g["passed"] for g in speech.measure(rows, "")["gates"]}[
        "word error rate"
    ] is False


# ---------------------------------------------------------------------------- utterances


def test_pairs_are_each_text_in_each_voice_then_other_seeds():
    texts = sentences()
    found = paired(texts, ["a", "b"], 250, "english")
    assert len(set(found)) == 250
    assert {u.seed for u in found} == set(range(250))
    assert {(u.text, u.voice) for u in found[:120]} == {(t, v) for t in texts for v in "ab"}


def test_list_of_seed_tts_eval(tmp_path):
    (tmp_path / "one.wav").write_bytes(b"")
    path = tmp_path / "meta.lst"
    path.write_text("7-1|What was said.|one.wav|What to say.\n\n", encoding="utf-8")
    (found,) = read_list(path)
    assert (found.name, found.ref_text, found.text) == ("7-1", "What was said.", "What to say.")
    path.write_text("7-1|What was said.|one.wav\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"meta\.lst, line 1: 3 parts, expected 4"):
        read_list(path)
    path.write_text("7-1|a|two.wav|b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: no file two\.wav"):
        read_list(path)


def test_differences_of_either_format():
    truth = np.array([0.5, -0.25, 1.0], np.float32)
    assert difference(truth.copy(), truth) == ""
    assert difference(np.rint(truth * 32_767).astype("<i2"), truth) == ""
    assert difference(truth[:2], truth) == "2 samples instead of 3"
    close = truth + np.float32(1e-6) * (truth == 0.5)
    assert difference(close, truth).startswith("1 samples from 0 on")
    assert difference(close, truth, 1e-5) == ""
    assert "".join(words("One two, three.")) == "One two, three."


# ---------------------------------------------------------------------------- independent encoder


def protobuf(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A message of varints and strings, by field number."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    made = b""
    for number, value in fields:
        if isinstance(value, int):
            made += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            made += varint(number << 3 | 2) + varint(len(data)) + data
    return made


def write_averager(path: Path, *shape: int | str) -> None:
    """An ONNX model that averages its input over the second axis."""

    def value(name: str, sizes) -> bytes:
        dims = [(1, protobuf((1, s) if isinstance(s, int) else (2, s))) for s in sizes]
        kind = protobuf((1, protobuf((1, 1), (2, protobuf(*dims)))))
        return protobuf((1, name), (2, kind))

    axes = protobuf((1, "axes"), (8, 1), (20, 7))
    node = protobuf((1, "x"), (2, "y"), (4, "ReduceMean"), (5, axes))
    graph = protobuf((1, node), (2, "g"), (11, value("x", shape)), (12, value("y", (1, 1, *shape[2:]))))
    path.write_bytes(protobuf((1, 8), (7, graph), (8, protobuf((2, 13)))))


def test_independent_encoder_of_features_and_of_samples(tmp_path):
    pytest.importorskip("onnxruntime")
    samples = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    write_averager(tmp_path / "features.onnx", 1, "frames", 80)
    made = IndependentEncoder(tmp_path / "features.onnx").embed(samples)
    assert made.shape == (80,)
    assert np.linalg.norm(made) == pytest.approx(1)
    write_averager(tmp_path / "samples.onnx", 1, "n")
    assert abs(IndependentEncoder(tmp_path / "samples.onnx").embed(samples + 0.1)[0]) == 1
    write_averager(tmp_path / "wrong.onnx", 1, "n", 2, 3)
    with pytest.raises(ValueError, match=r"wrong\.onnx takes .* allowed: \[1, n\]"):
        IndependentEncoder(tmp_path / "wrong.onnx")


def test_features_rise_with_the_pitch_of_a_tone():
    seconds = np.arange(16_000) / 16_000
    peaks = [
        int(features_of_tone.mean(0).argmax())
        for hz in (200, 1_000, 4_000)
        for features_of_tone in [features_without_mean(np.sin(2 * np.pi * hz * seconds))]
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < 15 < peaks[2]


def features_without_mean(samples: np.ndarray) -> np.ndarray:
    """Features without the mean, for a test whose silence before the tone changes the mean."""
    joined = np.concatenate([np.zeros(len(samples)), samples]).astype(np.float32)
    return features(joined)[len(samples) // 160 + 3 :]


# ---------------------------------------------------------------------------- resuming


def test_a_part_is_made_once_for_what_it_depends_on(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    findings = Findings(tmp_path, {"checkpoint": "a"})
    assert findings.get("part", {"size": 1}, make) == {"value": 1}
    assert findings.get("part", {"size": 1}, make) == {"value": 1}
    assert findings.get("part", {"size": 2}, make) == {"value": 2}
    assert Findings(tmp_path, {"checkpoint": "b"}).get("part", {"size": 2}, make) == {"value": 3}
    (tmp_path / "part.json").write_text("{")
    assert findings.get("part", {"size": 2}, make) == {"value": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


# ---------------------------------------------------------------------------- report


def example() -> dict:
    """A small report with everything that a report can hold."""
    tone = (0.2 * np.sin(np.arange(12_000) / 9)).astype(np.float32)
    mp3 = __import__("base64").b64encode(acoustics.as_mp3(tone)).decode()
    side = {"stopped": True, "s_per_char": 0.06, "duration_s": 0.5, "errors": 1, "words": 4,
            "heard": "<b>good</b> evening", "mp3": mp3}  # fmt: skip
    section = Section("speech")
    section.judge("word error rate", 0.5, detail="9 pairs in " + str(Path.home() / "models"))
    section.judge("loudness", 0.1)
    section.skip("speaker similarity", "no <encoder>")
    section.table("A table", ["a", "b"], [["x & y", 1.25]])
    section.plot("A plot", "frame", "probability", {"ours": [0.1, 0.9], "official": [0.2, 0.8]})
    section.clips = [
        {"text": "Good evening.", "voice": "rms", "seed": 3, "ours": side, "official": side}
    ]
    return {
        "passed": False, "model": "demo_voice", "about": {"device": socket.gethostname()},
        "sections": [section.found()],
    }  # fmt: skip


def test_verdict_names_the_failed_gate_and_its_limit():
    line = verdict_line(example()["sections"][0])
    assert line == (
        "speech: FAILED, 1 gates passed, 1 not measured: word error rate is 0.5, allowed: at most 0.02"
    )
    assert all(gate.suspects and gate.meaning for gate in GATES.values())


def test_report_tells_no_path_no_host_and_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    found = example()
    found["sections"][0]["notes"].append(f"{ROOT / 'demo_voice'} hf_verysecret {Path.home()}")
    hidden = secrets(ROOT)
    text = html(scrubbed(found, hidden)) + json.dumps(without_sound(scrubbed(found, hidden)))
    for secret in (str(ROOT), "hf_verysecret", str(Path.home()) + "/"):
        assert secret not in text
    if len(socket.gethostname()) >= 4:
        assert socket.gethostname() not in text
    assert "base64" not in json.dumps(without_sound(found))


def test_report_refers_to_nothing_outside_itself():
    text = html(example())
    addresses = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"'> )]+)""", text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "<b>good</b>" not in text
    assert "&lt;b&gt;good&lt;/b&gt; evening" in text
    assert "Look at: any of the gates above" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_report_opens_in_a_browser_without_an_error(tmp_path):
    page, log = tmp_path / "report.html", tmp_path / "net.json"
    page.write_text(html(example()), encoding="utf-8")
    opened = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-component-update",
         "--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--virtual-time-budget=2000",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in opened.stderr
    dom = opened.stdout
    assert dom.count("<audio") == 4
    assert "<polyline" in dom
    assert re.search(r"demo_voice: FAILED", dom)


# ---------------------------------------------------------------------------- golden record


@pytest.fixture(scope="module")
def subject():
    checkpoint = Checkpoint(ROOT / "demo_voice")
    cpu = torch.device("cpu")
    cloner = load_cloner(checkpoint, cpu)
    voices = load_voices(ROOT / "demo_voice" / "voices", cloner)
    made = Subject(
        checkpoint, voices, backend="torch", device=cpu, dtype="fp32", report=lambda line: None
    )
    return made, cloner


@pytest.fixture(scope="module")
def kept() -> dict:
    return json.loads((ROOT / "tests" / "golden" / "prove" / GOLDEN_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize("num_utterances", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_the_demonstration_voice_is_as_recorded(subject, kept, num_utterances):
    section = golden.compare({**kept, "utterances": kept["utterances"][:num_utterances]}, *subject)
    assert all(gate["passed"] for gate in section["gates"]), section["tables"]


@pytest.mark.slow
def test_a_changed_weight_differs_from_the_record(subject, kept):
    made, cloner = subject
    part = {**kept, "utterances": kept["utterances"][:1]}
    weight = made.decoder._embeddings[0]
    weight[:128] *= 1.02
    try:
        section = golden.compare(part, made, cloner)
    finally:
        weight[:128] /= 1.02
    (gate,) = section["gates"]
    assert not gate["passed"]
    assert "log-probability" in gate["detail"]
