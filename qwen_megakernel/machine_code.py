"""What the compiler made of the kernels, read from what it left beside a library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas reports of one kernel."""

    kernel: str
    registers: int
    spill_bytes: int
    """Stores and loads to local memory for want of registers."""


def resources(product: Path) -> list[Resources]:
    """What ptxas said of the kernels of a built library."""
    found = []
    for log in sorted(product.parent.glob("*.cu.log")):
        for entry in log.read_text().split("Compiling entry function")[1:]:
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            registers = re.search(r"Used (\d+) registers", entry)
            name = entry.split("'")[1]
            if spills and registers:
                found.append(Resources(name, int(registers[1]), int(spills[1]) + int(spills[2])))
    return found
