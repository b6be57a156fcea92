"""`python -m qwen_megakernel bench`: the speed on this machine, as tables and as JSON.

Three parts: the frame kernel beside what bounds it (`bench.frame_kernel`), decode and codec alone
(`bench.parts`), and turns through a real server and socket (`bench.turns`). Two are measured only when
they are named: a server under load (`bench.load`), and one that shares its GPU (`bench.shared`).
Weights are random unless a checkpoint is named: speed does not depend on them. With `--against` it
compares this tree with another version instead (`bench.against`).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwen_megakernel.bench import against as bench_against
from qwen_megakernel.bench import frame_kernel as bench_kernel
from qwen_megakernel.bench import load as bench_load
from qwen_megakernel.bench import load_options, load_report
from qwen_megakernel.bench import parts as bench_parts
from qwen_megakernel.bench import shared as bench_shared
from qwen_megakernel.bench import turns as bench_server
from qwen_megakernel.bench.frame_kernel import MOST_STREAMS, PARTS, POSITIONS, REPEATS, STREAMS
from qwen_megakernel.build_tts import FORMS
from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.config import FRAME_S
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.synth.checkpoint import random_talker, write_checkpoint
from qwen_megakernel.synth.config import SHAPES, shape_config
from qwen_megakernel.tools.machine import usable_cores
from qwen_megakernel.tts_model import choose_device

WHAT = ("kernel", "parts", "server")
"""Measured where `--parts` names none; the others must be named."""
NAMED = ("load", "shared")
SLOW_TURNS = 5
"""Turns of each kind for the torch backend on a GPU, whose frames take ten times the kernel's time."""
ORIGINAL = {"ttfc": "50", "rtf": "0.15-0.25", "step": "55"}
"""The figures of imgarvit/qwen_megakernel for an RTX 5090, by its own definitions: milliseconds from
the request to the first chunk sent; time of generation over audio; milliseconds of one frame through
talker and code predictor."""


def tell(line: str) -> None:
    """Print progress to stderr: stdout is for the tables."""
    print(line, file=sys.stderr, flush=True)


# --- running -----------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that the figures belong to."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": usable_cores(),
        "gpu": None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "sms": gpu.multi_processor_count, "cuda": torch.version.cuda}
    return facts


