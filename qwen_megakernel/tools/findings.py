"""The result of one check of `doctor`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_megakernel.tools.machine import Version

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    detail: str
    fix: str | None = None

    def lines(self) -> str:
        """The result as text for people."""
        line = f"{self.status.upper():<8}{self.name:<12}{self.detail}"
        return f"{line}\n{'':<20}fix: {self.fix}" if self.fix else line


def dotted(version: Version) -> str:
    """A version as text: `13.0` for (13, 0)."""
    return ".".join(map(str, version))
