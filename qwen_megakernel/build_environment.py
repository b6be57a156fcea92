"""What a build takes from this machine: the CUDA compiler, and the folder that keeps built kernels.

Standard library only, so that `doctor` asks the same question as the build, before torch is installed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")


def find_nvcc() -> Path | None:
    """The CUDA compiler: below CUDA_HOME or CUDA_PATH, else on the PATH, else in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    below_home = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = below_home or shutil.which("nvcc") or shutil.which(USUAL_NVCC)
    return Path(found) if found else None


def cache_folder() -> Path:
    """Where builds are kept: QWEN_MEGAKERNEL_CACHE, else the user's cache folder."""
    if named := os.environ.get("QWEN_MEGAKERNEL_CACHE"):
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qwen_megakernel"
