"""Where the compiler is searched, and where caches lie. All parts use the same functions."""

from __future__ import annotations

import logging
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live_server import ROOT
from slow_cases import slow_after
from stand_in_compiler import put_compiler, run_instead
from warm_process import WarmProcess

from qwen_megakernel import build_tts
from qwen_megakernel.build_tts import BuildError, Library, build
from qwen_megakernel.checkpoint import CheckpointError, hub_cache_folder, resolve
from qwen_megakernel.installation import build_environment, nvrtc
from qwen_megakernel.installation.build_environment import cache_folder, user_cache_folder
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.tools.doctor import check_kernel_disk
from qwen_megakernel.tools.kernel_checks import check_compiler
from qwen_megakernel.tools.machine import Gpu, Gpus, Torch

GPUS = Gpus((Gpu("NVIDIA H200", "580.95.05", (9, 0), 143.0, 150.0),))
TORCH = Torch("2.13.0", (13, 0), True)


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder: `usual` is the usual place of a toolkit, and `pip/nvidia` is where pip puts NVIDIA's
    packages. Both are empty, and nothing else is found."""
    monkeypatch.setattr(nvrtc, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "pip")])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return tmp_path


def found() -> Path | None:
    compiler = find_compiler()
    return compiler.library if compiler else None


def test_the_compiler_that_pip_brings_comes_before_the_usual_place(machine):
    assert found() is None
    usual = put_compiler(machine / "usual")
    assert found() == usual
    of_pip = put_compiler(machine / "pip" / "nvidia" / "cu13")
    assert found() == of_pip


def test_pip_s_packages_of_cuda_12_lie_apart(machine):
    folder = machine / "pip" / "nvidia"
    library = put_compiler(folder / "cuda_nvrtc")
    (folder / "cuda_nvrtc" / "include" / "cuda_bf16.h").unlink()
    assert found() is None, "its headers are missing"
    put_compiler(folder / "cuda_runtime")
    (folder / "cuda_runtime" / "lib" / "libnvrtc.so.13").unlink()
    assert find_compiler() == nvrtc.Compiler(library, folder / "cuda_runtime" / "include")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_comes_first(machine, monkeypatch, variable):
    monkeypatch.setenv(variable, str(machine / "home"))
    expected = put_compiler(machine / "home")
    put_compiler(machine / "pip" / "nvidia" / "cu13")
    put_compiler(machine / "usual")
    assert found() == expected


def test_cuda_home_without_a_compiler_is_passed_over(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine / "nonsense"))
    assert found() is None
    usual = put_compiler(machine / "usual")
    assert found() == usual


@pytest.mark.parametrize("place", ["home", "pip/nvidia/cu13", "usual"])
def test_doctor_finds_the_build_s_compiler(machine, monkeypatch, place):
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    expected = put_compiler(machine / place)
    run_instead(monkeypatch, machine / "compiler.sh", "exit 1")
    check = check_compiler(GPUS, TORCH)
    assert (check.status, check.detail) == ("ok", f"NVRTC 13.0.88 ({expected})")
    assert build_tts.require_compiler().library == expected


def test_doctor_and_build_miss_the_same_compiler(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine / "nonsense"))
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(machine / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = check_compiler(GPUS, TORCH)
    assert check.detail == "not found: needed to build the megakernel"
    assert check.fix == 'pip install "cuda-toolkit[nvrtc,cudart]==13.0.*"'
    with pytest.raises(BuildError, match="no CUDA compiler is found") as refused:
        build(Library("nothing", "nothing.cu", header=""), "90a")
    assert str(refused.value).endswith(check.fix)


# ---------------------------------------------------------------------------- caches


def no_account(uid: int) -> pwd.struct_passwd:
    """`pwd.getpwuid` in a container whose passwd file does not have the user."""
    raise KeyError(uid)


@pytest.fixture
def homeless(tmp_path, monkeypatch) -> Iterator[Path]:
    """The temporary folder of a process whose home is unknown."""
    for name in ("HOME", "XDG_CACHE_HOME", "QWEN_MEGAKERNEL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    build_environment._temporary_folder.cache_clear()
    yield tmp_path
    build_environment._temporary_folder.cache_clear()


def test_caches_of_a_user_with_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QWEN_MEGAKERNEL_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "qwen_megakernel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qwen_megakernel"
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", "~/builds")
    assert cache_folder() == tmp_path / "builds"


def test_without_a_home_caches_are_in_a_private_temporary_folder(homeless, caplog):
    folder = user_cache_folder()
    assert folder == homeless / f"qwen_megakernel-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder() == folder / "qwen_megakernel"
    assert hub_cache_folder() == folder / "huggingface" / "hub"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for said in (str(folder), "QWEN_MEGAKERNEL_CACHE", "HF_HOME"):
        assert said in record.message


def test_without_a_home_named_caches_are_used(homeless, monkeypatch, caplog):
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", "/builds")
    assert cache_folder() == Path("/builds")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert user_cache_folder() == Path("/caches")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/models/hub")
    assert hub_cache_folder() == Path("/models/hub")
    assert not caplog.records


@pytest.mark.parametrize("kind", ["open to all", "a link", "a file"])
def test_a_temporary_folder_that_others_could_fill_is_not_used(homeless, kind):
    """Another user who may write there could plant a library that the server loads."""
    taken = homeless / f"qwen_megakernel-{os.getuid()}"
    if kind == "open to all":
        taken.mkdir()
        taken.chmod(0o777)
    elif kind == "a link":
        (homeless / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(homeless / "elsewhere")
    else:
        taken.write_text("")
    folder = user_cache_folder()
    assert folder.parent == homeless
    assert folder != taken
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    assert user_cache_folder() == folder, "the same for the life of the process"


def test_without_a_home_and_a_disk_to_write_on_doctor_says_so(homeless, monkeypatch):
    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none_usable)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = check_kernel_disk()
    assert check.status == "fail"
    assert "QWEN_MEGAKERNEL_CACHE" in check.fix


def test_without_a_home_a_tilde_is_refused_in_one_line(homeless):
    with pytest.raises(CheckpointError, match=r"^~/model: no home folder is known"):
        resolve("~/model")
    with pytest.raises(CheckpointError, match=r"is not complete in .*qwen_megakernel-"):
        resolve("acme/voice", offline=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    slow_after(
        1,
        [
            (["doctor"], "kernel-disk {folder}/qwen_megakernel: "),
            (["doctor", "--model", "~/model"], "no home folder is known"),
            (["build", "--arch", "sm_90a"], "go to {folder}/qwen_megakernel"),
            (
                ["build", "--arch", "sm_90a", "--model", "acme/voice"],
                "not complete in {folder}/huggingface",
            ),
        ],
    ),
)
def test_commands_work_without_a_home(arguments, said, tmp_path):
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
        "import pwd, test_build_environment as test; pwd.getpwuid = test.no_account; "
        "from qwen_megakernel.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    put_compiler(tmp_path)  # does not run; else a machine that has one compiles
    environ = {
        "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "TMPDIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = WarmProcess(ROOT, arguments, program=program, environ=environ, cwd=tmp_path)
    try:
        process.wait(120)
    finally:
        process.kill()
    output = process.stdout.read() + process.stderr.read()
    assert "Traceback" not in output
    assert said.format(folder=tmp_path / f"qwen_megakernel-{os.getuid()}") in output
    assert "no home folder" in output
