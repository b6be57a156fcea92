"""NVRTC, the CUDA compiler that is a library: found, asked for its release, and run.

torch's CUDA wheels bring it. It needs no host compiler and no toolkit. Each compilation has a process of
its own, which runs this file: a crash of the compiler is an error, and compilations run side by side.
Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PIP_CUDA = "13.0"
"""Where torch says no release: that of the version that is pinned."""
USUAL_HOME = Path("/usr/local/cuda")
_HEADER = "cuda_bf16.h"
"""What the sources include of CUDA's own headers; it includes others beside it."""
_RELEASE_LIMIT_S = 60
_PROCESS = (sys.executable, "-I", __file__)


class CompilerError(RuntimeError):
    """The compiler is not there or does not run; one line says why and what helps."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """NVRTC, and the folder of CUDA's headers."""

    library: Path
    headers: Path


def find_compiler() -> Compiler | None:
    """NVRTC and its headers: below CUDA_HOME or CUDA_PATH, else what pip installed into this
    environment, else in the usual place of a toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    pip = _pip_folders()
    places = [
        *([[Path(home)]] if home else []),
        *([folder] for parent in pip for folder in sorted(parent.glob("cu[0-9]*"), reverse=True)),
        [folder for parent in pip for folder in sorted(parent.glob("cuda_*"))],  # of CUDA 12
        [USUAL_HOME],
    ]
    together = (found for folders in places if (found := _find_in(folders)))
    return next(together, None) or _find_in([folder for folders in places for folder in folders])


def _pip_folders() -> list[Path]:
    """Where pip put NVIDIA's libraries: the package `nvidia` may be in several places."""
    return [folder for place in sys.path if place and (folder := Path(place) / "nvidia").is_dir()]


def _find_in(folders: Sequence[Path]) -> Compiler | None:
    """The first library and the first headers in these folders, of each the newest library."""
    libraries = [
        path
        for folder in folders
        for place in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
        for path in sorted((folder / place).glob("libnvrtc.so*"), reverse=True)
        if path.is_file()
    ]
    headers = [folder / "include" for folder in folders if (folder / "include" / _HEADER).is_file()]
    return Compiler(libraries[0], headers[0]) if libraries and headers else None


def pip_command(cuda: str | None) -> str:
    """How pip installs the compiler for torch's release of CUDA, such as `13.0`."""
    return f'pip install "cuda-toolkit[nvrtc,cudart]=={cuda or PIP_CUDA}.*"'


def require_compiler(cuda: str | None) -> Compiler:
    """`find_compiler`, for torch's release of CUDA. Raises `CompilerError` where there is none."""
    found = find_compiler()
    if found is None:
        raise CompilerError(
            "no CUDA compiler is found (libnvrtc.so and cuda_bf16.h in CUDA_HOME, this environment or "
            f"/usr/local/cuda): {pip_command(cuda)}"
        )
    return found


def release_of(compiler: Compiler) -> str:
    """The compiler's release, such as 13.0.88. Raises `CompilerError` where it does not run."""
    try:
        done = subprocess.run(
            _command(compiler), capture_output=True, text=True, timeout=_RELEASE_LIMIT_S, check=False
        )
        said, failed = done.stdout + done.stderr, done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, failed = str(error), True
    match = re.search(r"\bV(\d[\d.]+)", said)
    if failed or match is None:
        why = (said.strip().splitlines() or ["it says nothing"])[-1][:200]
        raise CompilerError(f"{compiler.library} does not run ({why}): reinstall it, or set CUDA_HOME")
    return match[1]


def start(
    compiler: Compiler, source: Path, product: Path, options: Sequence[str], log: Path
) -> subprocess.Popen[bytes]:
    """Begin to compile a source. The process ends with 0 if it has written `product`, a cubin, and
    beside it the PTX with the suffix `.ptx`. What the compiler says goes to `log`."""
    with log.open("w") as file:
        command = [*_command(compiler), str(source), str(product), *options]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _command(compiler: Compiler) -> list[str]:
    return [*_PROCESS, str(compiler.library), f"-I{compiler.headers}"]


# ---------------------------------------------------------------------------- in the process of its own


class _Nvrtc:
    """The functions of the library that are called here."""

    def __init__(self, path: Path) -> None:
        for builtins in sorted(path.resolve().parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # in a wheel it is not looked for there
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *args: object) -> None:
        """Call a function. Raises `CompilerError` with its name and its error."""
        error = getattr(self._library, name)(*args)
        if error:
            text = self._library.nvrtcGetErrorString(error).decode()
            raise CompilerError(f"{name}: {text}")

    def read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """`ProgramLog`, `PTX` or `CUBIN` of a program."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, content)
        return content.raw[: size.value]

    def compile(self, text: bytes, name: str, options: Sequence[str]) -> tuple[ctypes.c_void_p, bool]:
        """A program, and whether it compiles."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), text, name.encode(), 0, None, None)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self.call("nvrtcCompileProgram", program, len(options), given)
        except CompilerError as error:
            print(error)
            return program, False
        return program, True


def _main(library: str, headers: str, *args: str) -> int:
    nvrtc = _Nvrtc(Path(library))
    if not args:
        program, done = nvrtc.compile(f"#include <{_HEADER}>\n".encode(), "release.cu", [headers])
        print(nvrtc.read(program, "PTX" if done else "ProgramLog").rstrip(b"\0").decode())
        return 0 if done else 1
    source, product = Path(args[0]), Path(args[1])
    program, done = nvrtc.compile(source.read_bytes(), source.name, [*args[2:], headers])
    print(nvrtc.read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
    if done:
        product.with_suffix(".ptx").write_bytes(nvrtc.read(program, "PTX").rstrip(b"\0"))
        product.write_bytes(nvrtc.read(program, "CUBIN"))
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(_main(*sys.argv[1:]))
    except (CompilerError, OSError, AttributeError) as problem:
        sys.exit(f"error: {problem}")
