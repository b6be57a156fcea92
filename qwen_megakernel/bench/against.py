"""The bench's comparison of another version of this package (A) with this tree (B), on one device.

Each version runs in processes of its own (`bench.worker`), which build their own kernels. Codes are
compared bit for bit. Speed is compared over several instances of each version, because the addresses and
clocks of a process move a figure by more than a change does. While something is timed or decoded, no two
processes use the device.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import IO, Any, Self

import numpy as np

from qwen_megakernel.bench.frame_kernel import BenchError
from qwen_megakernel.engine.backends import in_daemon_thread
from qwen_megakernel.synth.checkpoint import write_checkpoint
from qwen_megakernel.synth.config import Shape

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("worker.py")
PARTS = ("codes", "speed")
CODE_FRAMES = 64
ORDER = "ABBA"
"""The order of the measurements of a pair of instances. A drift of the clock meets both alike."""
CONFIDENCE = 0.95
RESAMPLES = 4000

GIT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 300.0
BUILD_TIMEOUT_S = 900.0
REQUEST_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 10.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and the limits within which it passes."""

    device: str
    """`cpu` or `cuda:N`."""
    parts: Sequence[str]
    """Those of `PARTS` that are compared."""
    code_shapes: Sequence[str]
    """Shapes whose codes are compared."""
    shape: Shape
    """The shape that is timed."""
    streams: Sequence[int]
    positions: Sequence[int]
    instances: int
    """Processes of each version that are timed, at least 2."""
    repeats: int
    """Frames of a measurement. For every ten frames one turn is timed."""
    max_ratio: float
    """Largest allowed time of B over A."""
    max_bound: float
    """Largest allowed upper confidence bound of that ratio."""


# --- the two trees -----------------------------------------------------------------------------


def baseline_tree(against: str, folder: Path, root: Path = ROOT) -> Path:
    """Find the root of version A.

    Args:
        against: a folder that holds a checkout, or a git revision of `root`.
        folder: where a revision is extracted.
        root: the working tree.

    Raises:
        BenchError: `against` is neither.
    """
    named = Path(against)
    if (named / "qwen_megakernel").is_dir():
        return named.resolve()
    command = ["git", "-C", str(root), "archive", "--format=tar", against, "--"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(
            f"{against}: no folder with a checkout, and git does not run: {error}"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise BenchError(f"{against}: no folder with a checkout, and git says: {said}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


# --- processes ---------------------------------------------------------------------------------


class WorkerProcess:
    """A process that drives one version. It ends with the context."""

    def __init__(self, name: str, tree: Path, device: str, logs: Path) -> None:
        """Start the process.

        Args:
            name: for messages.
            tree: the version's root.
            device: `cpu` or `cuda:N`.
            logs: folder for the output of the process.
        """
        self.name = name
        self._log = logs / f"{name.replace(' ', '-')}.log"
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT), str(tree), device],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that its compilers can be ended with it
            )

    def ask(self, do: str, timeout_s: float = REQUEST_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the reply.

        Args:
            do: a public method of `worker.Worker`.
            timeout_s: the process is killed after this time.
            arguments: of the method.

        Raises:
            BenchError: the process died or took too long. The message is one line with the last line
                that the process printed.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill()

        stdin, stdout = self._pipes()
        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
            reply = stdout.readline()
        except (BrokenPipeError, ValueError):  # ValueError: another thread has closed the pipe
            reply = ""
        finally:
            timer.cancel()
        if reply.endswith("\n"):
            return json.loads(reply)
        self._kill()
        why = f"no reply in {timeout_s:.0f} s" if expired.is_set() else "the process ended"
        raise BenchError(f"{self.name}: {do}: {why}: {self._last_line()}")

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:400] if lines else f"exit status {self._process.returncode}"

    def _kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._kill()
        self.close()

    def close(self) -> None:
        """Let the process end by itself, and kill it if it does not."""
        stdin, stdout = self._pipes()
        with suppress(BrokenPipeError):
            stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
        stdout.close()


# --- figures -----------------------------------------------------------------------------------


