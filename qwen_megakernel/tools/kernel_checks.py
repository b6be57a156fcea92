"""The checks of `doctor` on whether kernels can be built and run here. Standard library only."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_megakernel.installation import kernel_tuning, nvrtc
from qwen_megakernel.installation.build_environment import (
    MIN_CAPABILITY,
    arch_of,
    cache_folder,
    prebuilt_folder,
)
from qwen_megakernel.installation.known_gpus import expected_frames
from qwen_megakernel.tools.findings import Check, dotted
from qwen_megakernel.tools.machine import Gpus, Torch, parse_version

BLACKWELL = (12, 0)


def check_compiler(found: Gpus, torch: Torch) -> Check:
    """A CUDA compiler of torch's major version that knows the GPU, and runs."""
    cuda = dotted(torch.cuda) if torch.cuda else None
    compiler = nvrtc.find_compiler()
    if compiler is None:
        return _absent("compiler", found, nvrtc.pip_command(cuda))
    try:
        release = nvrtc.release_of(compiler)
    except nvrtc.CompilerError as error:
        return Check("compiler", "warn", str(error), nvrtc.pip_command(cuda))
    version = parse_version(release)
    detail = f"NVRTC {release} ({compiler.library})"
    fix = f"{nvrtc.pip_command(cuda)}, without CUDA_HOME"
    if torch.cuda is not None and version[0] != torch.cuda[0]:
        return Check("compiler", "warn", f"{detail}, but torch has CUDA {cuda}", fix)
    if found.gpus and found.gpus[0].capability >= BLACKWELL and version < (12, 8):
        detail += " does not know this GPU, 12.8 is the first that does"
        return Check("compiler", "warn", detail, fix)
    return Check("compiler", "ok", detail)


def check_kernels(found: Gpus, compiler: Check, cache: Path | None = None) -> Check:
    """Whether `--backend auto` takes the CUDA kernels, and what is missing if not.

    Args:
        found: the GPUs.
        compiler: what `check_compiler` says.
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
    kept = {name for name in ("frame", "codec") if any(folder.glob(f"{name}-{arch}-*/{name}.cubin"))}
    if kept == {"frame", "codec"}:
        return Check("kernels", "ok", f"{arch}: some are built in {folder}{expected}")
    if compiler.status == "warn":
        detail = f"{arch}: none are built, and there is no compiler that will do; PyTorch decodes"
        return Check("kernels", "warn", detail, "see above; PyTorch works, more slowly")
    detail = f"{arch}: compiled at the first start, in about a minute"
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
    """A missing compiler, which only a machine with a GPU has a use for."""
    if not found.gpus:
        return Check(name, "skipped", "not found, and not needed without a GPU")
    return Check(name, "warn", "not found: needed to build the megakernel", fix)
