"""A Python program in a process of its own, which begins with PyTorch and other large packages imported.

Their import takes longer than all else that a server of a tiny checkpoint does until it is ready. Here
one process imports them, and each program is a fork of that process. Nothing of this project is
imported before the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

LARGE = [
    "torch",
    "numpy",
    "safetensors.torch",
    "tokenizers",
    "uvicorn",
    "starlette.applications",
    "websockets",
]
"""Packages that are imported before the fork."""
COMMAND = """
import runpy
runpy.run_module("qwen_megakernel", run_name="__main__", alter_sys=True)
"""
"""The program `python -m qwen_megakernel`."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(LARGE)


class WarmProcess:
    """As `subprocess.Popen` of `python FILE ARGUMENTS` or `python -c PROGRAM ARGUMENTS`.

    `stdout` and `stderr` are text to read.
    """

    def __init__(
        self,
        file: Path,
        arguments: Sequence[str],
        *,
        program: str | None,
        environ: Mapping[str, str],
        cwd: Path,
        text: str = "",
    ) -> None:
        """`program`: Python code to run instead of `file`. `text`: what it reads, up to 64 KiB."""
        pipes = [_FORKS.Pipe(duplex=False) for _ in range(2)]
        self.stdout, self.stderr = (_text_of(reader) for reader, _ in pipes)
        stdin, typing = _FORKS.Pipe(duplex=False)
        os.write(typing.fileno(), text.encode())
        typing.close()
        streams = [stdin, *(writer for _, writer in pipes)]
        told = ([str(file), *arguments], program, dict(environ), str(cwd))
        self._process = _FORKS.Process(target=_run, args=(*told, *streams), daemon=True)
        self._process.start()
        for stream in streams:
            stream.close()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; `subprocess.TimeoutExpired` after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_warm(
    file: Path,
    *arguments: str,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    limit_s: float = 240.0,
    program: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `python FILE ARGUMENTS` with captured output, which has up to 64 KiB.

    `program` as for `WarmProcess`.
    """
    environ = {**os.environ, **(environ or {})}
    process = WarmProcess(file, arguments, program=program, environ=environ, cwd=Path.cwd(), text=text)
    try:
        code = process.wait(limit_s)
    finally:
        process.kill()
    with process.stdout, process.stderr:
        output, errors = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess([str(file), *arguments], code, output, errors)


def _text_of(reader: Connection) -> TextIO:
    text = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")  # noqa: SIM115
    reader.close()
    return text


def _run(
    argv: list[str],
    program: str | None,
    environ: dict[str, str],
    cwd: str,
    *streams: Connection,
) -> None:
    """In the new process; `streams`: for its input, output and errors."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.path.insert(0, cwd if program is not None else str(Path(argv[0]).parent))
    sys.argv = argv if program is None else ["-c", *argv[1:]]
    if program is None:
        runpy.run_path(argv[0], run_name="__main__")
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