def resampled_medians(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Medians of bootstrap samples. A sample draws instances, then measurements of each.

    Args:
        values: [instances, measurements].
        resamples: number of samples.
        seed: of the draws.

    Returns:
        [resamples], the median over instances of the medians over their measurements.
    """
    instances, measurements = values.shape
    rng = np.random.default_rng(seed)
    drawn = rng.integers(instances, size=(resamples, instances, 1))
    within = rng.integers(measurements, size=(resamples, instances, measurements))
    return np.median(np.median(values[drawn, within], axis=2), axis=1)


def ratio_bound(a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES) -> float:
    """Upper confidence bound (`CONFIDENCE`, one-sided) of the median of B over that of A.

    It is a bootstrap percentile. With few instances n the bootstrap spreads too little, by a factor of
    sqrt((n - 1) / n), so the percentile lies further out by this factor. From three instances on, the
    bound holds as often as it claims. With two it holds in five of six cases: in the sixth both of B's
    happen to be faster than both of A's.

    Args:
        a, b: [instances, measurements], at least two instances.
        resamples: bootstrap samples.
    """
    ratios = resampled_medians(b, resamples, seed=1) / resampled_medians(a, resamples, seed=0)
    instances = min(len(a), len(b))
    deviations = NormalDist().inv_cdf(CONFIDENCE) * sqrt(instances / (instances - 1))
    return float(np.quantile(ratios, NormalDist().cdf(deviations)))


def compare_figure(name: str, raw: dict[str, list[list[list[float]]]], plan: Plan) -> dict[str, Any]:
    """Compare one figure, for the JSON.

    Args:
        name: of the figure.
        raw: by version, microseconds of every frame or turn: [instances][measurements][repeats].
        plan: has the limits.
    """
    a, b = (np.median(np.array(raw[version]), axis=2) for version in "AB")
    a_us, b_us = (float(np.median(np.median(values, axis=1))) for values in (a, b))
    ratio, bound = b_us / a_us, ratio_bound(a, b)
    return {
        "name": name,
        "a_us": a_us,
        "b_us": b_us,
        "ratio": ratio,
        "bound": bound,
        "passed": ratio <= plan.max_ratio and bound <= plan.max_bound,
        "raw_us": raw,
    }


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Where the codes of two versions first differ, or None. `a` and `b` are replies to `codes`."""
    for streams, codes in a["codes"].items():
        ours, theirs = np.array(b["codes"][streams]), np.array(codes)
        if (ours != theirs).any():
            frame, stream, codebook = np.argwhere(ours != theirs)[0]
            place = (frame, stream, codebook)
            other = "" if a["weights"] == b["weights"] else "; the random weights differ, too"
            return (
                f"streams {streams}: stream {stream}, frame {frame}, codebook "
                f"{codebook}: A has {theirs[place]}, B has {ours[place]}{other}"
            )
    return None


# --- the part ----------------------------------------------------------------------------------


Pair = dict[str, WorkerProcess]
"""A process of each version, under `A` and `B`."""


def run(against: str, plan: Plan, report: Report, root: Path = ROOT) -> Iterator[dict[str, Any]]:
    """Yield the comparison's JSON, each time there is more of it.

    Args:
        against: version A, see `baseline_tree`.
        plan: what to compare.
        report: told what is being done.
        root: the tree of version B.

    Raises:
        BenchError: there is no version A, or one of the processes failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-against-", ignore_cleanup_errors=True) as name,
        ExitStack() as processes,
    ):
        folder = Path(name)
        trees = {"A": baseline_tree(against, folder / "A", root), "B": root}

        def start(what: str) -> Pair:
            workers = {v: WorkerProcess(f"{v} {what}", trees[v], plan.device, folder) for v in "AB"}
            for worker in workers.values():
                processes.enter_context(worker)
            return workers

        # Every process starts now. It imports while kernels are compiled, and then waits.
        timed = "speed" in plan.parts
        pairs = [start(f"instance {i + 1}") for i in range(plan.instances if timed else 1)]
        _prepare(plan, pairs, folder / "checkpoint", report)
        found: dict[str, Any] = {"against": against, "device": plan.device}
        if "codes" in plan.parts:
            for found["codes"] in _compare_codes(plan, pairs[0], report):
                yield found
        if timed:
            for speed in _compare_speed(plan, pairs, folder / "checkpoint", report):
                yield found | speed


def passed(found: dict[str, Any]) -> bool:
    """Whether everything in a comparison's JSON is equal and within the limits."""
    return (
        all(codes["difference"] is None for codes in found.get("codes", []))
        and len({*found.get("speech", {}).values()}) <= 1
        and all(figure["passed"] for figure in found.get("figures", []))
    )


def _prepare(plan: Plan, pairs: Sequence[Pair], checkpoint: Path, report: Report) -> None:
    """Wait for imports, kernels and the random checkpoint, which are made in parallel."""
    started = time.monotonic()
    shapes = {*plan.code_shapes} if "codes" in plan.parts else set()
    shapes |= {plan.shape} if "speed" in plan.parts else set()

    def build(worker: WorkerProcess) -> None:
        worker.ask("ready", START_TIMEOUT_S)
        if plan.device != "cpu":
            worker.ask("build", BUILD_TIMEOUT_S, shapes=sorted(shapes))

    def write() -> None:
        write_checkpoint(checkpoint, shape=plan.shape, mode="custom_voice")

    first, others = pairs[0].values(), [worker for pair in pairs[1:] for worker in pair.values()]
    report(f"starting {2 * len(pairs)} processes, and building what they need")
    jobs: dict[str, Future[Any]] = {worker.name: in_daemon_thread(build, worker) for worker in first}
    jobs |= {worker.name: in_daemon_thread(worker.ask, "ready", START_TIMEOUT_S) for worker in others}
    if "speed" in plan.parts:
        jobs["the random checkpoint"] = in_daemon_thread(write)
    for name, job in jobs.items():
        job.result()
        report(f"{time.monotonic() - started:.0f} s: {name} is ready")


def _compare_codes(plan: Plan, pair: Pair, report: Report) -> Iterator[list[dict[str, Any]]]:
    """Yield the JSON's `codes`, with one more shape each time."""
    compared = []
    for shape in plan.code_shapes:
        request: dict[str, Any] = {"shape": shape, "streams": plan.streams, "frames": CODE_FRAMES}
        a, b = (pair[version].ask("codes", **request) for version in "AB")
        difference = first_difference(a, b)
        report(f"codes of shape {shape}: {difference or 'equal'}")
        compared.append({"shape": shape, "difference": difference})
        yield compared


def _compare_speed(
    plan: Plan, pairs: Sequence[Pair], checkpoint: Path, report: Report
) -> Iterator[dict[str, Any]]:
    """Yield the JSON's `speech` and `figures`. They come from the second pair of instances on, with one
    more pair each time."""
    sizes: dict[str, Any] = {
        "streams": plan.streams,
        "positions": plan.positions,
        "repeats": plan.repeats,
    }
    request: dict[str, Any] = {
        "shape": plan.shape, "checkpoint": str(checkpoint), "longest": max(plan.positions),
        "repeats": plan.repeats,
    }  # fmt: skip
    speech: dict[str, str] = {}
    raw: dict[str, dict[str, list[list[list[float]]]]] = {}
    for number, pair in enumerate(pairs):
        # Versions take turns at being first in a pair.
        turned = str.maketrans("AB", "BA" if number % 2 else "AB")
        for version in "AB".translate(turned):
            worker = pair[version]
            speech[worker.name] = worker.ask("load", **request)["speech"]
        report(f"instance {number + 1} of {len(pairs)}: loaded, measuring")
        measured: dict[str, list[dict[str, list[float]]]] = {"A": [], "B": []}
        for version in ORDER.translate(turned):
            turns = max(plan.repeats // 10, 2)
            measured[version].append(pair[version].ask("measure", turns=turns, **sizes))
        for version, measurements in measured.items():
            for name in measurements[0]:
                by_version = raw.setdefault(name, {"A": [], "B": []})
                by_version[version].append([measurement[name] for measurement in measurements])
            pair[version].close()
        if number:  # one instance of each does not show their spread
            figures = [compare_figure(name, values, plan) for name, values in raw.items()]
            yield {"speech": speech, "figures": figures}
