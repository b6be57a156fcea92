"""Kernels compiled without a GPU: their registers and shared memory, and a cache that is shared."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from live_server import ROOT
from slow_cases import slow_after
from warm_process import WarmProcess

from qwen_megakernel import build_tts
from qwen_megakernel.build_tts import (
    KNOWN_ARCHES,
    READ_LIBRARY,
    BuildError,
    Library,
    build,
    build_facts,
    frame_library,
)
from qwen_megakernel.installation import kept_builds, nvrtc
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.synth.config import shape_config
from qwen_megakernel.tools.machine_code import resources, system_calls

SMALL_BYTES = 99 * 1024
"""Shared memory that a CTA may have on an RTX 30, 40 or 50."""
NARROW = "frame_kernel_narrow"
"""The frame kernel for up to eight streams."""
MOST_NARROW_SPILLS = {"86": 16}
"""Bytes of the kernel for up to eight streams: two registers, spilled once in a frame's pass."""
MOST_WIDE_SPILLS = 2048
"""Bytes of the kernel for up to 32 streams; csrc/machine_code.md has those of each GPU."""
SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= %s; }\n'

if find_compiler() is None:
    pytestmark = pytest.mark.skip(reason="no CUDA compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("arch", KNOWN_ARCHES)
def test_the_frame_kernel_fits_the_gpu(arch, shared_builds, report):
    """As a server builds it; the table of the machine code has the other shapes."""
    started = time.monotonic()
    product = build(frame_library(shape_config("0.6b"), arch), arch)
    lasted = time.monotonic() - started
    used = resources(product)
    (narrow,) = (kernel for kernel in used if kernel.kernel == NARROW)
    (wide,) = (kernel for kernel in used if kernel.kernel != NARROW)
    facts = read_cubin(product).facts
    shared = max(facts[f"frame_kernel_{name}_shared_bytes"] for name in ("narrow", "wide"))
    report(
        f"0.6b, sm_{arch}: {narrow.registers} and {wide.registers} registers, {narrow.spill_bytes} and "
        f"{wide.spill_bytes} bytes of spills, {shared} bytes of shared memory, in {lasted:.0f} s"
    )
    assert shared <= (227 * 1024 if arch == "90a" else SMALL_BYTES)
    assert narrow.spill_bytes <= MOST_NARROW_SPILLS.get(arch, 0)
    assert wide.spill_bytes <= MOST_WIDE_SPILLS
    assert system_calls(product) == []
    assert "Performance Loss" not in (product.parent / "kernel_tts.cu.log").read_text()


@pytest.mark.slow
def test_kernels_are_compiled_where_there_is_no_nvcc_and_no_host_compiler(tmp_path):
    """PATH is an empty folder; tests/bare_environment.sh does the same in an environment of its own."""
    (tmp_path / "empty").mkdir()
    environ = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    if home := os.environ.get("CUDA_HOME"):  # NVRTC is not in this environment
        environ["CUDA_HOME"] = home
    command = [sys.executable, "-m", "qwen_megakernel", "build", "--model", "tiny", "--arch", "sm_120a"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "kernels")],
        cwd=Path(__file__).parents[1], env=environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.stem: read_cubin(path) for path in (tmp_path / "kernels").glob("*/*.cubin")}
    assert sorted(made["frame"].functions) == ["frame_kernel_narrow", "frame_kernel_wide"]
    assert len(made["codec"].functions) == 17


@pytest.mark.parametrize("arch", KNOWN_ARCHES)
def test_the_bench_s_read_compiles_without_spills(arch, shared_builds):
    product = build(READ_LIBRARY, arch)
    (kernel,) = resources(product)
    assert kernel.spill_bytes == 0
    assert read_cubin(product).functions == ["read_kernel"]


# ---------------------------------------------------------------------------- the cache


LIBRARY = Library("twice", "twice.cu", header="")
"""It compiles in a second or two."""


