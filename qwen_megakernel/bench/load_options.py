"""Arguments of the bench's load part."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from qwen_megakernel.bench.bad_network import Network
from qwen_megakernel.bench.load import LoadPlan, default_processes

_MOST_ON_A_CPU = 8


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 1e6 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0, such as 20,32.5")
    return values


def names(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """A converter of a list with commas, whose words are among those allowed."""

    def convert(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(","))
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(allowed)}")
        return words

    return convert


def _voices(text: str) -> tuple[int, ...] | None:
    if text == "find":
        return None
    values = _numbers(text)
    if any(value % 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: expected find, or whole numbers such as 192,256")
    return tuple(int(value) for value in values)


def _number(text: str) -> float:
    return _numbers(text)[0]


def _count(text: str) -> int:
    return int(_number(text)) or 1


def _network(text: str) -> Network:
    try:
        delay_ms, jitter_ms, loss = (float(part) for part in text.split(","))
    except ValueError:
        delay_ms = jitter_ms = loss = -1.0
    if min(delay_ms, jitter_ms, loss) < 0 or loss > 50:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected delay in ms, jitter in ms and loss in per cent, such as 80,20,2"
        )
    return Network(delay_ms / 1000, jitter_ms / 1000, loss / 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that only `--parts load` reads."""
    load = parser.add_argument_group("load", "For --parts load.")
    load.add_argument(
        "--voices", type=_voices, metavar="LIST",
        help="closed loops of so many voices, each turn after turn in real time; default: find, which "
        "looks for the largest number without an underrun",
    )  # fmt: skip
    load.add_argument(
        "--most-voices", type=_count, metavar="N", help="where find ends; default 512, on a CPU 8"
    )
    load.add_argument(
        "--rates", type=_numbers, default=(), metavar="LIST",
        help="open loops of so many turns a second, which arrive as a Poisson process",
    )  # fmt: skip
    load.add_argument(
        "--shares", type=_numbers, default=(), metavar="LIST",
        help="open loops at per cents of the largest closed loop without an underrun, such as 80,130",
    )  # fmt: skip
    load.add_argument(
        "--seconds", type=_number, default=20.0, metavar="S", help="of each run, default 20"
    )
    load.add_argument(
        "--processes", type=_count, metavar="N", help="of clients; default: half of the cores, at most 8"
    )
    load.add_argument(
        "--network", type=_network, metavar="MS,MS,%",
        help="delay, jitter and loss between clients and server, such as 80,20,2; a lost packet stalls "
        "what is behind it",
    )  # fmt: skip
    load.add_argument(
        "--jitter-buffer-ms", type=float, default=0.0, metavar="MS",
        help="of the clients' players, default 0",
    )  # fmt: skip
    load.add_argument("--url", metavar="URL", help="of a server that runs already; default: start one")
    load.add_argument(
        "--server-options", type=shlex.split, default=(), metavar="TEXT",
        help="for the server that is started, such as '--num-slots 512'",
    )  # fmt: skip
    load.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG of the load there")


def plan_of(args: argparse.Namespace, on_cpu: bool) -> LoadPlan:
    """Make the plan that a command line describes."""
    return LoadPlan(
        voices=args.voices,
        rates=args.rates,
        shares=tuple(share / 100 for share in args.shares),
        most_voices=args.most_voices or (_MOST_ON_A_CPU if on_cpu else 512),
        seconds=args.seconds,
        processes=args.processes or default_processes(),
        network=args.network,
        jitter_buffer_s=args.jitter_buffer_ms / 1000,
        url=args.url,
        server_options=tuple(args.server_options),
    )
