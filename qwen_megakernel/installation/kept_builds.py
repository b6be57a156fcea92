"""Built kernels in a folder: the cache, or a folder of prebuilt ones.

Each has a folder of its own with the cubin, its PTX if newer GPUs shall run it, a checksum and the facts
that it depends on. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has everything but the kernels
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
FACTS = "build.json"
"""Beside a cubin: what it was built from."""


def find(folder: Path, stem: str, name: str) -> list[Path]:
    """Cubins of a name whose folders begin with `stem`, whole or not, the newest compiler's last."""
    return sorted(folder.glob(f"{stem}-nvrtc*/{name}.cubin"))


def seal(product: Path, facts: dict[str, str]) -> None:
    """Write beside a cubin what tells that it is whole, and what it was built from."""
    _checksum_file(product).write_text(_checksum(product))
    (product.parent / FACTS).write_text(json.dumps(facts, indent=2))


def strip(product: Path) -> None:
    """Delete everything of a build that a server does not need."""
    for path in product.parent.iterdir():
        if path not in (product, ptx_of(product), _checksum_file(product), product.parent / FACTS):
            path.unlink()


def _checksum_file(product: Path) -> Path:
    return product.with_suffix(".sha256")


def ptx_of(product: Path) -> Path:
    """Where the PTX of a cubin is, if it has any."""
    return product.with_suffix(".ptx")


def _checksum(product: Path) -> str:
    content, ptx = product.read_bytes(), ptx_of(product)
    return hashlib.sha256(content + (ptx.read_bytes() if ptx.is_file() else b"")).hexdigest()


def is_whole(product: Path) -> bool:
    """Whether cubin and PTX are what was built: a power cut or a full disk may leave part of it."""
    try:
        return _checksum_file(product).read_bytes() == _checksum(product).encode()
    except OSError:
        return False


@contextmanager
def locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock. The system releases it when the process ends, for whatever reason."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is compiling the kernel; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
