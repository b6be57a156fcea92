"""Figures of the kernels' machine code, and the table that keeps them.

`csrc/machine_code.md` has a row for each kernel, shape and architecture. A test compares it with a fresh
build, so that no change of the machine code goes unnoticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qwen_megakernel.installation.bundled import bundled_folder
from qwen_megakernel.installation.cubin import CubinError, read_cubin

TABLE = bundled_folder("csrc") / "machine_code.md"
UPDATE_COMMAND = "python -m qwen_megakernel build --table"
INSTRUCTION_BYTES = 16
"""Bytes of an instruction on every architecture since sm_70."""
DIGEST_DIGITS = 12
_KEY_COLUMNS = 4
_RELEASE = re.compile(r"^Compiler: NVRTC ([\d.]+)$", re.MULTILINE)
_HEAD = """# Machine code of the kernels

`{command}` writes this file, and the tests compare it with a
fresh build. A difference means that the GPU runs other instructions than before. Commit the new table
together with the change that caused it.

The figures belong to one release of the compiler. With another release the tests skip the comparison.

Compiler: NVRTC {release}

- registers: of a thread, as ptxas reports them. `setmaxnreg` changes them while the frame kernel runs.
- spills: bytes of stores to local memory plus bytes of loads from it, for want of registers.
- static shared: bytes of shared memory that the kernel declares, without the 1024 that CUDA reserves.
- dynamic shared: bytes that a launch asks for. `-` means none, or a number that depends on the launch.
- instructions: the size of the kernel's code, divided by 16 bytes. Functions that are not inlined count,
  and so does the padding at the end.
- digest: the first 12 hexadecimal digits of the SHA-256 of the code and of the kernel's constant banks.
  It does not depend on paths, comments, line numbers or the time of the build.

"""


# ---------------------------------------------------------------------------- the figures of a build


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that ptxas reports for one kernel."""

    kernel: str
    registers: int
    spill_bytes: int
    """Bytes stored to and loaded from local memory because registers are short."""
    static_shared_bytes: int
    """Bytes of shared memory that the kernel declares."""


def resources(product: Path) -> list[Resources]:
    """The report of ptxas on the kernels of a built library, and on the functions that they call."""
    found = []
    for log in sorted(product.parent.glob("*.cu.log")):
        for entry in log.read_text().split("Compiling entry function")[1:]:
            # A function that is not inlined has its own line of spills.
            spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            used = re.search(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?", entry)
            if spills and used:
                spilled = sum(int(stores) + int(loads) for stores, loads in spills)
                found.append(Resources(entry.split("'")[1], int(used[1]), spilled, int(used[2] or 0)))
    return found


def system_calls(product: Path) -> list[str]:
    """Instructions of a built library that ptxas has replaced by calls of routines in the driver.

    Raises:
        CubinError: it is no cubin.
    """
    return sorted(name for name in read_cubin(product).undefined if name.startswith("__cuda_syscall"))


# ---------------------------------------------------------------------------- rows of the table


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel of one build. The first four fields name it."""

    library: str
    shape: str
    """The model's shape; `-` if the library does not depend on it."""
    arch: str
    kernel: str
    registers: int
    spills: int
    static_shared: int
    dynamic_shared: int | None
    instructions: int
    digest: str

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        return tuple("-" if value is None else str(value) for value in asdict(self).values())


COLUMNS = tuple(name.replace("_", " ") for name in Row.__dataclass_fields__)


def rows(product: Path, shape: str, arch: str) -> list[Row]:
    """The table's rows for a built library, in the order of its kernels' names.

    Args:
        product: the library's path, from `build`.
        shape: the model's shape, or `-`.
        arch: such as `90a`.

    Raises:
        CubinError: it is no cubin, or the compiler's log does not name its kernels.
    """
    cubin = read_cubin(product)
    used = {kernel.kernel: kernel for kernel in resources(product)}
    if used.keys() != set(cubin.functions):
        odd = ", ".join(sorted(used.keys() ^ set(cubin.functions)))
        raise CubinError(f"{product}: only one of ptxas's log and the machine code has {odd}")
    made = []
    for name, kernel in used.items():
        code = cubin.code(name)
        digest = hashlib.sha256(code + cubin.constants(name)).hexdigest()[:DIGEST_DIGITS]
        made.append(
            Row(
                product.stem, shape, f"sm_{arch}", name, kernel.registers,
                kernel.spill_bytes, kernel.static_shared_bytes, cubin.facts.get(f"{name}_shared_bytes"),
                len(code) // INSTRUCTION_BYTES, digest,
            )
        )  # fmt: skip
    return sorted(made, key=lambda row: _natural(row.kernel))


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------------------- the table


def render(made: Sequence[Row], release: str) -> str:
    """The file's text: an introduction, the compiler's release, and the rows, padded to columns."""
    quoted = [replace(row, kernel=f"`{row.kernel}`") for row in made]  # `<` begins a tag in Markdown
    lines = [COLUMNS, *(row.cells() for row in quoted)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    padded = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    head = _HEAD.format(command=UPDATE_COMMAND, release=release)
    return head + "\n".join([padded[0], rule, *padded[1:]]) + "\n"


@dataclass(frozen=True, slots=True)
class Table:
    """The table in the file."""

    release: str
    """The compiler's release, such as 13.0.88."""
    rows: tuple[tuple[str, ...], ...]
    """The rows' cells, as in `Row.cells`."""

    def builds(self) -> set[tuple[str, ...]]:
        """Library, shape and architecture of every build that has rows."""
        return {cells[: _KEY_COLUMNS - 1] for cells in self.rows}

    def differences(self, made: Sequence[Row]) -> list[str]:
        """How a build's rows differ from the table's, a line for each kernel; empty if they agree."""
        new = {row.cells()[:_KEY_COLUMNS]: row.cells()[_KEY_COLUMNS:] for row in made}
        builds = {key[:-1] for key in new}
        old = {
            cells[:_KEY_COLUMNS]: cells[_KEY_COLUMNS:]
            for cells in self.rows
            if cells[: _KEY_COLUMNS - 1] in builds
        }
        return list(_differences(old, new))


def _differences(
    old: dict[tuple[str, ...], tuple[str, ...]], new: dict[tuple[str, ...], tuple[str, ...]]
) -> Iterator[str]:
    for key in old | new:
        name = " ".join(key)
        if key not in new:
            yield f"{name}: in the table, not in the build"
        elif key not in old:
            yield f"{name}: in the build, not in the table"
        elif old[key] != new[key]:
            changes = zip(COLUMNS[_KEY_COLUMNS:], old[key], new[key], strict=True)
            yield f"{name}: " + ", ".join(f"{c} {a} -> {b}" for c, a, b in changes if a != b)


def parse(text: str) -> Table:
    """Parse the text of `render`.

    Raises:
        ValueError: the text has no compiler's release, or other columns.
    """
    release = _RELEASE.search(text)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    header, *cells = (tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines)
    if release is None or header != COLUMNS or any(len(row) != len(COLUMNS) for row in cells):
        raise ValueError(f"not a table of the machine code: write it anew with {UPDATE_COMMAND}")
    return Table(release[1], tuple(cells))
