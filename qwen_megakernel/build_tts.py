"""Compile the CUDA kernels for one checkpoint shape and one GPU.

The kernel's shapes are compile-time constants from `config.json`. So a build belongs to a geometry,
an architecture, the sources and the compiler, and to no version of torch, Python or Linux. A hash of
them names it in the cache, and a change of any makes another build. A build is made in a temporary
folder and renamed, under a lock that the operating system releases when the process dies. A checksum
beside it tells a damaged build, which is made anew. A folder of prebuilt kernels is looked into before
the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_megakernel.config import NUM_CONTROL_CODES, ModelConfig, TransformerConfig
from qwen_megakernel.installation import kept_builds, nvrtc
from qwen_megakernel.installation.build_environment import (
    ARCH_VARIABLE,
    MIN_CAPABILITY,
    arch_of,
    cache_folder,
    named_arch,
    prebuilt_folder,
)
from qwen_megakernel.installation.bundled import bundled_folder

SOURCES = bundled_folder("csrc")
ARCHES = ("80", "86", "89", "90a", "100a", "120a", "121a")
"""The architectures in the table of the machine code, and in a folder of all kernels."""
KNOWN_ARCHES = ("86", "90a", "120a")
"""The architectures that the tests build and check for spills. Others are built the same way."""
_SMALL_BYTES = 101_376
_SHARED_BYTES = {
    80: 166_912, 86: _SMALL_BYTES, 87: 166_912, 89: _SMALL_BYTES, 90: 232_448, 100: 232_448,
    103: 232_448, 120: _SMALL_BYTES, 121: _SMALL_BYTES,
}  # fmt: skip
"""Shared memory that a CTA may have, by architecture (CUDA C++ Programming Guide, table of limits)."""
_RESERVED_BYTES = 1024
"""Shared memory that an SM reserves for each CTA: it has so much more than a CTA may use."""
FORMS = ("auto", "large", "small")
"""Forms of the kernels. `small` fits into the 99 KB of shared memory of an RTX 30, 40 or 50. `large`
needs the shared memory of a data centre's GPU. `auto` is the one that fits. All give the same codes and
samples."""

Progress = Callable[[str], None]


class BuildError(RuntimeError):
    """The kernel cannot be built here. One line says why, and what helps."""


@dataclass(frozen=True, slots=True)
class Library:
    """What one build makes: a source, compiled to a cubin with all that it includes."""

    name: str
    source: str
    """A file of csrc/."""
    header: str
    """Content of `geometry.h`."""


def codec_library(arch: str, form: str = "auto") -> Library:
    """The codec's kernels. One build serves every checkpoint: shapes are parameters of the launches.

    Args:
        arch: `86`, `90a`, `120a`, ...
        form: one of `FORMS`. It decides for how much shared memory of an SM the tiles are cut. The
            samples do not depend on it.

    Raises:
        BuildError: the architecture has too little shared memory for the form.
    """
    sm_bytes = shared_bytes(arch, form) + _RESERVED_BYTES
    header = f"#pragma once\nnamespace codec {{\nconstexpr int kSmSharedBytes = {sm_bytes};\n}}\n"
    return Library("codec", "codec_kernels.cu", header)


READ_LIBRARY = Library("read", "read_floor.cu", header="")
"""A plain streaming read, the floor that the bench compares a frame with."""


def frame_library(
    config: ModelConfig, arch: str, form: str = "auto", ring_slots: int | None = None
) -> Library:
    """The frame kernel for a checkpoint's shape.

    Args:
        config: the shape.
        arch: `86`, `90a`, `120a`, ...
        form: one of `FORMS`.
        ring_slots: slots of the weight ring, at most as many as fit; None is the sources' default.

    Raises:
        BuildError: the kernel's tiles cannot cover the shape, or the architecture has too little
            shared memory for the form.
    """
    header = geometry_header(config, shared_bytes(arch, form))
    if ring_slots is not None:
        header += f"#define QWEN_TTS_RING_SLOTS {ring_slots}\n"
    return _frame_library(header)


def _frame_library(header: str) -> Library:
    return Library("frame", "kernel_tts.cu", header)


def geometry_header(config: ModelConfig, num_shared_bytes: int) -> str:
    """`geometry.h`: the shapes of talker and predictor, and the shared memory that a CTA may use.

    Raises:
        BuildError: the kernel's tiles cannot cover the shape.
    """

    def dims(name: str, c: TransformerConfig) -> str:
        _check_dims(name, c)
        return (
            f"struct {name} {{\n  static constexpr int kHidden = {c.hidden_size}, "
            f"kIntermediate = {c.intermediate_size}, kLayers = {c.num_layers}, kHeads = {c.num_heads}, "
            f"kKvHeads = {c.num_kv_heads}, kHeadDim = {c.head_dim}, kVocab = {c.vocab_size};\n"
            f"  static constexpr float kEps = {c.rms_norm_eps}f;\n}};\n"
        )

    return (
        "#pragma once\nnamespace qwen_tts {\n"
        + dims("TalkerDims", config.talker)
        + dims("PredictorDims", config.predictor)
        + f"constexpr int kNumControlCodes = {NUM_CONTROL_CODES}, "
        f"kEosCode = {config.talker.codec_eos_id}, kSharedBytes = {num_shared_bytes};\n"
        "}  // namespace qwen_tts\n"
    )


def _check_dims(name: str, c: TransformerConfig) -> None:
    if c.head_dim not in (64, 128):
        raise BuildError(f"{name}: head_dim is {c.head_dim}, the kernel knows 64 and 128")
    rows = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
    }
    for field, value in rows.items():
        if value % 32:
            raise BuildError(f"{name}: {field} is {value}, the kernel needs a multiple of 32")


def shared_bytes(arch: str, form: str = "auto") -> int:
    """Shared memory that a CTA of a form may use on an architecture such as `90a`, in bytes.

    Raises:
        BuildError: there is no such form, or the architecture has too little shared memory for it.
    """
    if form not in FORMS:
        raise BuildError(f"form is {form!r}, allowed: {', '.join(FORMS)}")
    most = _SHARED_BYTES.get(int(arch.rstrip("af")), _SMALL_BYTES)
    if form == "large" and most <= _SMALL_BYTES:
        raise BuildError(f"sm_{arch} has {most} bytes of shared memory, too little for the large form")
    return _SMALL_BYTES if form == "small" else most


def form_of(arch: str, form: str = "auto") -> str:
    """`large` or `small`: the form that a name of `FORMS` means on `arch`. Raises `BuildError`."""
    return "small" if shared_bytes(arch, form) == _SMALL_BYTES else "large"


def detect_arch(device: torch.device) -> str:
    """The architecture whose kernels a GPU runs, such as `86` or `90a`: its own, or `named_arch`.

    Raises:
        BuildError: the GPU is too old, or does not run the named architecture.
    """
    capability = torch.cuda.get_device_capability(device)
    own = arch_of(capability)
    if capability < MIN_CAPABILITY:
        raise BuildError(
            f"{torch.cuda.get_device_name(device)} is sm_{own}, the kernels need "
            f"sm_{arch_of(MIN_CAPABILITY)} or newer (Ampere, Ada, Hopper, Blackwell)"
        )
    named = named_arch()
    if named is None or named == own:
        return own
    older = [arch for arch in ARCHES if has_ptx(arch) and int(arch) < int(own.rstrip("a"))]
    if named not in older:
        allowed = f"{', '.join(older)} or {own}" if older else own
        raise BuildError(f"{ARCH_VARIABLE} is {named!r}, allowed on this GPU: {allowed}")
    return named


def has_ptx(arch: str) -> bool:
    """Whether kernels of an architecture have PTX, which newer GPUs run. Its name then has no `a`."""
    return not arch.endswith("a")


def require_compiler() -> nvrtc.Compiler:
    """The CUDA compiler. Raises `BuildError` where there is none."""
    try:
        return nvrtc.require_compiler(torch.version.cuda)
    except nvrtc.CompilerError as error:
        raise BuildError(str(error)) from None


def build(
    library: Library, arch: str, progress: Progress | None = None, out: Path | None = None
) -> Path:
    """Find a library among the prebuilt ones or in the cache, or compile it.

    Args:
        library: the library to build.
        arch: `86`, `90a`, `120a`, ...
        progress: called with a line for each step.
        out: the folder for it; None is `prebuilt_folder` if the library is there, else the cache.

    Returns:
        The cubin's path. Where `has_ptx`, its PTX lies beside it (`kept_builds.ptx_of`).

    Raises:
        BuildError: the system is not Linux, there is no compiler, or the compiler has failed.
        OSError: the cache cannot be written.
    """
    if not kept_builds.CAN_LOCK:
        raise BuildError(
            "the kernels are built on Linux only (on Windows: in WSL 2); --backend torch works here"
        )
    report = progress or (lambda line: None)
    stem = f"{library.name}-sm_{arch}-{build_digest(library, arch)}"
    if out is None and (found := _find_prebuilt(library, arch, stem, report)):
        return found
    out = out or cache_folder()
    try:
        compiler = require_compiler()
    except BuildError as error:
        kept = kept_builds.find(out, stem, library.name)
        if whole := [product for product in kept if kept_builds.is_whole(product)]:
            return whole[-1]  # only a new build needs a compiler
        if kept:
            raise BuildError(f"{kept[-1]} is damaged, and {error}") from None
        raise
    folder = out / f"{stem}-nvrtc{compiler_release(compiler)}"
    product = folder / f"{library.name}.cubin"
    if kept_builds.is_whole(product):
        return product
    folder.parent.mkdir(parents=True, exist_ok=True)
    with kept_builds.locked(folder.parent / f"{folder.name}.lock", report):
        if kept_builds.is_whole(product):  # another process was faster
            return product
        if product.exists():
            report(f"{product} is damaged")
        report(f"compiling the {library.name} kernel for sm_{arch} (once, about a minute)")
        prefix = f"building-{folder.name}-"
        for left in folder.parent.glob(f"{prefix}*"):  # of a killed build: this process has its lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as aside:
            _compile(library, arch, compiler, Path(aside))
            kept_builds.seal(Path(aside) / product.name, build_facts(library, arch))
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
            Path(aside).mkdir()  # for TemporaryDirectory to remove
    return product


def _find_prebuilt(library: Library, arch: str, stem: str, report: Progress) -> Path | None:
    """The prebuilt library, or None. `report` gets the reason if the folder's does not fit."""
    folder = prebuilt_folder()
    if folder is None:
        return None
    if whole := [
        product
        for product in kept_builds.find(folder, stem, library.name)
        if kept_builds.is_whole(product)
    ]:
        return whole[-1]
    here = build_facts(library, arch)
    why = f"there is none for sm_{arch} and this model shape"
    for path in sorted(folder.glob(f"{library.name}-sm_{arch}-*/{kept_builds.FACTS}")):
        facts = json.loads(path.read_text())
        if facts.get("geometry") != here["geometry"]:
            continue
        other = [name for name in here if facts.get(name) != here[name]]
        why = f"it has other {' and '.join(other)}" if other else f"it is damaged: {path.parent}"
    report(f"the {library.name} kernel in {folder} is not used: {why}")
    return None


