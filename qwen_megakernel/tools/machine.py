"""Facts about this machine, which `doctor` judges.

Other programs run with a time limit, and torch runs in a process of its own, because a broken driver
hangs or kills any program that uses it. Run as a file, this module is that process and prints torch's
answers as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Version = tuple[int, ...]

TOOL_S = 10.0
TORCH_S = 60.0
"""Seconds that the first import of torch from a cold disk can take."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    driver: str
    capability: Version
    """(12, 0) on an RTX 5090."""
    free_gb: float | None
    total_gb: float | None
    """None if the driver does not say."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The answer of nvidia-smi: the GPUs, or why there are none."""

    gpus: tuple[Gpu, ...] = ()
    installed: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says about itself."""

    version: str = ""
    cuda: Version | None = None
    """None for a build without CUDA."""
    available: bool = False
    arch_list: tuple[str, ...] = ()
    threads: int = 0
    error: str = ""
    """Why torch gave no answer; empty if it did."""


@dataclass(frozen=True, slots=True)
class Model:
    """Where a checkpoint is."""

    name: str
    is_id: bool
    """Whether it is a Hugging Face id and not a folder."""
    cache: Path
    """The folder for downloads."""
    revision: str | None = None
    """The commit that the server takes; None is the newest."""
    offline: bool = False
    """Whether HF_HUB_OFFLINE is set."""
    folder: Path | None = None
    """The local folder; None if there is none, for the reason in `error`."""
    error: str = ""


def run_tool(*command: str, limit_s: float = TOOL_S) -> tuple[str, str]:
    """A program's output, and its last words on one line if it failed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return "", error.strerror or str(error)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)  # a process that is stuck in the driver cannot be killed
        return "", f"no answer within {limit_s:g} s"
    if process.returncode == 0:
        return out, ""
    words = (err.strip() or out.strip()).splitlines()
    return out, words[-1].strip() if words else f"exit status {process.returncode}"


def ask_nvidia_smi() -> Gpus:
    """The GPUs that the driver shows."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return Gpus(installed=False)
    fields = "name,driver_version,compute_cap,memory.free,memory.total"
    out, error = run_tool(path, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if error:
        return Gpus(error=error)
    try:
        gpus = tuple(_parse_gpu(line) for line in out.splitlines() if line.strip())
    except ValueError:
        return Gpus(error=f"cannot be understood: {out.strip().splitlines()[0][:100]}")
    return Gpus(gpus, error="" if gpus else "shows no GPU")


def _parse_gpu(line: str) -> Gpu:
    name, driver, capability, free, total = (part.strip() for part in line.rsplit(",", 4))
    parse_version(driver)
    return Gpu(name, driver, parse_version(capability), _gigabytes(free), _gigabytes(total))


def _gigabytes(mebibytes: str) -> float | None:
    # For unified memory and MIG the field holds words in brackets.
    return float(mebibytes) * 2**20 / 1e9 if re.fullmatch(r"[\d.]+", mebibytes) else None


def parse_version(text: str) -> Version:
    """Parse a version: (2, 13, 0) for 2.13.0+cpu. Raises `ValueError` if the text has none."""
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ValueError(f"no version: {text!r}")
    return tuple(int(part) for part in match[0].split("."))


def ask_torch(limit_s: float = TORCH_S) -> Torch:
    """Ask torch about itself, in a process of its own."""
    # -P: modules in this folder must not hide others of the same name, such as `config`.
    out, error = run_tool(sys.executable, "-P", __file__, limit_s=limit_s)
    if error:
        return Torch(error=error)
    try:
        facts = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        return Torch(error="gave no answer")
    cuda = facts.pop("cuda")
    archs = tuple(facts.pop("arch_list"))
    return Torch(cuda=parse_version(cuda) if cuda else None, arch_list=archs, **facts)


def _tell_torch() -> dict[str, Any]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "arch_list": torch.cuda.get_arch_list(),
        "threads": torch.get_num_threads(),
    }


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """The cores that this process may use, by its affinity and its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = cgroup.read_text().split()
        return min(cores, int(quota) / int(period))  # the container's share
    except (OSError, ValueError):
        return cores


def ask_model(name: str) -> Model:
    """Where a checkpoint is: on disk or in the hub's cache. Nothing is fetched."""
    from huggingface_hub import constants

    from qwen_megakernel.checkpoint import KNOWN_REVISIONS, CheckpointError, hub_cache_folder, resolve

    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
    model = Model(name, is_id, hub_cache_folder(), KNOWN_REVISIONS.get(name), constants.HF_HUB_OFFLINE)
    try:
        return replace(model, folder=resolve(name, offline=True))
    except CheckpointError as error:
        return replace(model, error=str(error))


if __name__ == "__main__":
    print(json.dumps(_tell_torch()))
