"""Keeps the findings of a run in the folder of its report, so that a later run can continue it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import qwen_megakernel
from qwen_megakernel.installation.bundled import bundled_folder

Found = dict[str, Any]


def sources_digest() -> str:
    """A digest of the code under test: the package's Python files without `prove`, and the kernels'
    sources."""
    package = Path(qwen_megakernel.__file__).parent
    files = [
        *(path for path in package.rglob("*.py") if path.parent != Path(__file__).parent),
        *bundled_folder("csrc").glob("*"),
    ]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def checkpoint_digest(folder: Path) -> str:
    """A digest of a checkpoint: its small files, and the beginning and the size of its weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


class Findings:
    """JSON files of a folder, each with the key of what it depends on."""

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        """`base` has the values on which every part depends."""
        self._folder, self._base = folder, dict(base)
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, depends: Mapping[str, Any], make: Callable[[], Found]) -> Found:
        """The result of `make` for these dependencies, from now or from an earlier run."""
        stated = json.dumps([self._base, dict(depends)], sort_keys=True, default=str)
        key = hashlib.sha256(stated.encode()).hexdigest()
        path = self._folder / f"{name}.json"
        try:
            kept: Found = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                found: Found = kept["found"]
                return found
        except (OSError, ValueError, KeyError):
            pass
        found = make()
        write_atomically(path, json.dumps({"key": key, "found": found}))
        return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