def write_sources(folder: Path) -> Path:
    folder.mkdir()
    (folder / "twice.cu").write_text(SOURCE % "2.f")
    return folder


@pytest.fixture
def library(tmp_path, monkeypatch) -> Library:
    """With sources that the test may change."""
    monkeypatch.setattr(build_tts, "SOURCES", write_sources(tmp_path / "csrc"))
    return LIBRARY


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache with a build of the library for sm_90a."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tts, "SOURCES", write_sources(folder / "csrc"))
        build(LIBRARY, "90a", out=folder / "cache")
    return folder / "cache"


@pytest.fixture
def full_cache(built, cache) -> Path:
    """With that build, which the test may damage."""
    return shutil.copytree(built, cache)


CHILD = """
import sys
from pathlib import Path
from qwen_megakernel import build_tts
build_tts.SOURCES = Path(sys.argv[1])
library = build_tts.Library("twice", "twice.cu", header="")
print(build_tts.build(library, "90a", lambda line: print(line, flush=True)), flush=True)
"""


def start_build() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(build_tts.SOURCES)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_what_was_built_is_found_again_at_once(library, cache):
    lines = []
    product = build(library, "90a", lines.append)
    assert build(library, "90a", lines.append) == product
    assert lines == ["compiling the twice kernel for sm_90a (once, about a minute)"]
    assert [kernel.kernel for kernel in resources(product)] == ["twice"]


def test_other_sources_and_other_gpus_are_other_builds(library, cache):
    products = {build(library, "90a"), build(library, "120a")}
    (build_tts.SOURCES / "twice.cu").write_text(SOURCE % "3.f")
    products.add(build(library, "90a"))
    (build_tts.SOURCES / "other.cuh").write_text("// nothing that it includes\n")
    products.add(build(library, "90a"))
    assert len(products) == 3
    assert all(product.is_file() for product in products)


@pytest.mark.slow
def test_a_build_that_was_killed_is_made_anew(library, cache):
    child = start_build()
    assert child.stdout.readline().startswith("compiling")
    os.kill(child.pid, signal.SIGKILL)  # its compiler goes on, as after an out-of-memory kill
    child.wait(60)
    assert not list(cache.glob("twice-*/twice.cubin"))
    lines = []
    assert build(library, "90a", lines.append).is_file()
    assert len(lines) == 1
    assert lines[0].startswith("compiling")  # it did not wait for anybody
    assert [path.name for path in cache.iterdir() if path.name.startswith("building-")] == []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def test_two_that_build_at_a_time_compile_once(library, cache):
    start = partial(WarmProcess, program=CHILD, environ=os.environ, cwd=ROOT)
    children = [start(ROOT, [str(build_tts.SOURCES)]) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0] * 3
    outputs = [child.stdout.read().splitlines() for child in children]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(line.startswith("compiling") for lines in outputs for line in lines) == 1
    assert [path.name for path in cache.iterdir() if path.name.startswith("building-")] == []


def test_what_the_compiler_says_is_told_in_a_line(library, cache):
    (build_tts.SOURCES / "twice.cu").write_text(SOURCE % "nothing")
    with pytest.raises(BuildError, match=r'does not compile: twice.cu: .*"nothing" is undefined'):
        build(library, "90a")
    assert not list(cache.glob("twice-*/twice.cubin"))


def test_a_compiler_that_does_not_run_is_named(library, cache, monkeypatch, tmp_path):
    broken = nvrtc.Compiler(tmp_path / "libnvrtc.so.13", tmp_path)
    monkeypatch.setattr(nvrtc, "find_compiler", lambda: broken)
    with pytest.raises(BuildError, match=r"libnvrtc.so.13 does not run \(.*\): reinstall it, or set"):
        build(library, "90a")


def test_what_was_built_needs_no_compiler(library, full_cache, monkeypatch):
    product = build(library, "90a")
    assert product.is_relative_to(full_cache)
    monkeypatch.setattr(nvrtc, "find_compiler", lambda: None)
    assert build(library, "90a") == product
    with pytest.raises(BuildError, match="no CUDA compiler is found"):
        build(library, "120a")


