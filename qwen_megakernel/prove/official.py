"""The official package in a process of its own, in an environment that is made for it if needed."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import sysconfig
import tempfile
import threading
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from qwen_megakernel.installation.build_environment import cache_folder

PACKAGE = "qwen-tts-hf==0.1.1.post1"
"""The official code, built for transformers 5."""
NEEDS = (
    "transformers==5.17.0", "accelerate>=1.12", "einops>=0.8", "librosa>=0.11", "onnxruntime>=1.22",
    "scipy>=1.13", "sox>=1.5", "soundfile>=0.13",
)  # fmt: skip
"""Packages that it imports. From transformers 5.18 on Mimi's tensors have other names, and it no longer
loads."""
SCRIPT = Path(__file__).with_name("official_worker.py")
REQUEST_TIMEOUT_S = 900.0
CLOSE_TIMEOUT_S = 10.0

Report = Callable[[str], None]
Item = Mapping[str, Any]


class OfficialError(RuntimeError):
    """The official package cannot be installed, or its process failed. The message is one line."""


def official_python(report: Report) -> Path:
    """The interpreter of an environment with the official package; the environment is made once.

    Its torch and numpy are those of this process, by way of a `.pth` file: what differs between the two
    sides is then the implementation, and nothing large is downloaded.

    Raises:
        OfficialError: pip failed.
    """
    folder = cache_folder() / f"official-{PACKAGE.rpartition('=')[2]}-py{sys.version_info.minor}"
    python, done = folder / "bin" / "python", folder / "complete"
    if done.is_file():
        return python
    report(f"installing {PACKAGE} in an environment of its own")
    venv.create(folder, with_pip=True, clear=True)
    inside = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    Path(inside, "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    for arguments in (["--no-deps", PACKAGE], [*NEEDS]):
        made = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["no message"])[-1]
            raise OfficialError(f"pip could not install {' '.join(arguments)}: {last}")
    done.touch()
    return python


class OfficialProcess:
    """The official package's process; leaving its context ends it."""

    def __init__(self, python: Path, folder: Path) -> None:
        """Start it.

        Args:
            python: an interpreter that can import `qwen_tts`.
            folder: for its log.
        """
        self._log = folder / "official.log"
        self._arrays = tempfile.TemporaryDirectory(prefix="prove-")
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-P", str(SCRIPT)],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._replies.put(line)
        self._replies.put("")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Call a public method of `official_worker.Worker`; its reply.

        Raises:
            OfficialError: the method failed, the process ended, or no reply came in time.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            reply = self._replies.get(timeout=REQUEST_TIMEOUT_S)
        except (BrokenPipeError, queue.Empty):
            reply = ""
        if not reply:
            self._process.kill()
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise OfficialError(f"the official package: {do}: {lines[-1][:400] if lines else 'ended'}")
        found: dict[str, Any] = json.loads(reply)
        if "error" in found:
            raise OfficialError(f"the official package: {do}: {found['error'][:400]}")
        return found

    def ask_arrays(self, do: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """`ask` a method that writes arrays. Returns its reply, and the arrays by name."""
        path = Path(self._arrays.name) / "arrays.npz"
        reply = self.ask(do, out=str(path), **arguments)
        with np.load(path) as file:
            return reply, dict(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it end by itself, and kill it if it does not."""
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._arrays.cleanup()


def by_item(arrays: Mapping[str, np.ndarray], name: str, count: int) -> Sequence[np.ndarray]:
    """The arrays `NAME.0`, `NAME.1` ... of a result of `ask_arrays`."""
    return [arrays[f"{name}.{index}"] for index in range(count)]
