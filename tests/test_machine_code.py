"""The table of the machine code agrees with a fresh build, and a change of a kernel shows in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_megakernel import build_tts
from qwen_megakernel.__main__ import main
from qwen_megakernel.build_tts import (
    ARCHES,
    KNOWN_ARCHES,
    Library,
    build,
    compiler_release,
    shared_bytes,
)
from qwen_megakernel.installation.cubin import CubinError, read_cubin
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.tools import build as build_kernels
from qwen_megakernel.tools import machine_code
from qwen_megakernel.tools.build import KernelBuild, table_builds
from qwen_megakernel.tools.machine_code import (
    TABLE,
    UPDATE_COMMAND,
    Row,
    parse,
    render,
    rows,
    system_calls,
)

SMALL = {f"read sm_{arch}" for arch in KNOWN_ARCHES}
"""Compiled by every test run; the rest takes half a minute or more each."""
BUILDS = [
    pytest.param(
        one,
        id=str(one).replace(" ", "-"),
        marks=[] if str(one) in SMALL else pytest.mark.slow,
    )
    for one in table_builds()
    if one.arch in KNOWN_ARCHES
]
SCALE = """
namespace {
__device__ __noinline__ float grown(float x, int n) { return n > 1 ? x * %s + grown(x, n - 1) : x; }
}
extern "C" __global__ void scale(float* x) { x[threadIdx.x] = grown(x[threadIdx.x], 7); }
"""
ALIGNED = """
extern "C" __device__ void* __nv_aligned_device_malloc(size_t, size_t);
extern "C" __global__ void aligned(void** x) { *x = __nv_aligned_device_malloc(64, 64); }
"""

FACTS = """
extern "C" __device__ const long long fact_three = 3, fact_none = 0, fact_below = -4;
extern "C" __device__ const char steps[] = "one\\ntwo\\n";
extern "C" __global__ void nothing() {}
"""
HEAD = b"\x7fELF\x02\x01" + bytes(12) + (190).to_bytes(2, "little") + bytes(44)

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler")


# ---------------------------------------------------------------------------- the repository's table


def test_the_table_has_all_builds():
    expected = {(one.library.name, one.shape, f"sm_{one.arch}") for one in table_builds()}
    assert parse(TABLE.read_text()).builds() == expected


WIDE = "frame_kernel_wide"
"""A wide frame's kernel, which spills registers over its waits (docs/experiments.md)."""
MOST_SPILLS = {("frame", "1.7b"): 792, ("codec", "-"): 8}
"""Bytes of spills of a kernel that is not wide. At 1.7B, 32 registers of a thread hold the residual."""
SPILLING = {
    *(("frame", "1.7b", f"sm_{arch}") for arch in ARCHES),
    ("codec", "-", "sm_100a"),
}
"""Builds with a kernel that is not wide and spills."""


def test_no_other_kernel_of_the_table_spills_or_takes_more_than_its_gpu_has():
    spilling = set()
    for cells in parse(TABLE.read_text()).rows:
        row = dict(zip(machine_code.COLUMNS, cells, strict=True))
        if row["spills"] != "0" and WIDE not in row["kernel"]:
            spilling.add((row["library"], row["shape"], row["arch"]))
            assert int(row["spills"]) <= MOST_SPILLS[row["library"], row["shape"]], row
        if row["dynamic shared"] != "-":
            assert int(row["dynamic shared"]) <= shared_bytes(row["arch"].removeprefix("sm_")), row
    assert spilling == SPILLING


@needs_compiler
@pytest.mark.parametrize("one", BUILDS)
def test_the_machine_code_is_the_table_s(one: KernelBuild, shared_builds):
    table, release = parse(TABLE.read_text()), compiler_release(find_compiler())
    if release != table.release:
        pytest.skip(f"csrc/{TABLE.name} belongs to NVRTC {table.release}, here is {release}")
    differences = table.differences(rows(build(one.library, one.arch), one.shape, one.arch))
    if differences:
        pytest.fail(
            "\n".join([f"csrc/{TABLE.name} differs (table -> build):", *differences])
            + f"\nIf the change is meant, write the table anew: {UPDATE_COMMAND}",
            pytrace=False,
        )


# ---------------------------------------------------------------------------- what a digest depends on


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled(folders, monkeypatch) -> Callable[[str, str], Path]:
    """Compile a source in a folder, or find it there: `compiled(folder, source)`."""

    def make(folder: str, source: str) -> Path:
        sources = folders / folder / "csrc"
        sources.mkdir(parents=True, exist_ok=True)
        (sources / "scale.cu").write_text(source)
        monkeypatch.setattr(build_tts, "SOURCES", sources)
        monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(folders / folder / "cache"))
        return build(Library("scale", "scale.cu", header=""), "90a")

    return make