def run_kernel(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The kernel's part, row by row, or the reason why it does not run here."""
    if device.type != "cuda":
        yield {"skipped": "the frame kernel needs a CUDA GPU"}
        return
    torch.set_grad_enabled(False)
    if args.model is None:
        config = shape_config(args.shape)
        talker = random_talker(config, device)
    else:
        checkpoint = Checkpoint(args.model)
        config = checkpoint.config
        with torch.device("meta"):
            talker = Talker(config.talker, config.predictor)
        checkpoint.load("talker.", talker, dtype=torch.bfloat16, device=device)
    yield from bench_kernel.run(
        config, talker, streams=args.streams, positions=args.positions, repeats=args.repeats,
        form=args.form, report=tell,
    )  # fmt: skip


@contextmanager
def checkpoint_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The named checkpoint, or a random one that exists until the `with` block ends."""
    if args.model is not None:
        yield args.model
        return
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        tell(f"writing a random checkpoint of the {args.shape} shape")
        write_checkpoint(Path(folder), shape=args.shape, mode="base")
        yield Path(folder)


def run_parts(
    args: argparse.Namespace, device: torch.device, folder: Path, backend: str
) -> dict[str, Any]:
    """Decode and codec alone for one backend."""
    tell(f"{backend}: decode and codec")
    frames = max(args.repeats // 10, 5)
    return bench_parts.run(
        Checkpoint(folder), backend, device, streams=args.streams, frames=frames, report=tell
    )


def run_turns(
    args: argparse.Namespace, device: torch.device, folder: Path, backend: str
) -> dict[str, Any]:
    """The server's part for one backend."""
    slow = backend == "torch" and device.type == "cuda"
    turns = min(args.turns, SLOW_TURNS) if slow else args.turns
    tell(f"{backend}: a server, {turns} turns of each kind")
    at_once = [n for n in args.streams if n > 1]
    return bench_server.run(
        folder, backend, device=str(device), turns=turns, at_once=at_once, report=tell
    )


def run_load(
    args: argparse.Namespace, device: torch.device, folder: Path, backend: str
) -> Iterator[dict[str, Any]]:
    """The server under load for one backend, run by run."""
    plan = load_options.plan_of(args, device.type == "cpu")
    for found in bench_load.run(folder, backend, device=str(device), plan=plan, report=tell):
        if args.plot is not None:
            args.plot.write_text(load_report.plot(found))
        yield found


def run_shared(
    args: argparse.Namespace, device: torch.device, folder: Path, backend: str
) -> Iterator[dict[str, Any]]:
    """The server beside another program on its GPU, row by row."""
    plan = bench_shared.plan_of(args)
    return bench_shared.run(folder, backend, device=str(device), plan=plan, report=tell)


def run_against(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The comparison with another version, row by row."""
    if args.model is not None:
        raise ValueError("--against compares random weights: leave out --model")
    on_cpu = device.type == "cpu"
    plan = bench_against.Plan(
        device="cpu" if on_cpu else f"cuda:{device.index or 0}",
        parts=bench_against.PARTS if args.only is None else (args.only,),
        code_shapes=args.against_shapes or (("tiny",) if on_cpu else ("tiny", "0.6b", "1.7b")),
        shape=args.shape,
        streams=args.streams or (1, 8),
        positions=args.positions or (200,),
        instances=args.instances,
        repeats=args.repeats,
        max_ratio=args.max_ratio,
        max_bound=args.max_bound,
    )
    yield from bench_against.run(args.against, plan, tell)


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure. Yields the bench's whole JSON each time that it has grown."""
    found: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m qwen_megakernel {shlex.join(sys.argv[1:])}",
        "machine": machine(device),
        "weights": "random" if args.model is None else str(args.model),
        "shape": args.shape if args.model is None else None,
    }
    if args.against is not None:
        for found["against"] in run_against(args, device):
            yield found
        return
    args.streams, args.positions = args.streams or STREAMS, args.positions or POSITIONS
    if "kernel" in args.parts:
        for found["kernel"] in run_kernel(args, device):
            yield found
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not {"parts", "server", *NAMED} & set(args.parts):
        return
    with checkpoint_folder(args) as folder:
        if "parts" in args.parts:
            found["parts"] = []
            for name in args.backends:
                found["parts"].append(run_parts(args, device, folder, name))
                yield found
        if "server" in args.parts:
            found["server"] = []
            for name in args.backends:
                found["server"].append(run_turns(args, device, folder, name))
                yield found
        if "load" in args.parts:
            for found["load"] in run_load(args, device, folder, args.backends[0]):
                yield found
        if "shared" in args.parts:
            for found["shared"] in run_shared(args, device, folder, args.backends[0]):
                yield found


# --- showing -----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 0) -> str:
    """A figure, or a dash if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def kernel_table(kernel: dict[str, Any]) -> str:
    """Times of a frame, by streams and positions."""
    if "skipped" in kernel:
        return f"Frame kernel: not measured, {kernel['skipped']}."
    header = ["streams", "position", "frame, us (p95)", *PARTS, "GB/s", "over read",
              "`decode()`, us", "PyTorch graph, us", "PyTorch eager, us"]  # fmt: skip
    rows = [
        [
            str(f["streams"]),
            str(f["position"]),
            f"{number(f['median_us'])} ({number(f['p95_us'])})",
            *(number(f["parts_us"][part]) for part in PARTS),
            number(f["gb_s"]),
            number(f["over_floor"], 2),
            number(f["decode_us"]),
            number(f["graph_us"]),
            number(f["eager_us"]),
        ]
        for f in kernel["frames"]
    ]
    return table(header, rows)


def parts_table(parts: Sequence[dict[str, Any]]) -> str:
    """Times of decode and codec by backend and streams, and of prefill by rows."""
    rows = [
        [part["backend"], streams, number(ms["decode_ms"], 2), number(ms["codec_ms"], 2),
         " / ".join(number(ms, 2) for ms in part["prefill_ms"].values())]
        for part in parts
        for streams, ms in part["streams"].items()
    ]  # fmt: skip
    prefill = " / ".join(map(str, bench_parts.PREFILL_ROWS))
    return table(
        ["backend", "streams", "decode, ms", "codec, ms", f"prefill of {prefill} rows, ms"], rows
    )


def spread(values: dict[str, float] | None, digits: int = 1) -> str:
    """p50 / p95 / p99."""
    return (
        "-" if values is None else " / ".join(number(values[p], digits) for p in ("p50", "p95", "p99"))
    )


def server_table(servers: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> str:
    """Turns by backend, then the three figures of `ORIGINAL` by their own definitions."""
    steps = {part["backend"]: next(iter(part["streams"].values()))["decode_ms"] for part in parts}
    characters = f"{len(bench_server.SENTENCE)} characters"
    rows = []
    for server in servers:
        kinds = {characters: server["sentence"], "mixed": server["mixed"]}
        kinds |= {f"{characters}, {n} at once": turns for n, turns in server["at_once"].items()}
        rows += [
            [
                f"{server['backend']}, {kind}",
                str(turns["ttfc_ms"]["count"]),
                spread(turns["ttfc_ms"]),
                spread(turns["ttfa_ms"]),
                spread(turns["rtf"], 3),
                str(turns["underruns"]),
                number(steps.get(server["backend"]), 2),
                number(server["ready_s"], 1),
            ]
            for kind, turns in kinds.items()
        ]
    rows.append(
        ["the original on an RTX 5090, its word", "-", ORIGINAL["ttfc"], "-", ORIGINAL["rtf"], "-",
         ORIGINAL["step"], "-"]
    )  # fmt: skip
    header = ["", "turns", "TTFC, ms", "TTFA, ms", "RTF", "underruns", "step, ms", "start to ready, s"]
    return table(header, rows)


def load_table(load: dict[str, Any]) -> str:
    """The runs of the load part, and notes on them."""
    return "\n\n".join([table(load_report.HEADER, load_report.rows(load)), *load_report.notes(load)])


def shared_table(shared: dict[str, Any]) -> str:
    """Rows of the shared part, or why there are none."""
    if "skipped" in shared:
        return f"Shared GPU: not measured, {shared['skipped']}."
    rows = bench_shared.rows(shared)
    return "\n\n".join([table(bench_shared.HEADER, rows), *bench_shared.notes(shared)])


def dialects_table(servers: Sequence[dict[str, Any]]) -> str:
    """Time to first audio by backend and dialect, and what each dialect adds to the native one's."""
    rows = [
        [
            f"{server['backend']}, {name}",
            str(times["count"]),
            spread(times),
            number(times["p50"] - server["dialects"]["native"]["p50"], 1),
        ]
        for server in servers
        for name, times in server["dialects"].items()
    ]
    return table(["dialect", "turns", "text to first audio, ms", "over native (p50)"], rows)


def against_table(against: dict[str, Any]) -> str:
    """A line each for codes and speech, then the figures."""
    lines = [
        f"- codes of shape {codes['shape']}: {codes['difference'] or 'equal'}"
        for codes in against.get("codes", [])
    ]
    if speech := against.get("speech"):
        same = len({*speech.values()}) == 1
        lines.append(f"- samples of a turn: {'equal' if same else 'they differ between processes'}")
        if not same:
            lines += [f"  - {name}: {digest[:16]}" for name, digest in speech.items()]
    rows = [
        [f["name"], number(f["a_us"], 1), number(f["b_us"], 1), number(f["ratio"], 4),
         number(f["bound"], 4), "yes" if f["passed"] else "**no**"]
        for f in against.get("figures", [])
    ]  # fmt: skip
    bound = f"{100 * bench_against.CONFIDENCE:.0f} % bound"
    header = ["", "A, us", "B, us", "B / A", bound, "within the limits"]
    title = f"A is {against['against']}, B is this tree."
    return "\n\n".join(filter(None, (title, "\n".join(lines), table(header, rows) if rows else "")))


def tables(found: dict[str, Any]) -> str:
    """All parts that were measured, as Markdown."""
    facts = found["machine"]
    where = facts["gpu"] or f"{facts['cores']:g} CPU cores"
    weights = f"random weights, shape {found['shape']}" if found["shape"] else found["weights"]
    blocks = [
        f"{where}, torch {facts['torch']}, {weights}; a frame is {1000 * FRAME_S:.0f} ms of sound."
    ]
    if "against" in found:
        blocks.append(against_table(found["against"]))
    if "kernel" in found:
        blocks.append(kernel_table(found["kernel"]))
    if found.get("parts"):
        blocks.append(parts_table(found["parts"]))
    if found.get("server"):
        blocks.append(server_table(found["server"], found.get("parts", [])))
        blocks.append(dialects_table(found["server"]))
    if found.get("load"):
        blocks.append(load_table(found["load"]))
    if found.get("shared"):
        blocks.append(shared_table(found["shared"]))
    return "\n\n".join(blocks)


# --- command line ------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if not values or len(values) != len(text.split(",")) or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers from 1 up, such as 1,8")
    return values


def _streams(text: str) -> tuple[int, ...]:
    values = _numbers(text)
    if max(values) > MOST_STREAMS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {MOST_STREAMS} streams")
    return values


def _count(text: str) -> int:
    return _numbers(text)[0]


def _instances(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least 2")
    return _count(text)


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: is not there")
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel bench`."""
    parser.add_argument("--model", type=_existing, metavar="DIR", help="a checkpoint; default: random")
    parser.add_argument(
        "--shape", choices=SHAPES, help="of random weights; default: 0.6b, tiny on a CPU"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--parts",
        type=load_options.names(*WHAT, *NAMED),
        default=WHAT,
        metavar="LIST",
        help=f"of {','.join((*WHAT, *NAMED))}; default: {','.join(WHAT)}",
    )
    parser.add_argument(
        "--backends",
        type=load_options.names("auto", "torch", "megakernel"),
        metavar="LIST",
        help="for parts and server; default: auto,torch, on a CPU torch",
    )
    parser.add_argument(
        "--streams", type=_streams, metavar="LIST", help="default: 1,2,4,8, with --against 1,8"
    )
    parser.add_argument(
        "--positions",
        type=_numbers,
        metavar="LIST",
        help="default: 100,500,1000,2000, with --against 200",
    )
    parser.add_argument(
        "--form", choices=FORMS, default="auto", help="of the frame kernel; small is what an RTX 50 runs"
    )
    parser.add_argument(
        "--repeats", type=_count, default=REPEATS, metavar="N", help=f"timed frames, default {REPEATS}"
    )
    parser.add_argument(
        "--turns", type=_count, default=200, metavar="N", help="of each kind, default 200"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    load_options.add_arguments(parser)
    bench_shared.add_arguments(parser)
    against = parser.add_argument_group(
        "comparison", "Exit status 1 if codes differ or a figure is beyond a limit."
    )
    against.add_argument(
        "--against", metavar="REV_OR_DIR",
        help="compare this tree (B) with another version (A): a git revision, or a folder with a "
        "checkout; codes bit for bit, then frame time and TTFC at --shape",
    )  # fmt: skip
    against.add_argument(
        "--only", choices=bench_against.PARTS, help="compare only the codes, or only the speed"
    )
    against.add_argument(
        "--against-shapes", type=load_options.names(*SHAPES), metavar="LIST",
        help="shapes whose codes are compared; default: tiny,0.6b,1.7b, on a CPU tiny",
    )  # fmt: skip
    against.add_argument(
        "--instances", type=_instances, default=6, metavar="N",
        help="processes of each version that are timed, default 6; with 2 the bound is too narrow",
    )  # fmt: skip
    against.add_argument(
        "--max-ratio", type=float, default=1.01, metavar="X",
        help="largest allowed median of B over that of A, default 1.01",
    )  # fmt: skip
    against.add_argument(
        "--max-bound", type=float, default=1.02, metavar="X",
        help="largest allowed upper 95 %% confidence bound of that ratio, default 1.02",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status. An interrupted run prints what it has measured."""
    # By default SIGTERM would end this process without cleaning up, and leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found: dict[str, Any] | None = None
    try:
        device = choose_device(args.device)
        on_cpu = device.type == "cpu"
        args.shape = args.shape or ("tiny" if on_cpu else "0.6b")
        args.backends = args.backends or (("torch",) if on_cpu else ("auto", "torch"))
        for found in measure(args, device):
            if args.json is not None:
                args.json.write_text(json.dumps(found, indent=2) + "\n")
    except (RuntimeError, ValueError, OSError) as error:  # a user can cause only these
        tell(f"error: {' '.join(str(error).split())}")
        return 1
    finally:
        if found is not None:
            print(tables(found))
    return 0 if bench_against.passed((found or {}).get("against", {})) else 1
