"""Where the compiler is looked for: once, for the build and for `doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_megakernel import build_environment, build_tts
from qwen_megakernel.build_environment import find_nvcc
from qwen_megakernel.build_tts import BuildError, Library, build
from qwen_megakernel.tools.doctor import check_nvcc
from qwen_megakernel.tools.machine import Gpu, Gpus, Torch

GPUS = Gpus((Gpu("NVIDIA H200", "580.95.05", (9, 0), 143.0, 150.0),))
TORCH = Torch("2.13.0", (13, 0), True)
SCRIPT = "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"


def put_nvcc(folder: Path, mode: int = 0o755) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(SCRIPT)
    path.chmod(mode)
    return path


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder whose `path/bin` is the PATH and whose `usual/bin` is the usual place; both are empty."""
    monkeypatch.setattr(build_environment, "USUAL_NVCC", tmp_path / "usual" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return tmp_path


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_comes_first(machine, monkeypatch, variable):
    monkeypatch.setenv(variable, str(machine / "home"))
    expected = put_nvcc(machine / "home")
    put_nvcc(machine / "path")
    put_nvcc(machine / "usual")
    assert find_nvcc() == expected


def test_cuda_home_without_a_compiler_is_passed_over(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine / "nonsense"))
    assert find_nvcc() is None
    usual = put_nvcc(machine / "usual")
    assert find_nvcc() == usual
    on_path = put_nvcc(machine / "path")
    assert find_nvcc() == on_path


def test_a_file_that_cannot_be_executed_is_no_compiler(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    put_nvcc(machine / "home", mode=0o644)
    put_nvcc(machine / "usual", mode=0o644)
    assert find_nvcc() is None


@pytest.mark.parametrize("place", ["home", "path", "usual"])
def test_doctor_finds_the_build_s_compiler(machine, monkeypatch, place):
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    expected = put_nvcc(machine / place)
    check = check_nvcc(GPUS, TORCH)
    assert (check.status, check.detail) == ("ok", f"13.0 ({expected})")
    assert build_tts.find_nvcc() == expected


def test_doctor_and_build_miss_the_same_compiler(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine / "nonsense"))
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(machine / "cache"))
    assert check_nvcc(GPUS, TORCH).detail == "not found: needed to build the megakernel"
    with pytest.raises(BuildError, match="nvcc is not found"):
        build(Library("nothing", (), (), header=""), "90a")
