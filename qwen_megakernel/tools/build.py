"""`python -m qwen_megakernel build`: compile the kernels ahead of time, even without a GPU."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_megakernel.build_tts import (
    ARCHES,
    FORMS,
    KNOWN_ARCHES,
    READ_LIBRARY,
    BuildError,
    Library,
    build,
    codec_library,
    compiler_release,
    detect_arch,
    frame_library,
    require_compiler,
)
from qwen_megakernel.checkpoint import CheckpointError, resolve
from qwen_megakernel.config import ConfigError, ModelConfig
from qwen_megakernel.installation import kept_builds
from qwen_megakernel.installation.build_environment import (
    MIN_CAPABILITY,
    PREBUILT_VARIABLE,
    arch_of,
    cache_folder,
)
from qwen_megakernel.installation.cubin import CubinError
from qwen_megakernel.synth.config import SHAPES, Shape, shape_config
from qwen_megakernel.tools import machine_code
from qwen_megakernel.tools.machine_code import resources

DEFAULT_MODEL = "0.6b"
RELEASED_SHAPES: tuple[Shape, ...] = ("0.6b", "1.7b")


def find_config(model: str) -> ModelConfig:
    """The configuration for a shape's name, a folder, or a Hugging Face id that is in the cache.

    Raises:
        CheckpointError, ConfigError: there is no such configuration.
    """
    if model in SHAPES and not Path(model).exists():
        return shape_config(model)
    return ModelConfig.from_folder(resolve(model, offline=True))


def find_arches(named: list[str] | None) -> list[str]:
    """The architectures to build for: the GPU's own if none is named. Raises `BuildError`."""
    if named:
        return list(dict.fromkeys(named))
    if not torch.cuda.is_available():
        raise BuildError(f"torch finds no CUDA GPU: name one, --arch {' '.join(ARCHES)}")
    return [detect_arch(torch.device("cuda"))]


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """A library to compile, its architecture and its shape."""

    library: Library
    arch: str
    shape: str = "-"
    """The model's shape; `-` if the library does not depend on it, or if the shape has no name."""

    def __str__(self) -> str:
        return f"{self.library.name} sm_{self.arch}" + ("" if self.shape == "-" else f" {self.shape}")


def table_builds() -> list[KernelBuild]:
    """All builds that the table of the machine code covers, in its order.

    The released shapes are built for all architectures, the tiny ones for those that the tests build.
    """
    frames = [
        KernelBuild(frame_library(shape_config(shape), arch), arch, shape)
        for shape in SHAPES
        for arch in (ARCHES if shape in RELEASED_SHAPES else KNOWN_ARCHES)
    ]
    codecs = [KernelBuild(codec_library(arch), arch) for arch in ARCHES]
    reads = [KernelBuild(READ_LIBRARY, arch) for arch in ARCHES]
    return frames + codecs + reads


def released_builds() -> list[KernelBuild]:
    """All kernels of the released shapes."""
    frames = [
        KernelBuild(frame_library(shape_config(shape), arch), arch, shape)
        for shape in RELEASED_SHAPES
        for arch in ARCHES
    ]
    return frames + [KernelBuild(codec_library(arch), arch) for arch in ARCHES]


def build_all(builds: Sequence[KernelBuild], out: Path | None = None) -> list[Path | None]:
    """Build libraries side by side, and print a line about each. A failed one gives None.

    Args:
        builds: the libraries.
        out: a folder for the files that a server needs; None keeps all files in the cache.
    """
    width = max(14, *(len(str(build)) + 2 for build in builds))
    with ThreadPoolExecutor(min(len(builds), os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda one: _build(one, width, out), builds))


def _build(one: KernelBuild, width: int, out: Path | None) -> Path | None:
    started, done = time.monotonic(), threading.Event()

    def tell(line: str) -> None:
        print(f"{one!s:{width}}{time.monotonic() - started:5.1f} s  {line}", flush=True)

    def tick() -> None:
        while not done.wait(10):
            tell("...")

    threading.Thread(target=tick, daemon=True).start()
    try:
        product = build(one.library, one.arch, tell, out)
    except (BuildError, OSError) as error:
        tell(f"failed: {error}")
        return None
    finally:
        done.set()
    tell(f"{product}{_figures(product)}")
    if out is not None:
        kept_builds.strip(product)
    return product


