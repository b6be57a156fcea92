"""Built libraries in a folder: the cache, or a folder of prebuilt ones.

Each has a folder of its own with the library, its checksum and the facts on which it depends. Standard
library only.
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
"""The file beside a library that says what it was built from."""


def find(folder: Path, stem: str, name: str) -> list[Path]:
    """Libraries called `name` in folders that begin with `stem`, whole or damaged; the newest compiler's
    is last."""
    return sorted(folder.glob(f"{stem}-nvcc*/{name}.so"))


def seal(product: Path, facts: dict[str, str]) -> None:
    """Write a library's checksum and its facts beside it."""
    _checksum_file(product).write_text(_checksum(product))
    (product.parent / FACTS).write_text(json.dumps(facts, indent=2))


def strip(product: Path) -> None:
    """Delete everything of a build that a server does not need."""
    for path in product.parent.iterdir():
        if path not in (product, _checksum_file(product), product.parent / FACTS):
            path.unlink()


def _checksum_file(product: Path) -> Path:
    return product.with_suffix(".sha256")


def _checksum(product: Path) -> str:
    return hashlib.sha256(product.read_bytes()).hexdigest()


def is_whole(product: Path) -> bool:
    """Whether a built library matches its checksum. A power cut or a full disk may leave part of a
    library, which would crash the loader."""
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
