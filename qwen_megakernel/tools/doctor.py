"""`python -m qwen_megakernel doctor`: whether this machine can serve, and how to fix what is wrong.

Each check is a function that takes facts from `machine` and returns a `Check`. This module imports only
the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from qwen_megakernel.installation.build_environment import (
    cache_folder,
)
from qwen_megakernel.tools.findings import Check, dotted
from qwen_megakernel.tools.kernel_checks import check_compiler, check_kernels, check_tuning
from qwen_megakernel.tools.machine import (
    Gpus,
    Model,
    Torch,
    Version,
    ask_model,
    ask_nvidia_smi,
    ask_torch,
    parse_version,
    usable_cores,
)

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
DEFAULT_MODEL = "Qwen/Qwen3-TTS-12Hz-0.6B-Base"
MIN_PYTHON = (3, 11)
INSTALL = (
    "pip install -r requirements.txt"
    if REQUIREMENTS.is_file()
    else "pip install 'qwen-megakernel[server]'"
)

DRIVERS = {(12, 0): 525, (12, 4): 550, (12, 6): 560, (12, 8): 570, (12, 9): 575, (13, 0): 580}
"""CUDA version -> the first driver branch that runs it in full."""
KERNEL_CACHE_GB = 0.5


@dataclass(frozen=True, slots=True)
class Size:
    """The memory that a model needs, in GB."""

    disk: float
    gpu: float
    """Weights in bf16, the key-value caches of the server's 16 slots, and CUDA itself. 0.6B: PyTorch
    takes at most 9.4 GB while loading, measured on an H200. The predictor's table (0.24 GB) and CUDA
    come on top. 1.7B: estimated."""


SIZES = {"0.6B": Size(2.5, 10.5), "1.7B": Size(4.5, 12.5)}


# ---------------------------------------------------------------------------- software


def check_python(version: Version = sys.version_info[:3]) -> Check:
    """Python is new enough."""
    if version < MIN_PYTHON:
        fix = f"make a virtual environment with Python {dotted(MIN_PYTHON)} or later"
        return Check("python", "fail", f"{dotted(version)} is too old", fix)
    return Check("python", "ok", f"{dotted(version)} ({sys.prefix})")


def check_packages(requirements: str, installed: Callable[[str], str] = metadata.version) -> Check:
    """The installed packages satisfy every line of requirements.txt.

    Args:
        requirements: the text of requirements.txt.
        installed: gives a package's version, or raises `PackageNotFoundError`.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:  # doctor also runs before anything is installed
        return Check("packages", "fail", "missing: packaging, and perhaps others", INSTALL)
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    found = [Requirement(line) for line in lines if line]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": "server"})]
    missing: list[str] = []
    wrong: list[str] = []
    other: list[str] = []
    pinned: list[str] = []
    for each in wanted:
        try:
            have = installed(each.name)
        except metadata.PackageNotFoundError:
            missing.append(each.name)
            continue
        is_pin = any(part.operator == "==" for part in each.specifier)
        if not each.specifier.contains(have, prereleases=True):
            (other if is_pin else wrong).append(f"{each.name} {have} ({each.specifier})")
        elif is_pin:
            pinned.append(f"{each.name} {have}")
    parts = (("missing: ", missing), ("wrong version: ", wrong), ("not the tested version: ", other))
    detail = "; ".join(title + ", ".join(names) for title, names in parts if names)
    if detail:
        return Check("packages", "fail" if missing or wrong else "warn", detail, INSTALL)
    return Check("packages", "ok", f"all {len(wanted)} as required, {', '.join(pinned)}")


def check_cpu(torch: Torch, cores: float | None = None) -> Check:
    """The number of threads fits the cores that this process may use."""
    cores = usable_cores() if cores is None else cores
    detail = f"{cores:g} cores, {torch.threads or '?'} threads"
    if torch.threads > max(1.0, cores):
        fix = f"export OMP_NUM_THREADS={max(1, int(cores))}"
        return Check("cpu", "warn", f"{detail}: they will wait for each other", fix)
    return Check("cpu", "ok", detail)


# ---------------------------------------------------------------------------- GPU


