"""Read a cubin, the file of a GPU's machine code that the CUDA compiler makes.

It is an ELF file of the GPU's own machine type. Its sections and symbols are all that is read here. No
disassembler and no GPU is needed. Standard library only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"
"""ELF, 64 bits, little endian."""
_EM_CUDA = 190
_SHT_NOBITS = 8
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_FACT = "fact_"


class CubinError(RuntimeError):
    """The file holds no machine code that can be read; one line says why."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Sections and symbols of one cubin."""

    sections: dict[str, bytes]
    """Contents by name, such as `.text.KERNEL`. Sections without contents in the file are left out."""
    undefined: tuple[str, ...]
    """Names of the symbols that the cubin uses and does not define, sorted."""
    values: dict[str, bytes]
    """What each symbol begins with, by its name: the initial value of a variable."""

    @property
    def functions(self) -> list[str]:
        """Names of kernels, and of functions that have a section of their own."""
        return [name.removeprefix(".text.") for name in self.sections if name.startswith(".text.")]

    @property
    def facts(self) -> dict[str, int]:
        """What csrc/facts.cuh declares, by name."""
        return {
            name.removeprefix(_FACT): int.from_bytes(value, "little", signed=True)
            for name, value in self.values.items()
            if name.startswith(_FACT)
        }

    def text(self, name: str) -> str:
        """A string's value. Raises `CubinError` where there is none."""
        try:
            return self.values[name].rstrip(b"\0").decode()
        except KeyError:
            raise CubinError(f"the cubin has no {name}") from None

    def code(self, function: str) -> bytes:
        """The instructions of a kernel, or of a function that has a section of its own.

        Raises:
            CubinError: there is no such function.
        """
        try:
            return self.sections[f".text.{function}"]
        except KeyError:
            raise CubinError(f"the cubin has no function {function}") from None

    def constants(self, function: str) -> bytes:
        """The constant banks of a kernel: room for its parameters, tables of jumps, literals."""
        return b"".join(
            content
            for name, content in sorted(self.sections.items())
            if name.startswith(".nv.constant")
            and name.partition(".nv.constant")[2].endswith(f".{function}")
        )


def read_cubin(path: Path) -> Cubin:
    """A cubin's sections and symbols.

    Raises:
        CubinError: it is no cubin.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if data[:6] != _MAGIC or int.from_bytes(data[18:20], "little") != _EM_CUDA:
        raise CubinError(f"{path} is no cubin")
    try:
        return _parse(data)
    except (struct.error, KeyError, ValueError, IndexError):
        raise CubinError(f"{path} is no whole cubin") from None


def _parse(elf: bytes) -> Cubin:
    header = _HEADER.unpack_from(elf)
    table, count, names_index = header[6], header[12], header[13]
    headers = [_SECTION.unpack_from(elf, table + i * _SECTION.size) for i in range(count)]

    def content(index: int) -> bytes:
        _, kind, _, _, offset, size, *_ = headers[index]
        return bytes(size) if kind == _SHT_NOBITS else elf[offset : offset + size]

    names = content(names_index)
    named = [_string(names, name) for name, *_ in headers]
    strings, symbols = content(named.index(".strtab")), content(named.index(".symtab"))
    undefined, values = set(), {}
    for name, _, _, section, at, size in _SYMBOL.iter_unpack(symbols):
        if section == 0 and name:
            undefined.add(_string(strings, name))
        elif size and section < count and named[section].startswith(".nv.global"):
            values[_string(strings, name)] = content(section)[at : at + size]
    sections = {
        name: content(index)
        for index, (name, (_, kind, *_)) in enumerate(zip(named, headers, strict=True))
        if kind != _SHT_NOBITS
    }
    return Cubin(sections, tuple(sorted(undefined)), values)


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
