"""GPU architectures by name, and the folders that keep built kernels and downloads.

Standard library only, so that `doctor` can make the same checks as the build before torch is installed.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""Ampere: asynchronous copies to shared memory, mbarriers, and bf16 on the tensor cores."""
HOPPER = (9, 0)
"""From Hopper on, an architecture has features of its own, and an `a` in its name."""
ARCH_VARIABLE = "QWEN_MEGAKERNEL_ARCH"
PREBUILT_VARIABLE = "QWEN_MEGAKERNEL_KERNELS"


def arch_of(capability: tuple[int, ...]) -> str:
    """The name of an architecture's kernels, such as `86` or `90a`, by its compute capability."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if (major, minor) >= HOPPER else "")


def named_arch() -> str | None:
    """QWEN_MEGAKERNEL_ARCH: an older architecture than the GPU's, such as `86`. The PTX of its kernels
    runs on the GPU."""
    return os.environ.get(ARCH_VARIABLE) or None


def cache_folder() -> Path:
    """The folder that keeps builds: QWEN_MEGAKERNEL_CACHE, else `user_cache_folder`."""
    if named := os.environ.get("QWEN_MEGAKERNEL_CACHE"):
        return Path(os.path.expanduser(named))
    return user_cache_folder() / "qwen_megakernel"


def prebuilt_folder() -> Path | None:
    """QWEN_MEGAKERNEL_KERNELS: a folder that `build --out` has filled on this or another machine."""
    named = os.environ.get(PREBUILT_VARIABLE)
    return Path(os.path.expanduser(named)) if named else None


def user_cache_folder() -> Path:
    """XDG_CACHE_HOME, else `~/.cache`, else a temporary folder if no home is known."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME and a user without an account, as in many containers
        return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    """A folder that only this user can write: if possible the same for all processes of the user."""
    name = f"qwen_megakernel-{os.getuid()}"
    try:
        folder = Path(tempfile.gettempdir()) / name
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not _is_private(folder):  # another user could plant a library in it
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    except OSError:  # no disk can be written: whoever writes later reports it
        folder = Path("/tmp") / name
    log.warning(
        "no home folder is known, so caches are kept in %s; "
        "set QWEN_MEGAKERNEL_CACHE (built kernels) and HF_HOME (models) to keep them elsewhere",
        folder,
    )
    return folder


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