def check_driver(found: Gpus, torch: Torch) -> Check:
    """An NVIDIA driver answers and is new enough for torch's CUDA."""
    if not found.installed:
        detail = "no GPU: the torch backend on the CPU will be used"
        return Check(
            "driver", "warn", detail, "none needed on a CPU; a GPU needs NVIDIA driver 580 or later"
        )
    if not found.gpus:
        fix = "reboot, or reinstall the driver; in a container, start it with --gpus all"
        return Check("driver", "fail", f"nvidia-smi: {found.error}", fix)
    driver = found.gpus[0].driver
    if torch.cuda is None:
        return Check("driver", "ok", driver)
    needed = max((d for cuda, d in DRIVERS.items() if cuda <= torch.cuda), default=0)
    detail = f"{driver}, CUDA {dotted(torch.cuda)} needs {needed} or later"
    if parse_version(driver)[0] >= needed:
        return Check("driver", "ok", detail)
    fix = (
        f"choose a machine image with driver {needed} or later, or: "
        f"sudo apt install nvidia-driver-{needed}-open && sudo reboot"
    )
    # Within CUDA 12 an older driver runs newer programs, but not all of their features.
    return Check("driver", "warn" if torch.available else "fail", detail, fix)


def check_gpu(found: Gpus, size: Size) -> Check:
    """A GPU has enough memory for the model."""
    if not found.gpus:
        return Check("gpu", "skipped", "no GPU")
    gpu = found.gpus[0]
    detail = f"{gpu.name}, sm_{dotted(gpu.capability).replace('.', '')}"
    if gpu.free_gb is not None:
        detail += f", {gpu.free_gb:.1f} of {gpu.total_gb or 0:.1f} GB free"
    if len(found.gpus) > 1:
        detail += f" (first of {len(found.gpus)}; choose with --device cuda:N)"
    if gpu.free_gb is not None and gpu.free_gb < size.gpu:
        fix = "end what else runs on it (nvidia-smi lists it), or start the server with --num-slots 4"
        return Check("gpu", "warn", f"{detail}; 16 slots take {size.gpu:g} GB", fix)
    return Check("gpu", "ok", detail)


def check_torch(found: Gpus, torch: Torch) -> Check:
    """torch can be imported, finds the GPU, and has code for it."""
    if torch.error:
        return Check("torch", "fail", f"cannot be imported: {torch.error}", INSTALL)
    if not found.gpus:
        return Check("torch", "ok", f"{torch.version} on the CPU")
    if torch.cuda is None:
        fix = f"pip uninstall -y torch && {INSTALL}   (from the default index, not the CPU one)"
        return Check("torch", "fail", f"{torch.version} is a build without CUDA", fix)
    detail = f"{torch.version}, CUDA {dotted(torch.cuda)}"
    if not torch.available:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        fix = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else "see `driver` above"
        return Check("torch", "fail", f"{detail} finds no GPU", fix)
    capability = found.gpus[0].capability
    if not covers(torch.arch_list, capability):
        archs = " ".join(torch.arch_list) or "no GPU"
        arch = f"sm_{''.join(map(str, capability))}"
        fix = f"{INSTALL} --upgrade --force-reinstall   (its torch has {arch})"
        return Check("torch", "fail", f"{detail} has no code for {arch}, only for {archs}", fix)
    return Check("torch", "ok", f"{detail}, finds the GPU")


def covers(arch_list: Sequence[str], capability: Version) -> bool:
    """Whether a build runs on a GPU: it has machine code for its generation, or PTX of at most its
    capability."""
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        kind, built, exact = match[1], (int(match[2]), int(match[3])), match[4] == "a"
        if built == capability or (not exact and built < capability and kind == "compute"):
            return True
        if kind == "sm" and not exact and built[0] == capability[0] and built <= capability:
            return True
    return False


# ---------------------------------------------------------------------------- model, disk, port


def check_model(model: Model) -> Check:
    """The checkpoint exists and is complete and well-formed. Weights are not read."""
    if model.folder is not None:
        return _check_checkpoint(model, model.folder)
    if not model.is_id:
        return Check("model", "fail", model.error, f"name a folder or an id such as {DEFAULT_MODEL}")
    revision = f" --revision {model.revision}" if model.revision else ""
    command = f"hf download {model.name}{revision}"
    if model.offline:
        return Check("model", "fail", model.error, f"unset HF_HUB_OFFLINE, and: {command}")
    detail = f"{model.name} is not in the cache; the server downloads it at its first start"
    return Check("model", "warn", detail, f"to have it before: {command}")


