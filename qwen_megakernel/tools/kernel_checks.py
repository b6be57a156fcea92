"""The checks of `doctor` on whether kernels can be built and run here. Standard library only."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_megakernel.installation import kernel_tuning
from qwen_megakernel.installation.build_environment import (
    HOST_COMPILER_FIX,
    MIN_CAPABILITY,
    arch_of,
    cache_folder,
    find_host_compiler,
    find_nvcc,
    pip_nvcc_command,
    prebuilt_folder,
)
from qwen_megakernel.installation.known_gpus import expected_frames
from qwen_megakernel.tools.findings import Check, dotted
from qwen_megakernel.tools.machine import Gpus, Torch, parse_version, run_tool

BLACKWELL = (12, 0)


def check_nvcc(found: Gpus, torch: Torch) -> Check:
    """A CUDA compiler of torch's major version that knows the GPU."""
    path = find_nvcc()
    if path is None:
        fix = "install the CUDA toolkit of torch's version, 12.8 or newer"
        if torch.cuda is not None and torch.cuda >= (13, 0):
            fix += f"; or its compiler: {pip_nvcc_command(dotted(torch.cuda))}"
        return _absent("nvcc", found, fix)
    out, error = run_tool(str(path), "--version")
    match = re.search(r"release (\d+\.\d+)", out)
    if error or match is None:
        return Check(
            "nvcc",
            "warn",
            f"{path}: {error or 'does not say its version'}",
            "reinstall the CUDA toolkit",
        )
    version = parse_version(match[1])
    detail = f"{match[1]} ({path})"
    fix = "install the CUDA toolkit of torch's version, and set CUDA_HOME to it"
    if torch.cuda is not None and version[0] != torch.cuda[0]:
        return Check("nvcc", "warn", f"{detail}, but torch has CUDA {dotted(torch.cuda)}", fix)
    if found.gpus and found.gpus[0].capability >= BLACKWELL and version < (12, 8):
        return Check(
            "nvcc", "warn", f"{detail} does not know this GPU, 12.8 is the first that does", fix
        )
    return Check("nvcc", "ok", detail)


def check_compiler(found: Gpus) -> Check:
    """The C++ compiler that the build gives to nvcc."""
    path = find_host_compiler()
    if path is None:
        return _absent("compiler", found, HOST_COMPILER_FIX)
    out, error = run_tool(str(path), "--version")
    if error or not out.strip():
        return Check("compiler", "warn", f"{path}: {error or 'no answer'}", HOST_COMPILER_FIX)
    return Check("compiler", "ok", f"{out.splitlines()[0].strip()} ({path})")


def check_kernels(found: Gpus, tools: Sequence[Check], cache: Path | None = None) -> Check:
    """Whether `--backend auto` takes the CUDA kernels, and what is missing if not.

    Args:
        found: the GPUs.
        tools: what was found of the build tools.
        cache: where builds are kept; None is the prebuilt ones' folder, or the cache.
    """
    if not found.gpus:
        return Check("kernels", "skipped", "no GPU: PyTorch decodes")
    if sys.platform == "win32":
        detail = "the kernels are built on Linux only; PyTorch decodes"
        return Check("kernels", "warn", detail, "WSL 2; this works, more slowly")
    capability = found.gpus[0].capability
    arch = f"sm_{arch_of(capability)}"
    if capability < MIN_CAPABILITY:
        needed = f"sm_{arch_of(MIN_CAPABILITY)} or newer (Ampere, Ada, Hopper, Blackwell)"
        detail = f"{arch}: the kernels need {needed}; PyTorch decodes"
        return Check("kernels", "warn", detail, "another GPU; this one works, more slowly")
    folder = cache or prebuilt_folder() or cache_folder()
    frames = expected_frames(found.gpus[0].name)
    expected = f"; {frames}" if frames else ""
    kept = {name for name in ("frame", "codec") if any(folder.glob(f"{name}-{arch}-*/{name}.so"))}
    missing = [tool.name for tool in tools if tool.status == "warn"]
    if kept == {"frame", "codec"}:
        return Check("kernels", "ok", f"{arch}: some are built in {folder}{expected}")
    if missing:
        detail = f"{arch}: none are built, and {' and '.join(missing)} will not do; PyTorch decodes"
        return Check("kernels", "warn", detail, "see above; PyTorch works, more slowly")
    detail = f"{arch}: compiled at the first start, about a minute"
    return Check("kernels", "ok", f"{detail}, or before: python -m qwen_megakernel build{expected}")


def check_tuning(found: Gpus, cache: Path | None = None) -> Check:
    """Whether `tune` has found settings for this GPU and for the current kernels.

    Args:
        found: the GPUs.
        cache: the folder of builds.
    """
    if not found.gpus or found.gpus[0].capability < MIN_CAPABILITY:
        return Check("tuning", "skipped", "no GPU that runs the kernels")
    command = "python -m qwen_megakernel tune"
    tuned, stale = [], []
    for path in kernel_tuning.kept(found.gpus[0].name, cache):
        try:
            tuning = kernel_tuning.read(path)
        except (ValueError, OSError) as error:
            stale.append(f"{path} is ignored: {error}")
            continue
        if _is_of_present_kernels(tuning.target):
            tuned.append(f"{tuning.target.form} form: {tuning}")
        else:
            stale.append(f"{path} is ignored: it is of other kernels")
    detail = "; ".join(tuned + stale)
    if stale:
        return Check("tuning", "warn", detail, command)
    return Check(
        "tuning", "ok", detail or f"none; {command} looks for faster settings in a minute or two"
    )


def _is_of_present_kernels(target: kernel_tuning.Target) -> bool:
    try:
        from qwen_megakernel.build_tts import frame_digest
    except (ImportError, OSError):  # torch is not installed, or only half
        return True
    return target.digest == frame_digest(target.geometry, target.arch)


def _absent(name: str, found: Gpus, fix: str) -> Check:
    """A missing build tool, which only a machine with a GPU has a use for."""
    if not found.gpus:
        return Check(name, "skipped", "not found, and not needed without a GPU")
    return Check(name, "warn", "not found: needed to build the megakernel", fix)
