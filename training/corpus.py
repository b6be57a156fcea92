"""The training material on disk: the sentences' tokens, and the codes of their speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor


def write_codes(path: Path, codes: dict[int, Tensor]) -> None:
    """Write sentence index -> codes uint8 [frames, 16]; at least one sentence."""
    indices = sorted(codes)
    frames = np.array([len(codes[i]) for i in indices], dtype=np.int32)
    flat = np.concatenate([codes[i].numpy() for i in indices])
    np.savez_compressed(path, indices=np.array(indices, dtype=np.int32), frames=frames, codes=flat)


def read_codes(path: Path) -> dict[int, np.ndarray]:
    """Sentence index -> codes uint8 [frames, 16]."""
    with np.load(path) as file:
        pieces = np.split(file["codes"], np.cumsum(file["frames"])[:-1])
        return dict(zip(file["indices"].tolist(), pieces, strict=True))


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
