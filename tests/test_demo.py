"""`make demo`: it speaks, it fails when a part of it fails, and it leaves no server behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import wave

import numpy as np
import pytest
from live_server import ROOT

from qwen_megakernel.tools.demo import TEXT, DemoError, run_step, running_server
from training.listening import word_errors


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "qwen_megakernel", "demo", "--folder", str(folder), *arguments],
        cwd=ROOT,
        # What a user may have set must not reach the demo's server.
        env={**os.environ, "QWEN_MEGAKERNEL_TOKEN": "not-for-the-demo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def server_is_gone(output):
    port = int(re.search(r"listening on 127.0.0.1 port (\d+)", output)[1])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_speaks_so_that_it_is_understood(tmp_path, listener):
    process = start(tmp_path)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert err == ""
    with wave.open(str(tmp_path / "demo.wav")) as file:
        assert file.getframerate() == 24_000
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    heard = listener.write_down(pcm.astype(np.float32) / 32768)
    errors, words = word_errors(TEXT, heard)
    assert errors <= words // 3, heard
    assert "finished: stop" in out
    assert "spoken by the demonstration voice" in out
    assert "qwen_megakernel serve --model Qwen/Qwen3-TTS-12Hz-0.6B-Base --speaker-ref voice.wav" in out
    assert server_is_gone(out)


def test_failing_step_fails():
    with pytest.raises(DemoError, match="exit status 3: python -c 'raise SystemExit"):
        run_step("-c", "raise SystemExit(3)", limit_s=120)
    with pytest.raises(DemoError, match="not done after 0 s"):
        run_step("-c", "import time; time.sleep(60)", limit_s=0.1)


@pytest.mark.slow
def test_server_that_cannot_load_fails(tmp_path, capsys):
    with (
        pytest.raises(DemoError, match="the server ended with exit status 1"),
        running_server("--model", tmp_path / "nothing"),
    ):
        pytest.fail("a server without a model got ready")
    assert "nothing: no such folder" in capsys.readouterr().out


@pytest.mark.slow
def test_failure_inside_stops_the_server(tiny_base, capfd):
    with pytest.raises(ZeroDivisionError), running_server("--model", tiny_base):
        raise ZeroDivisionError
    assert server_is_gone(capfd.readouterr().out)


def test_sigterm_takes_the_server_along(tmp_path):
    process = start(tmp_path)
    seen = ""
    for line in process.stdout:
        seen += line
        if "loading:" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert server_is_gone(seen + out)