def _check_checkpoint(model: Model, folder: Path) -> Check:
    from qwen_megakernel.checkpoint import Checkpoint, CheckpointError
    from qwen_megakernel.config import ConfigError

    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
    except (CheckpointError, ConfigError) as error:
        remove = f"rm -rf {shlex.quote(str(folder))}, and start the server to download it again"
        fix = remove if model.is_id else "copy or download this checkpoint again"
        return Check("model", "fail", str(error), fix)
    if checkpoint.note is not None:
        detail = f"{model.name} is synthetic: {checkpoint.note}"
        return Check("model", "warn", detail, f"for speech: --model {DEFAULT_MODEL}")
    where = f" at commit {folder.name}" if model.is_id else ""
    return Check("model", "ok", f"{model.name}{where} is complete ({checkpoint.config.mode})")


def check_model_disk(model: Model, size: Size) -> Check:
    """There is space for the download, if the checkpoint is not here yet."""
    if model.folder is not None or not model.is_id:
        return Check("model-disk", "skipped", "nothing to download")
    return _check_space(
        "model-disk", model.cache, size.disk, "export HF_HOME=/a/larger/disk, or make room"
    )


def check_kernel_disk(cache: Path | None = None) -> Check:
    """There is space for built kernels."""
    fix = "export QWEN_MEGAKERNEL_CACHE=/a/larger/disk, or make room"
    return _check_space("kernel-disk", cache or cache_folder(), KERNEL_CACHE_GB, fix)


def _check_space(name: str, folder: Path, need_gb: float, fix: str) -> Check:
    folder = folder.absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        free_gb = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        return Check(name, "fail", f"{folder}: {error.strerror}", fix)
    detail = f"{folder}: {free_gb:.1f} GB free, {need_gb:g} GB needed"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check(name, "fail", f"{existing} cannot be written", fix)
    return Check(name, "ok", detail) if free_gb >= need_gb else Check(name, "fail", detail, fix)


def check_port(port: int) -> Check:
    """The port is free on 127.0.0.1."""
    with socket.socket() as listener:
        # The server does the same: a port whose last connection has just closed counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            other = f"python -m qwen_megakernel serve --port {port + 1}"
            fix = f"{other}, or see who has it: ss -ltnp 'sport = :{port}'"
            return Check("port", "fail", f"{port} on 127.0.0.1: {error.strerror}", fix)
    return Check("port", "ok", f"{port} on 127.0.0.1 is free")


# ---------------------------------------------------------------------------- all of it


def read_requirements() -> str:
    """The text of requirements.txt, or the same lines from an installed package."""
    if REQUIREMENTS.is_file():
        return REQUIREMENTS.read_text(encoding="utf-8")
    return "\n".join(metadata.requires("qwen-megakernel") or ())


def examine(name: str, port: int) -> list[Check]:
    """Run every check."""
    gpus, torch = ask_nvidia_smi(), ask_torch()
    size = next((size for part, size in SIZES.items() if part in name), SIZES["0.6B"])
    compiler = check_compiler(gpus, torch)
    checks = [
        check_python(),
        check_packages(read_requirements()),
        check_cpu(torch),
        check_driver(gpus, torch),
        check_gpu(gpus, size),
        check_torch(gpus, torch),
        compiler,
        check_kernels(gpus, compiler),
        check_tuning(gpus),
    ]
    try:
        model = ask_model(name)
    except (ImportError, OSError) as error:  # OSError: torch is half installed
        checks.append(Check("model", "skipped", f"needs the packages above ({error})"))
    else:
        checks += [check_model(model), check_model_disk(model, size)]
    return [*checks, check_kernel_disk(), check_port(port)]


def report(checks: Sequence[Check]) -> str:
    """The findings for people."""
    failed, warned = (sum(c.status == status for c in checks) for status in ("fail", "warn"))
    verdict = "not fit to serve yet" if failed else "fit to serve"
    return "\n".join([*(c.lines() for c in checks), f"{verdict}: {failed} failed, {warned} warnings"])


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65_535:
        raise argparse.ArgumentTypeError("expected a port, 1 to 65535")
    return port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.add_argument("--port", type=_port, default=8765, help="port to serve on (default: 8765)")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"checkpoint on disk or Hugging Face (default: {DEFAULT_MODEL})",
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if a check failed."""
    checks = examine(args.model, args.port)
    ok = not any(check.status == "fail" for check in checks)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(report(checks))
    return 0 if ok else 1