def test_prebuilt_kernels_need_no_compiler(library, built, cache, monkeypatch, tmp_path):
    lines, out = [], shutil.copytree(built, tmp_path / "kernels")
    product = build(library, "90a", out=out)
    kept_builds.strip(product)
    assert sorted(path.name for path in product.parent.iterdir()) == [
        "build.json", "twice.cubin", "twice.sha256",
    ]  # fmt: skip
    monkeypatch.setenv("QWEN_MEGAKERNEL_KERNELS", str(out))
    monkeypatch.setattr(nvrtc, "find_compiler", lambda: None)
    assert build(library, "90a", lines.append) == product
    assert lines == []
    with pytest.raises(BuildError, match="no CUDA compiler is found"):
        build(library, "120a", lines.append)
    assert lines.pop() == (
        f"the twice kernel in {out} is not used: there is none for sm_120a and this model shape"
    )
    damage(product, "a bit")
    with pytest.raises(BuildError, match="no CUDA compiler is found"):
        build(library, "90a", lines.append)
    assert lines == [f"the twice kernel in {out} is not used: it is damaged: {product.parent}"]


def test_a_build_belongs_to_no_torch(library, monkeypatch):
    facts = build_facts(library, "90a")
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu140")
    assert build_facts(library, "90a") == facts
    assert facts.keys() == {"geometry", "sources", "flags"}


def test_prebuilt_kernels_of_other_sources_are_not_used(library, cache, monkeypatch, tmp_path):
    lines, out = [], tmp_path / "kernels"
    build(library, "90a", out=out)
    (build_tts.SOURCES / "twice.cu").write_text(SOURCE % "3.f")
    monkeypatch.setenv("QWEN_MEGAKERNEL_KERNELS", str(out))
    assert build(library, "90a", lines.append).is_relative_to(cache)
    assert lines[0].endswith("is not used: it has other sources")


def test_kernels_that_newer_gpus_shall_run_come_with_ptx(library, cache):
    ampere, hopper = build(library, "80"), build(library, "90a")
    assert b".target sm_80" in kept_builds.ptx_of(ampere).read_bytes()
    assert not kept_builds.ptx_of(hopper).exists()
    kept_builds.ptx_of(ampere).write_text("")
    assert not kept_builds.is_whole(ampere)


def damage(product: Path, how: str) -> None:
    content = bytearray(product.read_bytes())
    if how == "half of it":
        product.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        product.write_bytes(b"")
    elif how == "a bit":
        content[len(content) // 2] ^= 1
        product.write_bytes(content)
    elif how == "a folder":
        product.unlink()
        product.mkdir()
    elif how == "no checksum":
        product.with_suffix(".sha256").unlink()
    else:
        product.with_suffix(".sha256").write_bytes(b"\xff\0")


DAMAGES = ("half of it", "empty", "a bit", "a folder", "no checksum", "another checksum")


@pytest.mark.parametrize("how", slow_after(1, DAMAGES))
def test_a_damaged_build_is_made_anew(library, full_cache, how):
    product, lines = build(library, "90a"), []
    content = product.read_bytes()
    damage(product, how)
    assert build(library, "90a", lines.append) == product
    assert lines[0] == f"{product} is damaged"
    assert lines[1].startswith("compiling")
    assert product.stat().st_size == len(content)
    assert build(library, "90a", lines.append) == product
    assert len(lines) == 2


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_build_is_refused_where_there_is_no_compiler(library, full_cache, monkeypatch, how):
    product = build(library, "90a")
    damage(product, how)
    monkeypatch.setattr(nvrtc, "find_compiler", lambda: None)
    with pytest.raises(BuildError) as refused:
        build(library, "90a")
    assert str(refused.value).startswith(f"{product} is damaged, and no CUDA compiler is found")
    assert "\n" not in str(refused.value)
