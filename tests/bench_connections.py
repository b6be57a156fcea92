"""Many connections at once: how many are served, and what an idle one costs.

    python tests/bench_connections.py [--model DIR]

First 512 clients connect to a server with the default limits, as fast as they can. Then another server,
whose limit is high enough, holds 1,000 idle connections. Their memory is what its resident memory grows
by.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

from attack_edge import memory_mb
from live_server import LiveServer
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from qwen_megakernel.synth.checkpoint import write_checkpoint

BURST = 512
IDLE = 1000
AHEAD = 64
"""Handshakes of idle connections at a time."""


async def burst(server: LiveServer) -> tuple[Counter[str], float]:
    """Statuses of the handshakes, or their errors, and seconds until the last."""
    held: list[ClientConnection] = []

    async def try_one() -> int:
        try:
            held.append(await connect(server.url, compression=None, open_timeout=30))
        except InvalidStatus as refused:
            return refused.response.status_code
        return 101

    start = time.perf_counter()
    statuses = await asyncio.gather(*(try_one() for _ in range(BURST)), return_exceptions=True)
    elapsed_s = time.perf_counter() - start
    await asyncio.gather(*(one.close() for one in held))
    named = (str(one) if isinstance(one, int) else type(one).__name__ for one in statuses)
    return Counter(named), elapsed_s


async def hold_idle(server: LiveServer) -> tuple[int, float]:
    """How many connections stayed open for 5 s, and the memory of the server in that time."""
    room = asyncio.Semaphore(AHEAD)

    async def open_one() -> ClientConnection:
        async with room:
            return await connect(server.url, compression=None, open_timeout=30)

    held = await asyncio.gather(*(open_one() for _ in range(IDLE)))
    await asyncio.sleep(5)
    used_mb = memory_mb(server)
    num_open = sum(one.state.name == "OPEN" for one in held)
    await asyncio.gather(*(one.close() for one in held))
    return num_open, used_mb


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint; default: tiny, random")
    model = parser.parse_args().model
    if model is None:
        model = Path(tempfile.mkdtemp()) / "checkpoint"
        write_checkpoint(model, shape="tiny", mode="custom_voice")
    server = LiveServer("--model", str(model)).wait_until_ready()
    try:
        statuses, elapsed_s = asyncio.run(burst(server))
        health = server.get("/health")[0]
    finally:
        server.kill()
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"{BURST} connections in {elapsed_s:.1f} s: {counts}; /health afterwards: {health}")
    server = LiveServer("--model", str(model), "--max-connections", str(IDLE + 100)).wait_until_ready()
    try:
        before_mb = memory_mb(server)
        num_open, used_mb = asyncio.run(hold_idle(server))
    finally:
        server.kill()
    print(
        f"{num_open} of {IDLE} idle connections open: {1000 * (used_mb - before_mb) / IDLE:.1f} kB each "
        f"({before_mb:.0f} MB without them)"
    )


if __name__ == "__main__":
    main()
