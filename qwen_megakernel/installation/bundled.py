"""Folders that come with the package: the kernels' sources and the demonstration voice.

In a checkout they lie beside the package, and in an installed package inside it. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled_folder(name: str) -> Path:
    """The folder `csrc` or `demo_voice`. It may be missing in both places."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
