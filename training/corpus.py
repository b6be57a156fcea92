"""The training material on disk: the sentences' tokens, and the codes of their speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

_FILES = 2
"""Parts, so that none is too large to hand around."""


def write_codes(codes: dict[int, Tensor], folder: Path) -> None:
    """Write sentence index -> codes uint8 [frames, 16] as `codes-N.npz`."""
    indices = np.array(sorted(codes), dtype=np.int32)
    for number, part in enumerate(np.array_split(indices, _FILES)):
        frames = np.array([len(codes[i]) for i in part], dtype=np.int32)
        flat = np.concatenate([codes[i].numpy() for i in part]) if len(part) else np.zeros((0, 16), "u1")
        np.savez_compressed(folder / f"codes-{number}.npz", indices=part, frames=frames, codes=flat)


def read_codes(folder: Path) -> dict[int, np.ndarray]:
    """Sentence index -> codes uint8 [frames, 16]."""
    found: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("codes-*.npz")):
        with np.load(path) as part:
            ends = np.cumsum(part["frames"])
            pieces = np.split(part["codes"], ends[:-1])
            found.update(zip(part["indices"].tolist(), pieces, strict=True))
    return found


def write_tokens(path: Path, readings: dict[str, list[np.ndarray]]) -> None:
    """Write ids uint16 of each text, for each way of reading them."""
    arrays: dict[str, np.ndarray] = {}
    for name, ids in readings.items():
        arrays[name] = np.concatenate(ids)
        arrays[f"{name}_lengths"] = np.array([len(one) for one in ids], dtype=np.int32)
    np.savez_compressed(path, **arrays)


def read_tokens(path: Path, name: str) -> list[np.ndarray]:
    """Ids of each text of one reading."""
    with np.load(path) as file:
        return np.split(file[name], np.cumsum(file[f"{name}_lengths"])[:-1])
