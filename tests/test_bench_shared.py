"""The bench's shared part: its arithmetic, and its other program on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from live_server import ROOT

from qwen_megakernel import bench_tts
from qwen_megakernel.__main__ import main
from qwen_megakernel.bench import mps
from qwen_megakernel.bench.load import summary
from qwen_megakernel.bench.load_client import Findings, LoadTurn
from qwen_megakernel.bench.shared import Neighbour, notes, rows, running_neighbour, step_rate

SMALL = ("--width", "64")


def test_a_rate_is_that_of_the_steps_told_in_the_time():
    ticks = [(0.0, 0), (1.0, 100), (2.0, 200), (3.0, 250), (4.0, 300)]
    assert step_rate(ticks, 0.0, 2.0) == 100
    assert step_rate(ticks, 1.9, 4.5) == 50
    with pytest.raises(RuntimeError, match=r"made no steps for 0\.5 s"):
        step_rate(ticks, 2.2, 2.7)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_the_other_program_steps_until_it_is_ended(kind, device):
    start = time.monotonic()
    with running_neighbour(kind, device, {"OMP_NUM_THREADS": "1"}, *SMALL) as other:
        assert other.steps_per_s(start, time.monotonic()) > 0
        process = other._process
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 0


def test_another_program_that_fails_is_named():
    process = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit('no room on the GPU')"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the other program did not run: no room on the GPU"):
        Neighbour(process).wait_until_running()


def test_mps_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(mps.MpsError, match="nvidia-cuda-mps-control is not installed"),
        mps.running_mps(),
    ):
        pass
    control = tmp_path / mps.CONTROL
    control.write_text("#!/bin/sh\necho Cannot find MPS control daemon process >&2\nexit 1\n")
    control.chmod(0o755)
    with pytest.raises(mps.MpsError, match="exit status 1, Cannot find"), mps.running_mps():
        pass


def test_the_mps_daemon_is_told_to_quit(tmp_path, monkeypatch):
    control, told = tmp_path / mps.CONTROL, tmp_path / "told"
    control.write_text(
        f"#!{shutil.which('sh')}\n[ $# = 0 ] && read line && echo $line > {told} || exit 0\n"
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.running_mps() as variables:
        assert os.path.isdir(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert not told.exists()
    assert told.read_text().startswith("quit")
    assert not os.path.exists(variables["CUDA_MPS_PIPE_DIRECTORY"])


def row(**more):
    turn = LoadTurn("cancelled", ttfb_ms=5.0, ttfa_ms=6.0, audio_s=4.0)
    run = {"voices": 8, **summary([Findings([turn])], 5.0)}
    return {"beside": "decode", "sharing": "slicing", "run": run, **more}


def test_a_row_has_the_loss_of_the_other_program():
    shared = {
        "seconds": 5.0,
        "neighbour_environ": {"CUDA_MPS_CLIENT_PRIORITY": "1"},
        "server_options": ["--sms", "66"],
        "rows": [
            row(steps_alone=500.0, steps_beside=475.0),
            row(),
            {"sharing": "mps", "skipped": "it is not installed"},
        ],
    }
    loss, alone = rows(shared)
    assert loss[:2] == ["8 voices beside decode", "time slicing"]
    assert loss[-3:] == ["500.0", "475.0", "5.0 %"]
    assert alone[-3:] == ["-"] * 3
    said = " ".join(notes(shared))
    for part in ("CUDA_MPS_CLIENT_PRIORITY", "--sms 66", "Not measured: MPS, it is not installed."):
        assert part in said
    assert "| 8 voices beside decode |" in bench_tts.shared_table(shared)


def test_without_a_gpu_a_sentence_says_so(tmp_path, capsys):
    out = tmp_path / "shared.json"
    model = str(ROOT / "demo_voice")
    assert (
        main(["bench", "--parts", "shared", "--device", "cpu", "--model", model, "--json", str(out)])
        == 0
    )
    assert (
        "Shared GPU: not measured, programs share a GPU, and there is none." in capsys.readouterr().out
    )
    assert json.loads(out.read_text())["shared"] == {
        "skipped": "programs share a GPU, and there is none"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beside", "games"), "'games': expected some of nothing, decode, prompt"),
        (("--sharing", "mig"), "'mig': expected some of slicing, mps"),
        (("--neighbour-environ", "PRIORITY"), "expected NAME=VALUE"),
    ],
)
def test_a_wrong_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", "--parts", "shared", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
