"""The bench's load part: how many voices a server holds, and how it copes with more.

    closed loop    N voices speak turn after turn, in real time
    open loop      turns begin as a Poisson process, whatever happens to the earlier ones

Several client processes (`bench.load_client`) listen as a player does. Doubling and bisection find the
largest number of voices without an underrun.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from qwen_megakernel.bench.bad_network import Network
from qwen_megakernel.bench.load_client import Findings, Job, LoadTurn
from qwen_megakernel.bench.turns import write_voice
from qwen_megakernel.tools.demo import running_server
from qwen_megakernel.tools.machine import usable_cores

CLIENT = ("-m", "qwen_megakernel.bench.load_client")
RAMP_S = 6.0
"""Voices begin within this time. It is about the length of a turn, so they are evenly out of step."""
MAX_CLIENT_LAG_MS = 5.0
MAX_CLIENT_SHARE = 0.8
"""Above this lag or this share of a core, the client processes are the bottleneck, and the figures are
theirs."""
TURN_S = 6.0
"""Seconds of audio of a mean turn, of 90 characters."""
_EXTRA_S = 60.0
"""Time for a client process to begin and to end, beyond the run."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is measured."""

    voices: tuple[int, ...] | None = None
    """Voices of the closed loops. None looks for the largest number without an underrun."""
    rates: tuple[float, ...] = ()
    """Turns a second of the open loops."""
    shares: tuple[float, ...] = ()
    """Rates of further open loops, as shares of the audio a second in the largest closed loop without an
    underrun."""
    most_voices: int = 512
    """The search stops at this number."""
    seconds: float = 20.0
    """Length of a run after its ramp."""
    processes: int = 1
    network: Network | None = None
    jitter_buffer_s: float = 0.0
    url: str | None = None
    """URL of a running server. None starts one."""
    server_options: tuple[str, ...] = ()


def default_processes() -> int:
    """Half of the cores. The server needs the others."""
    return max(1, min(8, int(usable_cores()) // 2))


# --- one run -----------------------------------------------------------------------------------


class ServerMeter:
    """What a server and its GPU use during a run."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._metrics = parts._replace(scheme="http", path="/metrics").geturl()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._gpu: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch_gpu, daemon=True)
        self._before, self._since = self._read(), time.monotonic()
        self._thread.start()

    def figures(self) -> dict[str, float | None]:
        """Shares of a core that the process and the engine's thread use, share of the GPU, memory in
        MB."""
        self._stop.set()
        self._thread.join()
        now, wall_s = self._read(), time.monotonic() - self._since

        def share(name: str) -> float | None:
            return (now[name] - self._before[name]) / wall_s if name in now else None

        gpu = np.mean(self._gpu, axis=0).tolist() if self._gpu else [None, None]
        rss = now.get("process_resident_memory_bytes")
        return {
            "process_cores": share("process_cpu_seconds_total"),
            "engine_cores": share("qwen_megakernel_engine_cpu_seconds"),
            "gpu_share": None if gpu[0] is None else gpu[0] / 100,
            "gpu_memory_mb": gpu[1],
            "resident_mb": None if rss is None else rss / 1e6,
        }

    def _read(self) -> dict[str, float]:
        with self._opener.open(self._metrics, timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def _watch_gpu(self) -> None:
        query = (
            "nvidia-smi",
            "--query-gpu=utilization.gpu,memory.used",
            "--format=csv,noheader,nounits",
        )
        while not self._stop.wait(1.0):
            try:
                told = subprocess.run(
                    query, capture_output=True, text=True, timeout=5, check=True
                ).stdout
                used, memory = (float(part) for part in told.splitlines()[0].split(","))
            except (OSError, subprocess.SubprocessError, ValueError, IndexError):
                return  # this machine has no NVIDIA GPU
            self._gpu.append((used, memory))


def run_clients(jobs: Sequence[Job], seconds: float) -> list[Findings]:
    """Run a process for each job. They begin to speak together.

    Raises:
        RuntimeError: a process failed, or was not done in time.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_client_process(job)) for job in jobs]
        for process in processes:
            _line_of(process)  # the process prints `open`
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        timer = threading.Timer(seconds + _EXTRA_S, _kill_all, [processes])
        timer.daemon = True
        timer.start()
        told = [json.loads(_line_of(process)) for process in processes]
        timer.cancel()
    return [Findings(**{**one, "turns": [LoadTurn(**turn) for turn in one["turns"]]}) for one in told]


