"""`python -m qwen_megakernel COMMAND ...`: the command line.

A command is a line in `COMMANDS` and two functions in the module named there:
`add_arguments(parser)` and `run(args) -> int`, the exit status. Only the chosen command's module
is imported, so that `--help` is instant and a broken dependency breaks only what needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "build": ("tools.build", "compile the CUDA kernels ahead of time"),
    "bench": ("bench_tts", "measure kernel, parts and whole turns on this machine"),
    "demo": ("tools.demo", "speak once through a real server with the demonstration voice"),
    "doctor": ("tools.doctor", "check this machine, and say how to put right what is wrong"),
    "protocol-schema": ("tools.protocol_schema", "print the JSON Schema of the native protocol"),
    "tune": ("bench.tune", "find the frame kernel's fastest setting on this GPU, and keep it"),
    "synth-checkpoint": ("synth.checkpoint", "write a checkpoint of random weights (noise for a voice)"),
}
"""Command -> (module of this package, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for wrong usage, by way of `SystemExit`)."""
    listing = "\n".join(f"  {name:18}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m qwen_megakernel",
        usage="%(prog)s COMMAND ...",
        description="Real-time Qwen3-TTS.",
        epilog=f"commands:\n{listing}\n\nCOMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    module_name, text = COMMANDS[chosen.command]
    module = import_module(f"{__package__}.{module_name}")
    own = argparse.ArgumentParser(
        prog=f"{parser.prog} {chosen.command}",
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(own)
    try:
        return module.run(own.parse_args(chosen.arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
