"""Read the machine code of kernels out of an object file that nvcc made.

nvcc puts a cubin, which is an ELF file of the GPU's own machine type, into the host's object file.
The sections and symbols of that inner file are all that is read here. No disassembler is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"
"""ELF, 64 bits, little endian."""
_EM_CUDA = 190
_SHT_NOBITS = 8
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


class CubinError(RuntimeError):
    """The file holds no machine code that can be read; one line says why."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Sections and symbols of one cubin."""

    sections: dict[str, bytes]
    """Contents by name, such as `.text.KERNEL`. Sections without contents in the file are left out."""
    undefined: tuple[str, ...]
    """Names of the symbols that the cubin uses and does not define, sorted."""

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
    """The cubin in an object file that was compiled for one architecture.

    Raises:
        CubinError: there is none, there are several, or it is compressed.
    """
    data = path.read_bytes()
    starts = list(_cubin_offsets(data))
    if len(starts) != 1:
        raise CubinError(f"{path.name} has {len(starts)} uncompressed cubins, expected 1")
    return _parse(data[starts[0] :])


def _cubin_offsets(data: bytes) -> Iterator[int]:
    start = data.find(_MAGIC)
    while start >= 0:
        if int.from_bytes(data[start + 18 : start + 20], "little") == _EM_CUDA:
            yield start
        start = data.find(_MAGIC, start + 1)


def _parse(elf: bytes) -> Cubin:
    header = _HEADER.unpack_from(elf)
    table, count, names_index = header[6], header[12], header[13]
    headers = [_SECTION.unpack_from(elf, table + i * _SECTION.size) for i in range(count)]

    def content(index: int) -> bytes:
        _, _, _, _, offset, size, *_ = headers[index]
        return elf[offset : offset + size]

    names = content(names_index)
    sections = {
        _string(names, name): content(index)
        for index, (name, kind, *_) in enumerate(headers)
        if kind != _SHT_NOBITS
    }
    strings = sections[".strtab"]
    undefined = {
        _string(strings, name)
        for name, _, _, section, _, _ in _SYMBOL.iter_unpack(sections[".symtab"])
        if section == 0 and name
    }
    return Cubin(sections, tuple(sorted(undefined)))


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