@needs_compiler
def test_a_digest_follows_the_code_alone(compiled):
    first, moved, commented, changed = (
        rows(compiled(folder, source), "-", "90a")
        for folder, source in {
            "first": SCALE % "2.f",
            "moved": SCALE % "2.f",
            "commented": "// What it does.\n\n" + SCALE % "2.f /* twice */",
            "changed": SCALE % "3.f",
        }.items()
    )
    assert [row.kernel for row in first] == ["scale"]
    assert first == moved == commented
    assert replace(changed[0], digest=first[0].digest) == first[0]
    assert changed[0].digest != first[0].digest


@needs_compiler
def test_a_function_that_is_not_inlined_counts(compiled):
    (called,) = rows(compiled("first", SCALE % "2.f"), "-", "90a")
    (longer,) = rows(compiled("longer", SCALE % "2.f + sqrtf(x) / n"), "-", "90a")
    assert longer.instructions > called.instructions


@needs_compiler
def test_calls_into_the_driver_are_found(compiled):
    assert system_calls(compiled("aligned", ALIGNED)) == ["__cuda_syscall_aligned_malloc"]
    assert system_calls(compiled("first", SCALE % "2.f")) == []


def test_what_is_no_machine_code_is_refused(tmp_path):
    junk = tmp_path / "junk.cubin"
    for content, said in ((b"\x7fELF junk", "is no cubin"), (HEAD, "is no whole cubin")):
        junk.write_bytes(content)
        with pytest.raises(CubinError, match=f"junk.cubin {said}"):
            read_cubin(junk)


@needs_compiler
def test_facts_and_texts_are_read_from_a_cubin(compiled):
    cubin = read_cubin(compiled("facts", FACTS))
    assert cubin.facts == {"three": 3, "none": 0, "below": -4}
    assert cubin.text("steps") == "one\ntwo\n"
    with pytest.raises(CubinError, match="the cubin has no names"):
        cubin.text("names")


# ---------------------------------------------------------------------------- the table's text

ROWS = [
    Row("codec", "-", "sm_90a", "gemm<Tile<8, 4>>", 128, 0, 640, None, 2152, "ab02f85321e5"),
    Row("frame", "0.6b", "sm_90a", "frame_kernel", 96, 0, 0, 230400, 12616, "fb6c90e6b820"),
    Row("frame", "0.6b", "sm_120a", "frame_kernel", 96, 0, 0, 96256, 12512, "3917fa218fa8"),
]


def test_a_table_is_read_as_it_was_written():
    table = parse(render(ROWS, "13.0.88"))
    assert (table.release, table.rows) == ("13.0.88", tuple(row.cells() for row in ROWS))
    assert table.differences(ROWS) == []
    with pytest.raises(ValueError, match="not a table of the machine code"):
        parse(render(ROWS, "13.0.88").replace("spills ", "stores ", 2))


def test_differences_name_kernel_and_figures():
    table = parse(render(ROWS, "13.0.88"))
    other = replace(ROWS[1], registers=98, digest="000000000000")
    assert table.differences([other]) == [
        "frame 0.6b sm_90a frame_kernel: registers 96 -> 98, digest fb6c90e6b820 -> 000000000000"
    ]
    assert table.differences([replace(ROWS[0], kernel="gemm<Tile<16, 4>>")]) == [
        "codec - sm_90a gemm<Tile<8, 4>>: in the table, not in the build",
        "codec - sm_90a gemm<Tile<16, 4>>: in the build, not in the table",
    ]
    assert table.differences([replace(ROWS[1], shape="1.7b")]) == [
        "frame 1.7b sm_90a frame_kernel: in the build, not in the table"
    ]


def test_the_table_covers_all_or_nothing(capsys):
    assert main(["build", "--table", "--arch", "90a"]) == 1
    assert "leave out --arch, --model, --form, --all and --out" in capsys.readouterr().err


@needs_compiler
def test_the_command_writes_the_table(compiled, monkeypatch, tmp_path, capsys):
    product = compiled("first", SCALE % "2.f")
    library = Library("scale", "scale.cu", header="")
    table = tmp_path / "machine_code.md"
    table.write_text("<<<<<<< a table in the middle of a merge\n")
    monkeypatch.setattr(machine_code, "TABLE", table)
    monkeypatch.setattr(build_kernels, "table_builds", lambda: [KernelBuild(library, "90a")])
    assert main(["build", "--table"]) == 0
    (row,) = rows(product, "-", "90a")
    assert parse(table.read_text()).differences([row]) == []
    table.write_text(render([replace(row, instructions=1)], "13.0.88"))
    assert main(["build", "--table"]) == 0
    told = f"scale - sm_90a scale: instructions 1 -> {row.instructions}\n"
    assert told in capsys.readouterr().out
    assert parse(table.read_text()).differences([row]) == []
