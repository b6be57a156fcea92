"""The training material on disk: the sentences' tokens, and the codes of their speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor


def write_codes(folder: Path, codes: dict[int, Tensor]) -> None:
    """Write sentence index -> codes uint8 [frames, 16] as a new `codes-NUMBER.npz`.

    The number is that of its first sentence. A process that reads meanwhile sees the whole file or none.
    """
    indices = np.array(sorted(codes), dtype=np.int32)
    frames = np.array([len(codes[i]) for i in indices], dtype=np.int32)
    partial = folder / f"codes-{indices[0]:06d}.partial"
    with partial.open("wb") as file:
        flat = np.concatenate([codes[i].numpy() for i in indices])
        np.savez(file, indices=indices, frames=frames, codes=flat)
    partial.rename(partial.with_suffix(".npz"))


class Codes:
    """The codes of a folder, as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[Path] = set()

    def take(self) -> dict[int, np.ndarray]:
        """Sentence index -> codes uint8 [frames, 16], for codes that are new since the last call."""
        found: dict[int, np.ndarray] = {}
        for path in sorted(set(self._folder.glob("codes-*.npz")) - self._taken):
            self._taken.add(path)
            with np.load(path) as file:
                pieces = np.split(file["codes"], np.cumsum(file["frames"])[:-1])
                found.update(zip(file["indices"].tolist(), pieces, strict=True))
        return found


def write_tokens(path: Path, readings: dict[str, list[np.ndarray]]) -> None:
    """Write the token ids, uint16, of each text in each reading."""
    arrays: dict[str, np.ndarray] = {}
    for name, ids in readings.items():
        arrays[name] = np.concatenate(ids)
        arrays[f"{name}_lengths"] = np.array([len(one) for one in ids], dtype=np.int32)
    np.savez_compressed(path, **arrays)


def read_tokens(path: Path, name: str) -> list[np.ndarray]:
    """The token ids of each text in one reading."""
    with np.load(path) as file:
        return np.split(file[name], np.cumsum(file[f"{name}_lengths"])[:-1])