def _figures(product: Path) -> str:
    """The figures that ptxas gave for a build; none if it has been stripped."""
    used = resources(product)
    if not used:
        return ""
    most, spilled = max(r.registers for r in used), sum(r.spill_bytes for r in used)
    return f" ({len(used)} kernels, at most {most} registers, {spilled} bytes of spills)"


def _write_table(builds: Sequence[KernelBuild], products: Sequence[Path]) -> None:
    """Write the table of the machine code, and print how it differs from the earlier one."""
    made = [
        row
        for one, product in zip(builds, products, strict=True)
        for row in machine_code.rows(product, one.shape, one.arch)
    ]
    release = compiler_release(require_compiler())
    differences: list[str] = []
    with suppress(FileNotFoundError, ValueError):  # there is none, or a merge has broken it
        differences = machine_code.parse(machine_code.TABLE.read_text()).differences(made)
    machine_code.TABLE.write_text(machine_code.render(made, release))
    print(f"wrote {machine_code.TABLE}: {len(made)} kernels, NVRTC {release}")
    for line in differences:
        print(f"  {line}")


def _arch(text: str) -> str:
    match = re.fullmatch(r"(?:sm_)?(\d{1,2})(\d)a?", text)
    capability = (int(match[1]), int(match[2])) if match else (0, 0)
    if capability < MIN_CAPABILITY:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected sm_{arch_of(MIN_CAPABILITY)} or newer, such as {' or '.join(ARCHES)}"
        )
    return arch_of(capability)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel build`."""
    parser.add_argument(
        "--arch", nargs="+", type=_arch, metavar="ARCH",
        help="GPU architectures, such as sm_86 sm_120a (default: this machine's GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME",
        help=f"{', '.join(SHAPES)}, a checkpoint on disk, or a Hugging Face id in the cache "
        f"(default: {DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--form", choices=FORMS, default="auto",
        help="of the frame kernel: small has 99 KB, as an RTX 50; a server builds auto (default)",
    )  # fmt: skip
    parser.add_argument(
        "--all", action="store_true",
        help=f"the released shapes ({', '.join(RELEASED_SHAPES)}) for all architectures: "
        + " ".join(ARCHES),
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="put there what a server needs of the kernels; it finds them by "
        f"{PREBUILT_VARIABLE}=DIR, and needs no compiler then (default: the cache)",
    )  # fmt: skip
    parser.add_argument(
        "--table", action="store_true",
        help="for developers: build all shapes for all known architectures, and write "
        "csrc/machine_code.md",
    )  # fmt: skip


def _chosen(args: argparse.Namespace) -> list[KernelBuild]:
    if args.table:
        if args.arch or args.model or args.form != "auto" or args.all or args.out:
            raise BuildError(
                "--table covers all shapes and architectures: "
                "leave out --arch, --model, --form, --all and --out"
            )
        return table_builds()
    if args.all:
        if args.arch or args.model or args.form != "auto":
            raise BuildError("--all names architectures and shapes: leave out --arch, --model, --form")
        return released_builds()
    config, arches = find_config(args.model or DEFAULT_MODEL), find_arches(args.arch)
    return [
        KernelBuild(library, arch)
        for arch in arches
        for library in (frame_library(config, arch, args.form), codec_library(arch, args.form))
    ]


def run(args: argparse.Namespace) -> int:
    """Build. Returns 1 if a build failed."""
    try:
        builds = _chosen(args)
        what = "all shapes" if args.table or args.all else args.model or DEFAULT_MODEL
        print(f"kernels of {what} go to {args.out or cache_folder()}", flush=True)
        products = build_all(builds, args.out)
        built = [product for product in products if product]
        if args.table and len(built) == len(builds):
            _write_table(builds, built)
    except (BuildError, CheckpointError, ConfigError, CubinError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = len(builds) - len(built)
    if failed:
        print(f"error: {failed} of {len(builds)} could not be built", file=sys.stderr)
    return 1 if failed else 0