def build_facts(library: Library, arch: str) -> dict[str, str]:
    """What tells builds apart, but for the compiler's release."""
    sources = [text for path in _sources(library) for text in (path.name, path.read_text())]
    return {
        "geometry": _digest(library.header),
        "sources": _digest("\0".join(sources)),
        "flags": " ".join(_flags(arch)),
    }


def build_digest(library: Library, arch: str) -> str:
    """A hash of `build_facts`."""
    return _digest(json.dumps(build_facts(library, arch), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def frame_digest(geometry: str, arch: str) -> str:
    """`build_digest` of the frame kernel with this `geometry.h`."""
    return build_digest(_frame_library(geometry), arch)


def _sources(library: Library) -> list[Path]:
    """The library's files and the project's files that they include, in a fixed order."""
    found: dict[str, Path] = {}
    waiting = [library.source]
    while waiting:
        name = waiting.pop()
        path = SOURCES / name
        if name not in found and path.is_file():  # geometry.h is the library's header
            found[name] = path
            waiting += re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return [found[name] for name in sorted(found)]


def compiler_release(compiler: nvrtc.Compiler) -> str:
    """The compiler's release, such as 13.0.88. Raises `BuildError` where it does not run."""
    try:
        return nvrtc.release_of(compiler)
    except nvrtc.CompilerError as error:
        raise BuildError(str(error)) from None


def _flags(arch: str) -> list[str]:
    return [f"--gpu-architecture=sm_{arch}", "-std=c++17", "-lineinfo", "--ptxas-options=-v"]


def _compile(library: Library, arch: str, compiler: nvrtc.Compiler, folder: Path) -> None:
    """Leave cubin and, where `has_ptx`, PTX in `folder`, and a log of what the compiler said."""
    (folder / "geometry.h").write_text(library.header)
    product, log = folder / f"{library.name}.cubin", folder / f"{library.source}.log"
    options = [*_flags(arch), f"-I{folder}", f"-I{SOURCES}"]
    process = nvrtc.start(compiler, SOURCES / library.source, product, options, log)
    if process.wait():
        said = log.read_text(errors="replace")
        if shutil.disk_usage(folder).free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise BuildError(f"the kernel does not compile: {library.source}: {_first_error(said)}")
    if not has_ptx(arch):
        kept_builds.ptx_of(product).unlink()


def _first_error(output: str) -> str:
    words = ("error:", "fatal", "cannot")
    lines = [line for line in output.splitlines() if any(word in line.lower() for word in words)]
    return (lines or output.splitlines() or ["the compiler said nothing"])[0][:400]
