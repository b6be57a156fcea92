"""The training material on disk: the sentences' tokens, and the codes of their speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

_FRAMES_A_FILE = 800_000


def write_codes(folder: Path, codes: dict[int, Tensor]) -> None:
    """Write sentence index -> codes uint8 [frames, 16] as `codes-0.npz`, `codes-1.npz`, ...

    Several files, since a repository or a mail takes no large one; what is left of earlier ones is
    removed.
    """
    for old in folder.glob("codes-*.npz"):
        old.unlink()
    groups: list[list[int]] = [[]]
    held = 0
    for index in sorted(codes):
        if held + len(codes[index]) > _FRAMES_A_FILE:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += len(codes[index])
    for number, indices in enumerate(groups):
        frames = np.array([len(codes[i]) for i in indices], dtype=np.int32)
        flat = np.concatenate([codes[i].numpy() for i in indices])
        path = folder / f"codes-{number}.npz"
        np.savez_compressed(path, indices=np.array(indices, dtype=np.int32), frames=frames, codes=flat)


def read_codes(folder: Path) -> dict[int, np.ndarray]:
    """Sentence index -> codes uint8 [frames, 16]; raises `FileNotFoundError` if there are none."""
    found: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("codes-*.npz")):
        with np.load(path) as file:
            pieces = np.split(file["codes"], np.cumsum(file["frames"])[:-1])
            found.update(zip(file["indices"].tolist(), pieces, strict=True))
    if not found:
        raise FileNotFoundError(f"{folder}: no codes-*.npz; run training.train_codec first")
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