@contextmanager
def _client_process(job: Job) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *CLIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()


def _kill_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


def _line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a client process failed: {process.stderr.read()[-500:]}")
    return line


def shared_out(job: Job, processes: int) -> list[Job]:
    """Split the job into `processes` jobs, or fewer if there are fewer voices."""
    count = min(processes, job.voices) if job.voices else processes
    return [
        replace(
            job,
            voices=job.voices // count + (number < job.voices % count),
            rate=job.rate / count,
            seed=job.seed + number,
        )
        for number in range(count)
    ]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 and the largest. None if there are no values."""
    if not values:
        return None
    names = ("p50", "p95", "p99", "max")
    return dict(zip(names, map(float, np.percentile(values, (50, 95, 99, 100))), strict=True))


def summary(findings: Sequence[Findings], seconds: float) -> dict[str, Any]:
    """Combine what the clients of a run found."""
    turns = [turn for one in findings for turn in one.turns]
    spoken = [turn for turn in turns if turn.refusal_ms is None]
    outcomes = sorted({turn.outcome for turn in turns})
    lag_ms, share = (max(getattr(one, name) for one in findings) for name in ("lag_p99_ms", "cpu_share"))
    return {
        "turns": len(spoken),
        "ttfb_ms": spread([turn.ttfb_ms for turn in spoken if turn.ttfb_ms is not None]),
        "ttfa_ms": spread([turn.ttfa_ms for turn in spoken if turn.ttfa_ms is not None]),
        "audio_per_s": sum(one.audio_s for one in findings) / seconds,
        "underruns": {
            "turns": sum(turn.underruns > 0 for turn in spoken),
            "events": sum(turn.underruns for turn in spoken),
            "seconds": sum(turn.dry_s for turn in spoken),
        },
        "refused": len(turns) - len(spoken),
        "refusal_ms": spread([turn.refusal_ms for turn in turns if turn.refusal_ms is not None]),
        "outcomes": {name: sum(turn.outcome == name for turn in turns) for name in outcomes},
        "failures": sorted({line for one in findings for line in one.failures})[:5],
        "clients": {
            "processes": len(findings),
            "lag_p99_ms": lag_ms,
            "lag_max_ms": max(one.lag_max_ms for one in findings),
            "cpu_share": share,
            "are_the_bottleneck": lag_ms > MAX_CLIENT_LAG_MS or share > MAX_CLIENT_SHARE,
            "stalls": sum(one.num_stalls for one in findings),
        },
    }


def holds(run: dict[str, Any]) -> bool:
    """Whether every turn of a run was spoken without an underrun."""
    return not (run["underruns"]["events"] or run["refused"] or run["failures"])


def find_largest(is_held: Callable[[int], bool], first: int, most: int) -> int:
    """The largest number that is held, to 3 %, by doubling from `first` and bisection. 0 means none."""
    low, high = 0, min(first, most)
    while is_held(high):
        low = high
        if high == most:
            return high
        high = min(2 * high, most)
    while high - low > max(1, round(0.03 * high)):
        middle = (low + high) // 2
        low, high = (middle, high) if is_held(middle) else (low, middle)
    return low


# --- all runs ----------------------------------------------------------------------------------


class LoadBench:
    """Runs of one plan against one server. `found` grows with each."""

    def __init__(self, url: str, plan: LoadPlan, report: Report) -> None:
        self._url, self._plan, self._report = url, plan, report
        self.found: dict[str, Any] = {
            "seconds": plan.seconds,
            "network": plan.network and asdict(plan.network),
            "jitter_buffer_s": plan.jitter_buffer_s,
            "largest": None,
            "closed": [],
            "open": [],
        }

    def run(self) -> Iterator[dict[str, Any]]:
        """Do all runs. Yields the result so far after each."""
        plan = self._plan
        if plan.voices is None:
            first = min(64, plan.most_voices) if plan.most_voices >= 64 else 1
            self.found["largest"] = find_largest(self._is_held, first, plan.most_voices)
            yield self.found
        for voices in plan.voices or ():
            self._is_held(voices)
            yield self.found
        held = [run for run in self.found["closed"] if holds(run)]
        rates = list(plan.rates)
        if held:
            most = max(run["audio_per_s"] for run in held)
            rates += [share * most / TURN_S for share in plan.shares]
        for rate in rates:
            self._open(rate)
            yield self.found

    def _is_held(self, voices: int) -> bool:
        run = {"voices": voices, **self._measure(Job(self._url, 0, RAMP_S, voices=voices))}
        self.found["closed"].append(run)
        self._tell(f"{voices} voices", run)
        return holds(run)

    def _open(self, rate: float) -> None:
        run = {"rate": rate, **self._measure(Job(self._url, 0, 0, rate=rate))}
        self.found["open"].append(run)
        self._tell(f"{rate:.1f} turns a second", run)

    def _measure(self, job: Job) -> dict[str, Any]:
        plan = self._plan
        job = replace(
            job,
            seconds=job.ramp_s + plan.seconds,
            network=plan.network,
            jitter_buffer_s=plan.jitter_buffer_s,
        )
        meter = ServerMeter(self._url)
        findings = run_clients(shared_out(job, plan.processes), job.seconds)
        return {**summary(findings, plan.seconds), "server": meter.figures()}

    def _tell(self, what: str, run: dict[str, Any]) -> None:
        p99 = run["ttfa_ms"] and f"{run['ttfa_ms']['p99']:.1f} ms"
        self._report(
            f"{what}: {run['turns']} turns, TTFA p99 {p99}, {run['audio_per_s']:.1f} s of audio a "
            f"second, {run['underruns']['turns']} turns with an underrun, {run['refused']} refused"
        )


@contextmanager
def loaded_server(
    checkpoint: Path,
    backend: str,
    device: str,
    plan: LoadPlan,
    report: Report,
    environ: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The URL of a server for the plan: the one that it names, or a new one with variables of `environ`.

    If the checkpoint has a folder of voices, these speak. Otherwise a buzz is cloned.
    """
    if plan.url is not None:
        yield plan.url
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        voices = checkpoint / "voices"
        if voices.is_dir():
            speaker: tuple[str | Path, ...] = ("--voices", voices)
        else:
            speaker = ("--speaker-ref", Path(folder) / "voice.wav")
            write_voice(Path(folder) / "voice.wav")
        most = max(plan.voices or (plan.most_voices,))
        ready = threading.Event()
        with running_server(
            "--model", checkpoint, *speaker, "--backend", backend, "--device", device,
            "--log-format", "json", "--max-connections", str(8 * most + 64),
            *plan.server_options,
            show=lambda line: None if ready.is_set() else report(line),
            environ=environ,
        ) as port:  # fmt: skip
            ready.set()
            yield f"ws://127.0.0.1:{port}/"


def run(
    checkpoint: Path, backend: str, *, device: str, plan: LoadPlan, report: Report
) -> Iterator[dict[str, Any]]:
    """Measure a server under load. Yields the load's part of the bench's JSON after each run.

    Args:
        checkpoint: of a model that clones, or with a folder `voices`.
        backend, device: as `serve` takes them.
        plan: what is measured.
        report: told what is being done.

    Raises:
        DemoError: the server did not start or stop.
        RuntimeError: a client process failed.
    """
    report(f"{backend}: a server under load, {plan.processes} client processes")
    with loaded_server(checkpoint, backend, device, plan, report) as url:
        for found in LoadBench(url, plan, report).run():
            yield {"backend": backend, "server_options": shlex.join(plan.server_options), **found}
