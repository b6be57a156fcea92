"""The bench: its arithmetic, the PyTorch frame that it compares with, and a whole run on a CPU."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from live_server import ROOT

from qwen_megakernel import bench_tts
from qwen_megakernel.__main__ import main
from qwen_megakernel.bench.dialects import TALKERS
from qwen_megakernel.bench.frame_kernel import (
    PARTS,
    BenchError,
    FrameFigures,
    frame_bytes,
    part_of,
    parts_of,
)
from qwen_megakernel.bench.player import SENTENCE, Player
from qwen_megakernel.bench.turns import CHARS, Spread, mixed_texts
from qwen_megakernel.decoding.frame_schedule import Exchange
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.synth.config import shape_config

# ---------------------------------------------------------------------------- arithmetic


def test_percentiles_lie_between_the_values():
    spread = Spread.of([float(n) for n in range(100, -1, -1)])
    assert (spread.p50, spread.p95, spread.p99, spread.count) == (50, 95, 99, 101)
    assert Spread.of([1.0, 2.0]).p50 == 1.5
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_a_player_hears_the_first_loud_window_and_counts_when_it_is_dry():
    player = Player()
    silence, loud = np.zeros(1920, np.int16), np.full(1920, 3000, np.int16)
    player.add(silence, now=10.0)  # plays until 10.08
    assert (player.first_at, player.audible_at, player.underruns) == (10.0, None, 0)
    late = loud.copy()
    late[:480] = 0
    player.add(late, now=10.05)  # plays from 10.08 on, and is silent for 20 ms
    assert player.audible_at == pytest.approx(10.10)
    player.add(loud, now=10.2)  # all was played at 10.16
    assert player.underruns == 1
    player.add(loud, now=10.27)
    assert player.underruns == 1
    assert player.num_samples == 4 * 1920


def test_texts_are_the_same_for_every_backend_and_of_many_lengths():
    assert len(SENTENCE) == 60
    texts = mixed_texts(200)
    assert texts == mixed_texts(200)
    lengths = [len(text) for text in texts]
    assert min(lengths) >= CHARS[0] - 8
    assert max(lengths) <= CHARS[1]
    assert max(lengths) - min(lengths) > 100


def test_every_exchange_has_a_part():
    listed = [
        Exchange("talker", -1, 27, "down"), Exchange("talker", -1, 28, "head"),
        Exchange("predictor", 1, 0, "code"), Exchange("predictor", 1, 0, "qkv"),
    ]  # fmt: skip
    parts = [part_of(exchange) for exchange in listed]
    assert parts == ["talker", "talker", "sampling", "predictor"]


def test_parts_are_medians_of_sums():
    parts = ["talker", "talker", "sampling", "predictor", "sampling"]
    stamps = np.array([[100, 1100, 1200, 4200, 4300], [5000, 7000, 7300, 9300, 9400]])
    stamps = np.concatenate([stamps, np.zeros((2, 3), int)], axis=1)  # room for more exchanges
    assert parts_of(stamps, parts) == pytest.approx({"talker": 1.5, "predictor": 2.5, "sampling": 0.3})
    with pytest.raises(BenchError, match="stamps"):
        parts_of(stamps, [*parts, "sampling"])


@pytest.mark.parametrize("shape", ["tiny", "tiny-1.7b", "0.6b"])
def test_bytes_are_those_of_the_weights_and_the_cache(shape):
    config = shape_config(shape)
    with torch.device("meta"):
        talker = Talker(config.talker, config.predictor)

    def matrices(module: torch.nn.Module) -> int:
        return sum(w.numel() for name, w in module.named_parameters() if "proj" in name and w.ndim == 2)

    predictor = talker.code_predictor
    once = matrices(talker.model.layers) + talker.codec_head.weight.numel()
    once += matrices(predictor.small_to_mtp_projection)
    if shape == "tiny-1.7b":
        once += predictor.small_to_mtp_projection.weight.numel()
    once += sum(head.weight.numel() for head in predictor.lm_head)
    attention = predictor.model.layers[0].self_attn
    known = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    looked_up = sum(weight.shape[0] for weight in known) * 3  # a row of the table for each stream
    passes = 15 * matrices(predictor.model.layers) - 14 * (sum(w.numel() for w in known) - looked_up)
    total = 2 * (once + passes)
    assert frame_bytes(config, 3, 0) == total
    t = config.talker
    row = 2 * t.num_layers * t.num_kv_heads * t.head_dim * 2
    assert frame_bytes(config, 3, 100) == total + 300 * row


def test_ratios():
    figures = FrameFigures(
        streams=1, position=200, median_us=1500.0, p95_us=1600.0, decode_us=1700.0,
        parts_us=dict.fromkeys(PARTS, 1.0), bytes=3_000_000_000, gb_s=2000.0, floor_us=1000.0,
        eager_us=60_000.0, graph_us=15_000.0,
    )  # fmt: skip
    assert figures.ratios() == {"over_floor": 1.5, "eager_over_this": 40.0, "graph_over_this": 10.0}


# ---------------------------------------------------------------------------- the whole


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qwen_megakernel", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_everything_on_a_cpu(tiny_base, tmp_path):
    out = tmp_path / "bench.json"
    done = bench(
        "--device", "cpu", "--model", str(tiny_base), "--turns", "1", "--repeats", "20",
        "--streams", "1,2", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found.keys() == {
        "schema", "command", "machine", "weights", "shape", "kernel", "parts", "server",
    }  # fmt: skip
    assert found["machine"]["gpu"] is None
    assert "needs a CUDA GPU" in found["kernel"]["skipped"]
    (part,) = found["parts"]
    assert part["runs"]["backend"] == "torch"
    assert part["streams"].keys() == {"1", "2"}
    assert all(ms > 0 for times in part["streams"].values() for ms in times.values())
    assert part["prefill_ms"]["32"] > 0
    (server,) = found["server"]
    assert server["backend"] == "torch"
    assert server["ready_s"] > 0.5
    assert server["at_once"].keys() == {"2"}
    for turns, count in ((server["sentence"], 1), (server["mixed"], 1), (server["at_once"]["2"], 2)):
        assert turns["ttfc_ms"]["count"] == turns["rtf"]["count"] == count
        assert 0 < turns["ttfc_ms"]["p50"] < turns["ttfb_ms"]["p50"] <= turns["ttfa_ms"]["p50"]
        assert 0 < turns["ttfc_ms"]["p50"] <= turns["ttfc_ms"]["p95"] <= turns["ttfc_ms"]["p99"]
        assert turns["rtf"]["p50"] > 0
        assert set(turns["finish_reasons"]) <= {"cancelled", "stop", "length"}
        assert (turns["cancel_ms"] is None) == ("cancelled" not in turns["finish_reasons"])
    assert server["dialects"].keys() == set(TALKERS)
    assert all(times["count"] == 1 and times["p50"] > 0 for times in server["dialects"].values())
    assert "| torch, Cartesia | 1 |" in done.stdout
    assert {"ElevenLabs", "vLLM-Omni"} < set(TALKERS)
    assert len(SENTENCE) / 15 - 0.1 < server["sentence"]["audio_s"] < 2 * len(SENTENCE) / 15
    assert done.stdout.rstrip("\n") == bench_tts.tables(found)
    assert found["command"].startswith("python -m qwen_megakernel bench --device cpu --model ")
    assert "| torch, 60 characters | 1 |" in done.stdout
    assert "| torch, 60 characters, 2 at once | 2 |" in done.stdout
    assert "Frame kernel: not measured" in done.stdout
    assert "listening on" in done.stderr


@pytest.mark.slow
def test_what_is_cut_short_leaves_what_it_has_and_no_server(tiny_base, tmp_path):
    out = tmp_path / "bench.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_megakernel", "bench", "--device", "cpu", "--model", str(tiny_base),
         "--turns", "200", "--repeats", "20", "--streams", "1", "--json", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    port = None
    for line in process.stderr:
        if match := re.search(r"listening on \S+ port (\d+)", line):
            port = int(match[1])
        if "ready after" in line:
            break
    process.terminate()
    tables, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    found = json.loads(out.read_text())
    assert len(found["parts"]) == 1
    assert "server" not in found
    assert "| torch | 1 |" in tables
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--streams", "1,33"), "'1,33': expected 1 to 32 streams"),
        (("--positions", "100,x"), "'100,x': expected whole numbers"),
        (("--parts", "kernel,soup"), "'soup': expected some of kernel, parts, server"),
        (("--model", "/no/such/folder"), "/no/such/folder: is not there"),
    ],
)
def test_a_wrong_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["bench", "--device", "cpu", "--model", str(tmp_path), "--parts", "parts"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in told.err
