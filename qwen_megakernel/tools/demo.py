"""Run everything once, on any machine: the demonstration voice, a real server, the real client."""

from __future__ import annotations

import argparse
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwen_megakernel.config import SAMPLINGS
from qwen_megakernel.installation.bundled import bundled_folder

PROGRAM = ("-m", "qwen_megakernel")
CHECKPOINT = bundled_folder("demo_voice")
"""The tiny checkpoint that comes with the package. Its README.md describes it."""
VOICE = "rms"
SEED = 3
"""A fixed seed: the demo sounds the same each time, so that a change can be heard."""

TEXT = "Hello, and thank you for trying this. How can I help you today?"
READY_S = 180.0
"""Seconds until the server must be ready. A cold disk makes the first import of torch take a minute."""
CLIENT_S = 300.0
STOP_S = 30.0

_LISTENING = re.compile(r"listening on \S+ port (\d+)")

CLOSING = """\
{out} was spoken by the demonstration voice, a tiny model that knows four synthetic voices and
plain English ({card}). The real model sounds like a person. With a recording of the voice to
clone (3 to 30 s of one speaker; downloads 2.5 GB once):

  {python} -m qwen_megakernel serve --model Qwen/Qwen3-TTS-12Hz-0.6B-Base --speaker-ref voice.wav
"""


class DemoError(RuntimeError):
    """A step that failed; one line."""


def run_step(*arguments: str | Path, limit_s: float) -> None:
    """Run one of the project's programs to its end, and show its command. Raises `DemoError`."""
    shown = _shown(arguments)
    print(shown, flush=True)
    command = [sys.executable, *map(str, arguments)]
    try:
        status = subprocess.run(
            command, env=_environment(), stdin=subprocess.DEVNULL, timeout=limit_s
        ).returncode
    except subprocess.TimeoutExpired:
        raise DemoError(f"not done after {limit_s:.0f} s: {shown[2:]}") from None
    if status:
        raise DemoError(f"exit status {status}: {shown[2:]}")


def _print(line: str) -> None:
    print(line, flush=True)


@contextmanager
def running_server(
    *arguments: str | Path,
    show: Callable[[str], None] = _print,
    environ: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """A server on a free port, ready; gives the port. Stopped at the end, whatever happens.

    Args:
        arguments: of the command `serve`.
        show: takes the command line and the lines of the server's log, from any thread.
        environ: variables of the server beside ours.

    Raises:
        DemoError: the server does not get ready, or does not stop cleanly.
    """
    command = (*PROGRAM, "serve", "--port", "0", *arguments)
    show(_shown(command))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**_environment(), **(environ or {})},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    reader = threading.Thread(target=_show_log, args=(process, ports, show), daemon=True)
    reader.start()
    try:
        yield _wait_until_ready(process, ports)
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server did not stop within {STOP_S:.0f} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(5)
    if status:
        raise DemoError(f"the server ended with exit status {status}")


def _show_log(
    process: subprocess.Popen[str], ports: queue.SimpleQueue[int], show: Callable[[str], None]
) -> None:
    """Pass on the lines of the server's log, and the port that one of them names."""
    for line in process.stderr or ():
        show(f"  {line.rstrip()}")
        if match := _LISTENING.search(line):
            ports.put(int(match[1]))


def _wait_until_ready(process: subprocess.Popen[str], ports: queue.SimpleQueue[int]) -> int:
    port = None
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with exit status {process.returncode}")
        if port is None and not ports.empty():
            port = ports.get()
        if port is not None and _is_ready(port):
            return port
        time.sleep(0.05)
    raise DemoError(f"the server was not ready after {READY_S:.0f} s")


def _is_ready(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this port
    try:
        with opener.open(f"http://127.0.0.1:{port}/ready", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _environment() -> dict[str, str]:
    """This process's environment without proxies and without variables that configure a server."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("QWEN_MEGAKERNEL_") or k == "QWEN_MEGAKERNEL_CACHE"
    }
    return {**kept, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(["$ python", *(shlex.quote(_short(argument)) for argument in command)])


def _short(argument: str | Path) -> str:
    """A path relative to the working folder."""
    here = Path.cwd()
    if isinstance(argument, Path) and argument.is_relative_to(here):
        return str(argument.relative_to(here))
    return str(argument)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel demo`."""
    parser.add_argument("--text", default=TEXT, help="what to say")
    parser.add_argument(
        "--sampling", choices=SAMPLINGS, default="original", help="as of server.py (default: original)"
    )
    parser.add_argument(
        "--text-cleaning",
        choices=("on", "off"),
        default="on",
        help="leave out of the text what cannot be spoken (default: on)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build"),
        metavar="DIR",
        help="where demo.wav goes (default: build)",
    )


def run(args: argparse.Namespace) -> int:
    """Run server and client. Returns the exit status."""
    # By default SIGTERM would end this process without cleaning up, and leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = args.folder.absolute()
    out = folder / "demo.wav"
    try:
        if not CHECKPOINT.is_dir():
            raise DemoError(f"{CHECKPOINT}: the demonstration voice is missing")
        folder.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        options = ("--sampling", args.sampling, "--text-cleaning", args.text_cleaning)
        server = ("--model", CHECKPOINT, "--voices", CHECKPOINT / "voices", *options)
        with running_server(*server) as port:
            url = f"ws://127.0.0.1:{port}"
            says = ("--url", url, "--voice", VOICE, "--seed", str(SEED), "--text", str(args.text))
            run_step(*PROGRAM, "say", *says, "--out", out, limit_s=CLIENT_S)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    card, python = _short(CHECKPOINT / "README.md"), _short(Path(sys.executable))
    print("\n" + CLOSING.format(out=_short(out), card=card, python=python), end="")
    return 0
