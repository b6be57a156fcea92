"""The bench's load part: its arithmetic, its bad network, and a whole run on a CPU, by counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import deque
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from live_server import ROOT

from qwen_megakernel import bench_tts
from qwen_megakernel.__main__ import main
from qwen_megakernel.bench.bad_network import BadNetwork, Network
from qwen_megakernel.bench.load import find_largest, holds, shared_out, spread, summary
from qwen_megakernel.bench.load_client import Findings, Job, LoadTurn, Run, Voice, read_job
from qwen_megakernel.bench.load_report import plot
from qwen_megakernel.bench.player import Player, make_text
from qwen_megakernel.serving.native_messages import Done, Error, encode

# ---------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("truth", [0, 1, 2, 3, 7, 64, 100, 191, 300, 511, 512])
@pytest.mark.parametrize("first", [1, 64])
def test_the_largest_load_is_found_in_few_runs(truth, first):
    tried = []

    def is_held(voices: int) -> bool:
        tried.append(voices)
        return voices <= truth

    found = find_largest(is_held, first, 512)
    assert found <= truth
    assert truth - found <= max(1, 0.04 * truth)
    assert found == 0 or found in tried
    assert len(tried) == len(set(tried)) <= 15


def test_voices_and_rates_are_shared_out_to_the_last_one():
    jobs = shared_out(Job("ws://a", 1, 1, voices=13), 4)
    assert [job.voices for job in jobs] == [4, 3, 3, 3]
    assert len({job.seed for job in jobs}) == 4
    assert [job.voices for job in shared_out(Job("ws://a", 1, 1, voices=2), 4)] == [1, 1]
    assert [job.rate for job in shared_out(Job("ws://a", 1, 1, rate=6), 4)] == [1.5] * 4


def test_a_job_reaches_its_process_as_it_is():
    job = Job("ws://a", 2.0, 1.0, voices=3, network=Network(0.08, 0.02, 0.02), seed=5)
    assert read_job(json.dumps(asdict(job))) == job


def test_a_player_counts_how_long_it_stands_still():
    player, chunk = Player(buffer_s=0.05), np.full(1920, 3000, np.int16)
    player.add(chunk, now=1.0)  # plays from 1.05 to 1.13
    assert player.audible_at == pytest.approx(1.05)
    player.add(chunk, now=1.12)  # in time only for the buffer's sake, until 1.21
    assert (player.underruns, player.dry_s) == (0, 0.0)
    player.add(chunk, now=1.31)
    assert player.underruns == 1
    assert player.dry_s == pytest.approx(0.10)
    player.stop(now=1.30)  # what has come plays until 1.39
    assert player.underruns == 1
    player.stop(now=1.49)
    assert player.underruns == 2
    assert player.dry_s == pytest.approx(0.20)


def test_texts_have_the_lengths_that_were_asked_for():
    texts = [make_text(random.Random(seed), 40, 140) for seed in range(100)]
    assert min(map(len, texts)) >= 40 - 8
    assert max(map(len, texts)) <= 140


SPOKEN = LoadTurn("cancelled", ttfb_ms=5.0, ttfa_ms=6.0, audio_s=4.0)
DRY = LoadTurn("cancelled", ttfb_ms=9.0, ttfa_ms=None, audio_s=3.0, underruns=2, dry_s=0.5)
REFUSED = LoadTurn("overloaded", refusal_ms=1.5)


def test_what_the_processes_found_is_added_up():
    one = Findings([SPOKEN, DRY], audio_s=7.0, lag_p99_ms=1.0, cpu_share=0.2)
    two = Findings([SPOKEN, REFUSED], audio_s=3.0, lag_p99_ms=6.0, cpu_share=0.1, num_stalls=4)
    run = summary([one, two], seconds=5.0)
    assert run["turns"] == 3
    assert run["audio_per_s"] == 2.0
    assert run["underruns"] == {"turns": 1, "events": 2, "seconds": 0.5}
    assert (run["refused"], run["refusal_ms"]["max"]) == (1, 1.5)
    assert run["outcomes"] == {"cancelled": 3, "overloaded": 1}
    assert (run["ttfb_ms"]["max"], run["ttfa_ms"]["max"]) == (9.0, 6.0)
    assert run["clients"]["are_the_bottleneck"]
    assert run["clients"]["stalls"] == 4
    assert not holds(run)
    quiet = summary([Findings([SPOKEN], lag_p99_ms=1.0)], seconds=5.0)
    assert not quiet["clients"]["are_the_bottleneck"]
    assert holds(quiet)
    assert not holds(summary([Findings([SPOKEN, REFUSED])], seconds=5.0))
    assert not holds(summary([Findings([SPOKEN], failures=["OSError: gone"])], seconds=5.0))


def test_a_spread_has_the_largest_value():
    assert spread([]) is None
    assert spread([float(n) for n in range(101)]) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}


# ---------------------------------------------------------------------------- the bad network


def through_the_network(network: Network, seed: int, num_bytes: int) -> tuple[bytes, int, float]:
    """The echo of so many bytes, the stalls on the way, and the first byte's round trip in seconds."""

    async def echo(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1000):
                writer.write(data)
        writer.close()

    async def scenario():
        clock = asyncio.get_running_loop().time
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        target = server.sockets[0].getsockname()
        async with BadNetwork(*target, network, seed) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            start = clock()
            writer.write(SENT[:1])
            heard = await reader.readexactly(1)
            first_s = clock() - start
            writer.write(SENT[1:num_bytes])
            heard += await reader.readexactly(num_bytes - 1)
            writer.close()
        server.close()
        return heard, proxy.num_stalls, first_s

    return asyncio.run(asyncio.wait_for(scenario(), 60))


