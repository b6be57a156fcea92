"""Another program on the device, which computes without a pause: `bench.shared` runs it beside a server.

    python -m qwen_megakernel.bench.neighbour decode cuda:0

`decode` reads 8.6 GB of weights a step for one row, as a language model of that size that writes.
`prompt` multiplies 8,192 rows by 18 of such matrices, as one that reads long prompts. The program prints
its number of steps every 0.2 s with the time, as JSON, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WIDTH = 8192
PERIOD_S = 0.2


@dataclass(frozen=True, slots=True)
class Work:
    """A chain of products of a step."""

    rows: int
    matrices: int
    """Number of square bf16 matrices."""


KINDS = {"decode": Work(rows=1, matrices=64), "prompt": Work(rows=8192, matrices=18)}


def make_step(work: Work, width: int, device: torch.device) -> Callable[[], None]:
    """A step that returns when the device is done with it.

    Args:
        work: rows and products.
        width: of the matrices.
        device: on a GPU a step is one CUDA graph.
    """
    shape = (work.matrices, width, width)
    weights = torch.randn(shape, device=device, dtype=torch.bfloat16).div_(width**0.5)
    first = torch.randn(work.rows, width, device=device, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        rows = first
        for matrix in weights:
            rows = torch.nn.functional.linear(rows, matrix)
        return rows

    def run() -> None:
        chain()

    if device.type != "cuda":
        return run
    run()  # what is made at the first use may not be made in a capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = chain()

    def step() -> None:
        graph.replay()
        torch.cuda.synchronize(kept.device)

    return step


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Run steps until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of the matrices, default {WIDTH}")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    step, steps, due_at = make_step(KINDS[args.kind], args.width, args.device), 0, 0.0
    while True:
        step()
        steps += 1
        now = time.monotonic()
        if now >= due_at:
            due_at = now + PERIOD_S
            print(json.dumps({"at": now, "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
