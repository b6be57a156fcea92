"""What the server prints once it is ready, and where the time of its start went."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_megakernel.serving.access import is_loopback
from qwen_megakernel.serving.observe import log

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

TOKEN_VARIABLE = "QWEN_MEGAKERNEL_TOKEN"


def time_spent(steps: Sequence[tuple[str, float]], now: float) -> str:
    """Where the time went, from what began when; what took less than 0.1 s is left out."""
    ends = [*(start for _, start in steps[1:]), now]
    spent = [(text, end - start) for (text, start), end in zip(steps, ends, strict=True)]
    parts = "; ".join(f"{text} {seconds:.1f} s" for text, seconds in spent if seconds >= 0.1)
    return f"{now - steps[0][1]:.1f} s since the start: {parts}"


def banner(decoder: TTSDecoder, host: str, port: int, has_token: bool) -> str:
    """What to do next, ready to paste."""
    facts = [f"  {name + ':':<9}{value}" for name, value in decoder.description.items()]
    voices = ", ".join(sorted(decoder.voices)) or "none (give one with --speaker-ref or --voices)"
    here = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"[{here}]" if ":" in here else here
    token = f' --token "${TOKEN_VARIABLE}"' if has_token else ""
    tunnel = [f"  tunnel:  ssh -L {port}:127.0.0.1:{port} user@host"] if is_loopback(host) else []
    return "\n".join(
        [
            f"Ready on ws://{address}:{port}",
            *facts,
            f"  voices:  {voices}",
            *tunnel,
            f"  try:     python -m qwen_megakernel say --url ws://{address}:{port}{token} "
            '--text "Hello, I can hear you."',
        ]
    )


def show(text: str) -> None:
    """Print to standard output. Where that cannot be written, the server goes on without it."""
    try:
        print(text, flush=True)
    except OSError as error:
        log.warning("cannot print what is ready: %s", error.strerror)
        # Python writes what is left when it exits: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