SENT = random.Random(0).randbytes(100_000)


def test_bytes_keep_their_order_and_take_their_time():
    heard, stalls, first_s = through_the_network(Network(0.02, 0.01, 0.0), 1, len(SENT))
    assert heard == SENT
    assert stalls == 0
    assert first_s >= 2 * 0.02


def test_lost_packets_stall_the_line():
    heard, stalls, _ = through_the_network(Network(0.0, 0.0, 0.05), 2, 20_000)
    assert heard == SENT[:20_000]
    assert stalls >= 1


# ---------------------------------------------------------------------------- a voice


def test_a_refusal_is_of_its_own_turn():
    """The end of a refused context is refused too. The client may read that in its next turn."""
    done = partial(Done, samples=0, duration_s=0.0, generation_s=0.0, ttfc_ms=None, rtf=None)
    replies = deque(
        [
            Error("turn-1", "overloaded", "a turn would wait", 2.0),
            done("turn-1", "error"),
            Error("turn-1", "unknown_context", "context turn-1 is not open"),
            done("turn-2", "stop"),
        ]
    )

    class Socket:
        async def send(self, message):
            pass

        async def recv(self):
            return encode(replies.popleft())

    async def speak_twice():
        voice = Voice(Socket(), Run(Job("", seconds=1.0, ramp_s=0.0)))
        return [(await voice.speak("Hello.", seed)) for seed in range(2)]

    assert [turn.outcome for turn, _ in asyncio.run(speak_twice())] == ["overloaded", "stop"]


# ---------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_a_server_under_load_on_a_cpu(tmp_path):
    """Both loops over a bad network, with the demonstration voice and two client processes."""
    out, picture = tmp_path / "load.json", tmp_path / "load.svg"
    done = subprocess.run(
        [sys.executable, "-m", "qwen_megakernel", "bench", "--parts", "load", "--device", "cpu",
         "--model", str(ROOT / "demo_voice"), "--voices", "1,2", "--rates", "0.5", "--seconds", "1",
         "--processes", "2", "--network", "10,5,1", "--jitter-buffer-ms", "200", "--json", str(out),
         "--plot", str(picture)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    load = json.loads(out.read_text())["load"]
    assert [run["voices"] for run in load["closed"]] == [1, 2]
    assert load["largest"] is None
    assert load["jitter_buffer_s"] == 0.2
    for run, processes in zip([*load["closed"], *load["open"]], (1, 2, 2), strict=True):
        assert run["clients"]["processes"] == processes
        assert run["failures"] == []
        assert run["refused"] == 0
        assert sum(run["outcomes"].values()) == run["turns"]
        assert run["server"]["process_cores"] > 0
        assert run["server"]["engine_cores"] > 0
    assert all(run["turns"] >= run["voices"] for run in load["closed"])
    assert all(run["ttfa_ms"]["p50"] >= 220 for run in load["closed"])  # there, back, and the buffer
    assert done.stdout.rstrip("\n") == bench_tts.tables(json.loads(out.read_text()))
    assert "| 2 voices |" in done.stdout
    assert "jitter buffer 200 ms" in done.stdout
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


def test_a_load_without_a_turn_has_a_plot():
    assert ET.fromstring(plot({"closed": [], "open": []})).tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--voices", "1.5"), "expected find, or whole numbers"),
        (("--rates", "0"), "expected numbers above 0"),
        (("--network", "80,20"), "expected delay in ms, jitter in ms and loss"),
        (("--network", "80,20,99"), "expected delay in ms, jitter in ms and loss"),
    ],
)
def test_a_wrong_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", "--parts", "load", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
