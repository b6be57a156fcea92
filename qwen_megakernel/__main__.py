"""`qwen-megakernel COMMAND ...`, or `python -m qwen_megakernel COMMAND ...`: the command line.

A command is a line in `COMMANDS` and two functions in the module that it names:
`add_arguments(parser)` and `run(args) -> int`, the exit status. Only the chosen command's module is
imported. So `--help` is instant, and a broken dependency breaks only the commands that need it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

SCRIPT = "qwen-megakernel"
OWN = {"qwen_megakernel", "pipecat_client"}
COMMANDS = {
    "serve": (".tools.serve", "serve Qwen3-TTS over WebSocket"),
    "say": ("pipecat_client.test_client", "speak a text through a server and measure it"),
    "demo": (".tools.demo", "speak once through a real server with the demonstration voice"),
    "doctor": (".tools.doctor", "check this machine, and say how to put right what is wrong"),
    "build": (".tools.build", "compile the CUDA kernels ahead of time"),
    "bench": (".bench_tts", "measure kernel, parts and whole turns on this machine"),
    "prove": (".prove.command", "measure this machine and checkpoint beside the official package"),
    "tune": (".bench.tune", "find the frame kernel's fastest setting on this GPU, and keep it"),
    "protocol-schema": (".tools.protocol_schema", "print the JSON Schema of the native protocol"),
    "synth-checkpoint": (
        ".synth.checkpoint",
        "write a checkpoint of random weights (noise for a voice)",
    ),
}
"""Command -> (module, with a leading dot if it is in this package; one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status. Wrong usage raises `SystemExit` with 2."""
    listing = "\n".join(f"  {name:18}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=SCRIPT if Path(sys.argv[0]).name == SCRIPT else f"python -m {__package__}",
        usage="%(prog)s COMMAND ...",
        description="Real-time Qwen3-TTS.",
        epilog=f"commands:\n{listing}\n\nCOMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    return run_command(chosen.command, chosen.arguments, prog=f"{parser.prog} {chosen.command}")


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Run one of `COMMANDS`. Returns the exit status.

    Args:
        name: of the command.
        arguments: the arguments after the command's name.
        prog: the command's name in its usage and its errors.
    """
    module_name, text = COMMANDS[name]
    try:
        module = import_module(module_name, __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN:
            raise
        print(
            f"{prog}: {error.name} is not installed: pip install '{SCRIPT}[server]', "
            "or in a checkout: pip install -r requirements.txt",
            file=sys.stderr,
        )
        return 1
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        status: int = module.run(parser.parse_args(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of standard output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
