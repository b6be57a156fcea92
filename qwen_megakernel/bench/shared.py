"""The bench's shared part: voices of a server beside another program on the same GPU.

The voices speak turn after turn in real time, as in the load part. The other program
(`bench.neighbour`) computes without a pause. What it loses is its steps a second beside the voices over
those beside a server that is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_megakernel.bench.load import LoadBench, LoadPlan, loaded_server
from qwen_megakernel.bench.load_options import names
from qwen_megakernel.bench.load_options import plan_of as load_plan_of
from qwen_megakernel.bench.load_report import spread_cell
from qwen_megakernel.bench.mps import WITHOUT_MPS, MpsError, running_mps
from qwen_megakernel.bench.neighbour import KINDS

ALONE = "nothing"
BESIDE = (ALONE, *KINDS)
"""Programs that may run beside the voices."""
SHARING: Mapping[str, Callable[[], AbstractContextManager[Mapping[str, str]]]] = {
    "slicing": lambda: nullcontext(WITHOUT_MPS),
    "mps": running_mps,
}
"""How the GPU is shared; each gives the variables of the programs."""
NAMES = {"slicing": "time slicing", "mps": "MPS"}
VOICES = 8
ALONE_S = 3.0
"""Seconds for which the other program's steps are counted without voices."""
_START_S = 180.0
_TAIL_S = 2.0
"""The most seconds between the end of the voices and the end of their run."""
HEADER = (
    "beside", "sharing", "turns", "TTFB p50 / p95 / p99 / max, ms", "TTFA p50 / p95 / p99 / max, ms",
    "underruns (s)", "the other, steps a second: alone", "beside", "its loss",
)  # fmt: skip

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What is measured."""

    load: LoadPlan
    """The load of each row. If its `voices` is None, `VOICES` apply."""
    beside: tuple[str, ...] = BESIDE
    sharing: tuple[str, ...] = tuple(SHARING)
    neighbour_environ: Mapping[str, str] = field(default_factory=dict)
    """Variables of the other program."""


class Neighbour:
    """The other program, and how far it has come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._ticks: list[tuple[float, int]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            tick = json.loads(line)
            self._ticks.append((tick["at"], tick["steps"]))

    def wait_until_running(self, limit_s: float = _START_S) -> None:
        """Wait until it has printed its number of steps twice. Raises `RuntimeError` if it does not."""
        deadline = time.monotonic() + limit_s
        while len(self._ticks) < 2:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                said = (self._process.stderr.read() if self._process.stderr else "")[-500:]
                raise RuntimeError(f"the other program did not run: {' '.join(said.split())}")
            time.sleep(0.05)

    def steps_per_s(self, start: float, end: float) -> float:
        """Its steps a second between two times of `time.monotonic()`. Raises `RuntimeError` if it
        printed nothing then."""
        return step_rate(list(self._ticks), start, end)


def step_rate(ticks: Sequence[tuple[float, int]], start: float, end: float) -> float:
    """Steps a second between two times, from (time, number of steps) in order.

    Raises:
        RuntimeError: nothing is known of that time.
    """
    known = [at for at, _ in ticks if start <= at <= end]
    if len(known) < 2:
        raise RuntimeError(f"the other program made no steps for {end - start:.1f} s")
    times, steps = np.array(ticks, dtype=float).T
    first, last = np.interp([known[0], known[-1]], times, steps)
    return float((last - first) / (known[-1] - known[0]))


@contextmanager
def running_neighbour(
    kind: str, device: str, environ: Mapping[str, str], *arguments: str
) -> Iterator[Neighbour]:
    """Run the other program. Raises `RuntimeError` if it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_megakernel.bench.neighbour", kind, device, *arguments],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        neighbour = Neighbour(process)
        neighbour.wait_until_running()
        yield neighbour
    finally:
        process.kill()
        process.wait()


def run(
    checkpoint: Path, backend: str, *, device: str, plan: SharedPlan, report: Report
) -> Iterator[dict[str, Any]]:
    """Measure; the shared part of the bench's JSON, again after each row.

    Args:
        checkpoint: of a model that clones, or with a folder `voices`.
        backend, device: as `serve` takes them.
        plan: what is measured.
        report: told what is being done.

    Raises:
        DemoError: the server did not start or stop; RuntimeError: another process failed.
    """
    if not device.startswith("cuda"):
        yield {"skipped": "programs share a GPU, and there is none"}
        return
    load = replace(plan.load, voices=plan.load.voices or (VOICES,))
    found: dict[str, Any] = {
        "backend": backend, "seconds": load.seconds, "rows": [],
        "neighbour_environ": dict(plan.neighbour_environ), "server_options": list(load.server_options),
    }  # fmt: skip
    for sharing in plan.sharing:
        try:
            with (
                SHARING[sharing]() as environ,
                loaded_server(checkpoint, backend, device, load, report, environ) as url,
            ):
                for kind in plan.beside:
                    report(f"{NAMES[sharing]}: {load.voices} voices beside {kind}")
                    others = {**environ, **plan.neighbour_environ}
                    for row in _rows_beside(kind, url, load, device, others, report):
                        found["rows"].append({"beside": kind, "sharing": sharing, **row})
                        yield found
        except MpsError as error:
            found["rows"].append({"sharing": sharing, "skipped": str(error)})
            yield found


def _rows_beside(
    kind: str, url: str, load: LoadPlan, device: str, environ: Mapping[str, str], report: Report
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of voices."""
    if kind == ALONE:
        yield from ({"run": run} for run, _ in _runs(url, load, report))
        return
    with running_neighbour(kind, device, environ) as neighbour:
        start = time.monotonic()
        time.sleep(ALONE_S)
        alone = neighbour.steps_per_s(start, time.monotonic())
        for run, end in _runs(url, load, report):
            beside = neighbour.steps_per_s(end - load.seconds, end)
            yield {"run": run, "steps_alone": alone, "steps_beside": beside}


def _runs(url: str, load: LoadPlan, report: Report) -> Iterator[tuple[dict[str, Any], float]]:
    """Closed loops, and a time by which their voices still spoke."""
    for voices in load.voices or ():
        for found in LoadBench(url, replace(load, voices=(voices,)), report).run():
            yield found["closed"][-1], time.monotonic() - _TAIL_S


def rows(shared: dict[str, Any]) -> list[list[str]]:
    """The cells of the table."""
    return [_cells(row) for row in shared["rows"] if "run" in row]


def notes(shared: dict[str, Any]) -> list[str]:
    """Notes that a reader of the table needs."""
    said = [f"Each row takes {shared['seconds']:g} s after a ramp."]
    if shared["neighbour_environ"]:
        said.append(f"The other program had {shared['neighbour_environ']}.")
    if shared["server_options"]:
        said.append(f"The server had {' '.join(shared['server_options'])}.")
    skipped = [row for row in shared["rows"] if "skipped" in row]
    return said + [f"Not measured: {NAMES[row['sharing']]}, {row['skipped']}." for row in skipped]


def _cells(row: dict[str, Any]) -> list[str]:
    run, alone, beside = row["run"], row.get("steps_alone"), row.get("steps_beside")
    return [
        f"{run['voices']} voices beside {row['beside']}",
        NAMES[row["sharing"]],
        str(run["turns"]),
        spread_cell(run["ttfb_ms"]),
        spread_cell(run["ttfa_ms"]),
        f"{run['underruns']['events']} ({run['underruns']['seconds']:.2f})",
        "-" if alone is None else f"{alone:.1f}",
        "-" if beside is None else f"{beside:.1f}",
        "-" if alone is None or beside is None else f"{100 * (1 - beside / alone):.1f} %",
    ]


# --- command line ------------------------------------------------------------------------------


def _variables(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in shlex.split(text)]
    if not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE ...")
    return {name: value for name, _, value in pairs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only `--parts shared` reads."""
    shared = parser.add_argument_group(
        "shared", f"For --parts shared, with --voices (default: {VOICES}), --seconds, --processes and "
        "--server-options of load.",
    )  # fmt: skip
    shared.add_argument(
        "--beside", type=names(*BESIDE), default=BESIDE, metavar="LIST",
        help=f"what computes on the same GPU, of {','.join(BESIDE)}; default: each",
    )  # fmt: skip
    shared.add_argument(
        "--sharing", type=names(*SHARING), default=tuple(SHARING), metavar="LIST",
        help=f"how they share it, of {','.join(SHARING)}; default: each",
    )  # fmt: skip
    shared.add_argument(
        "--neighbour-environ", type=_variables, default={}, metavar="TEXT",
        help="variables of the other program, such as 'CUDA_MPS_CLIENT_PRIORITY=1'",
    )  # fmt: skip


def plan_of(args: argparse.Namespace) -> SharedPlan:
    """The plan that a command line describes."""
    return SharedPlan(load_plan_of(args, False), args.beside, args.sharing, args.neighbour_environ)
