"""Print how much a text that is typed letter by letter disturbs another stream.

    python tests/bench_text.py [--chars 4000] [--repeats 3] [--json FILE]

A client listens to the demonstration voice while another one types, one message for each character. The
listener's longest gap is the longest time between two of its chunks of one frame. The table compares it
with the gap beside a typist of ordinary words, with as many characters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from websockets.asyncio.client import connect  # noqa: E402

from qwen_megakernel.tools.demo import CHECKPOINT, VOICE, running_server  # noqa: E402

SPOKEN = "Good evening, this is the front desk. How may I help you?"
ORDINARY = "words"
TEXTS = {
    ORDINARY: "the train leaves at nine, ",
    "letters": "a",
    "dots": ".",
    "spaces": " ",
    "combining marks": "\u0301",
    "ZWJ emoji": "👩\u200d",
    "CJK": "中",
}


async def longest_gap(url: str) -> float:
    """The longest gap in one turn of a client, in seconds."""
    request = {"text": SPOKEN, "speaker_ref": VOICE, "seed": 1, "chunk_tokens": 1}
    async with connect(url, max_size=None, compression=None, proxy=None) as socket:
        await socket.send(json.dumps(request))
        await socket.recv()
        last, longest = time.perf_counter(), 0.0
        async for message in socket:
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            if isinstance(message, str):
                break
        return longest


async def type_text(url: str, text: str, started: asyncio.Event) -> None:
    """Type a live turn whose text never ends, until it is cancelled."""
    async with connect(url, max_size=None, compression=None, proxy=None) as socket:
        await socket.send(json.dumps({"text": "A ", "speaker_ref": VOICE, "more": True}))
        started.set()
        for char in text:
            await socket.send(json.dumps({"text": char, "more": True}))
        try:
            async for _ in socket:
                pass
        finally:
            await socket.send(json.dumps({"cancel": True}))


async def gap_beside(url: str, text: str) -> float:
    """The longest gap of a listener beside a typist."""
    started = asyncio.Event()
    typist = asyncio.create_task(type_text(url, text, started))
    await started.wait()
    try:
        return await longest_gap(url)
    finally:
        typist.cancel()
        await asyncio.gather(typist, return_exceptions=True)


async def measure(url: str, num_chars: int, repeats: int) -> dict[str, list[float]]:
    """Longest gaps in seconds, by text; the texts take turns."""
    gaps: dict[str, list[float]] = {name: [] for name in ("alone", *TEXTS)}
    for _ in range(repeats):
        gaps["alone"].append(await longest_gap(url))
        for name, unit in TEXTS.items():
            gaps[name].append(await gap_beside(url, (unit * num_chars)[:num_chars]))
    return gaps


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chars", type=int, default=4000, help="characters that are typed")
    parser.add_argument("--repeats", type=int, default=3, help="times that each text is typed")
    parser.add_argument("--cleaning", choices=("on", "off"), default="on", help="of the server")
    parser.add_argument("--json", type=Path, help="file for all figures, in seconds")
    args = parser.parse_args()
    options = (
        "--model",
        CHECKPOINT,
        "--voices",
        CHECKPOINT / "voices",
        "--text-cleaning",
        args.cleaning,
    )
    with running_server(*options, show=lambda line: None) as port:
        gaps = asyncio.run(measure(f"ws://127.0.0.1:{port}", args.chars, args.repeats))
    ordinary = statistics.median(gaps[ORDINARY])
    print(f"| beside {args.chars} characters of | longest gap, ms (median of {args.repeats}) | ratio |")
    print("|---|---|---|")
    for name, found in gaps.items():
        gap = statistics.median(found)
        print(f"| {name} | {1000 * gap:.0f} | {gap / ordinary:.2f} |")
    if args.json is not None:
        args.json.write_text(json.dumps(gaps, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
