"""Settings of the frame kernel that `tune` has found faster on a GPU, kept beside the built kernels.

A setting changes the time of a frame and never its codes. Standard library only, so that `doctor` can
read the files.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_megakernel.installation.build_environment import cache_folder

SCHEMA = 1
DEFAULT_L2_SHARE = 0.5
"""The part of L2 for the weights that every pass of the predictor reads again (docs/experiments.md)."""
_PREFIX = "tuning-"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a frame kernel that do not change its codes. None is the default."""

    ring_slots: int | None = None
    """Slots of 4 KB in the weight ring; the sources have the default."""
    l2_share: float | None = None
    """The part of L2, 0 to 1, that shall keep weights of the predictor; default `DEFAULT_L2_SHARE`."""
    grid: int | None = None
    """CTAs of a launch; the default is one on each SM."""

    def __str__(self) -> str:
        names = {
            "ring_slots": f"a ring of {self.ring_slots} slots",
            "l2_share": f"{100 * (self.l2_share or 0):.0f} % of L2",
            "grid": f"{self.grid} CTAs",
        }
        return ", ".join(names[name] for name, value in asdict(self).items() if value is not None) or (
            "the default"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """The GPU, form and kernel to which a tuning belongs. For any other target it says nothing."""

    gpu: str
    """The driver's name for the GPU."""
    sms: int
    arch: str
    form: str
    """`large` or `small`."""
    geometry: str
    """Shape and form of the default build, from `build_tts.geometry_header`."""
    digest: str
    """`build_tts.build_digest` of the default build."""

    @property
    def path(self) -> Path:
        """The file for this GPU, form and shape. All versions of the kernels share it."""
        gpu = re.sub(r"\W+", "-", self.gpu)
        shape = re.findall(r"(?:kHidden|kLayers|kIntermediate|kVocab) = (\d+)", self.geometry)
        return cache_folder() / f"{_PREFIX}{gpu}-{self.form}-{'-'.join(shape)}.json"


@dataclass(frozen=True, slots=True)
class Tuning:
    """A setting that is faster than the default, and by how much."""

    target: Target
    setting: Setting
    ratios: dict[str, tuple[float, float]]
    """By number of streams: the time of a frame over that of the default, and its upper 95 % bound."""

    def __str__(self) -> str:
        gains = (
            f"{100 * (1 - ratio):.1f} % for {streams} stream{'s' * (streams != '1')}"
            for streams, (ratio, _) in self.ratios.items()
        )
        return f"{self.setting}; frames take less by {', '.join(gains)}"

    def save(self) -> Path:
        """Write the file, whole or not at all. Returns its path. Raises `OSError`."""
        path = self.target.path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, **asdict(self)}, file, indent=2)
            os.replace(aside, path)
        except OSError:
            os.unlink(aside)
            raise
        return path


def read(path: Path) -> Tuning:
    """Read a tuning from a file.

    Raises:
        ValueError: the file holds no tuning; one line says why.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema is {content['schema']!r}, expected {SCHEMA}")
        target, setting = Target(**content["target"]), Setting(**content["setting"])
        ratios = {str(n): (float(r), float(bound)) for n, (r, bound) in content["ratios"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not a tuning: {type(error).__name__}: {error}") from None
    _check_whole("ring_slots", setting.ring_slots, 1, 1 << 10)
    _check_whole("grid", setting.grid, 1, target.sms)
    share = setting.l2_share
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        raise ValueError(f"l2_share is {share!r}, expected 0 to 1")
    return Tuning(target, setting, ratios)


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if value is not None and not (type(value) is int and least <= value <= most):
        raise ValueError(f"{name} is {value!r}, expected {least} to {most}")


def find(target: Target, report: Report) -> Tuning | None:
    """The tuning for exactly this target, or None.

    Args:
        target: the kernel that runs, and its GPU.
        report: called with the reason if a tuning exists and is not used.
    """
    path = target.path
    try:
        tuning = read(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        report(f"the tuning {path} is ignored: {error}")
        return None
    for name, ours in asdict(target).items():
        if getattr(tuning.target, name) != ours:
            what = "other kernels" if name in ("digest", "geometry") else f"another {name}"
            report(f"the tuning {path} is ignored: it is of {what}; tune again")
            return None
    return tuning


def kept(gpu: str, folder: Path | None = None) -> list[Path]:
    """Files of tunings for a GPU's name, for any kernel."""
    name = re.sub(r"\W+", "-", gpu)
    return sorted((folder or cache_folder()).glob(f"{_PREFIX}{name}-*.json"))
