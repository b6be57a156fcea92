"""Which test files a process of a parallel run gets."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = re.compile(
    r"^\s*(import official|from transformers)\b|importorskip\(\"official\"\)", re.MULTILINE
)
"""In a file that imports transformers, or the official package, which does so."""


class FileScheduling(LoadFileScheduling):
    """A file at a time to each process; all files that import transformers to the same one.

    With the official package that import takes 8 s of a core in each process that makes it.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _scope(super()._split_scope(nodeid))


@functools.cache
def _scope(name: str) -> str:
    return "references" if REFERENCES.search((ROOT / name).read_text(encoding="utf-8")) else name
