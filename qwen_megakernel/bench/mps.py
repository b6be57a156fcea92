"""How two programs share a GPU: by time slicing, or through NVIDIA's Multi-Process Service (MPS).

Without MPS the GPU switches between the programs, and one of them has all of it at a time. Under MPS
kernels of both run at the same time where they fit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
WITHOUT_MPS = {"CUDA_MPS_PIPE_DIRECTORY": "/dev/null"}
"""Variables of a program that keeps away from MPS, even where it runs."""
_TOOL_S = 20.0


class MpsError(RuntimeError):
    """MPS does not run here. The message is one line."""


@contextmanager
def running_mps() -> Iterator[dict[str, str]]:
    """A control daemon of our own; gives the variables that make CUDA programs its clients.

    Raises:
        MpsError: it is not installed, or did not start.
    """
    if shutil.which(CONTROL) is None:
        raise MpsError(f"{CONTROL} is not installed")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        names = ("PIPE", "LOG")
        variables = {f"CUDA_MPS_{name}_DIRECTORY": f"{folder}/{name.lower()}" for name in names}
        for path in variables.values():
            Path(path).mkdir()
        environ = {**os.environ, **variables}
        _start(environ, Path(folder) / "said")
        try:
            yield variables
        finally:
            with suppress(subprocess.SubprocessError):
                subprocess.run(
                    [CONTROL], input="quit -t 5\n", env=environ, text=True, timeout=_TOOL_S,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip


def _start(environ: dict[str, str], said: Path) -> None:
    """Start the daemon. Its output goes to a file, because it would keep a pipe open."""
    with said.open("w") as file:
        try:
            status = subprocess.run(
                [CONTROL, "-d"], env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                timeout=_TOOL_S,
            ).returncode  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsError(f"{CONTROL} did not start: {error}") from None
    if status:
        lines = said.read_text(errors="replace").split("\n")
        raise MpsError(f"{CONTROL} did not start: exit status {status}, {lines[0] or 'no message'}")
