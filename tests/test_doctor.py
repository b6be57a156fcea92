"""`doctor` on good and bad machines. Programs on PATH stand in for the machine's."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata

import pytest
import stand_in_compiler
from live_server import ROOT
from stand_in_compiler import put_compiler, run_instead
from warm_process import COMMAND, run_warm

from qwen_megakernel.__main__ import main
from qwen_megakernel.installation import nvrtc
from qwen_megakernel.tools import machine
from qwen_megakernel.tools.doctor import (
    DEFAULT_MODEL,
    SIZES,
    check_cpu,
    check_driver,
    check_gpu,
    check_kernel_disk,
    check_model,
    check_model_disk,
    check_packages,
    check_port,
    check_python,
    check_torch,
    covers,
    read_requirements,
    report,
)
from qwen_megakernel.tools.findings import Check
from qwen_megakernel.tools.kernel_checks import check_compiler, check_kernels
from qwen_megakernel.tools.machine import (
    Gpus,
    Model,
    Torch,
    ask_model,
    ask_nvidia_smi,
    ask_torch,
    run_tool,
)

SIZE = SIZES["0.6B"]
RTX_5090 = "NVIDIA GeForce RTX 5090, 580.95.05, 12.0, 31642, 32607"
H200 = "NVIDIA H200, 570.172.08, 9.0, 143167, 143771"
TORCH = Torch("2.13.0+cu130", (13, 0), True, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), 8)
CPU_TORCH = Torch("2.13.0+cpu", threads=2)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """PATH has only programs that `tools(name, script)` adds. The usual place has no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(nvrtc, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setattr(nvrtc, "_pip_folders", lambda: [])
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def add(name, script):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return add


@pytest.fixture
def gpus(tools):
    """The GPUs that lines of nvidia-smi describe."""

    def ask(*lines):
        tools("nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))
        return ask_nvidia_smi()

    return ask


def test_nvidia_smi_is_understood(gpus):
    found = gpus(RTX_5090, H200)
    assert [gpu.name for gpu in found.gpus] == ["NVIDIA GeForce RTX 5090", "NVIDIA H200"]
    assert found.gpus[0].driver == "580.95.05"
    assert found.gpus[0].capability == (12, 0)
    assert found.gpus[0].free_gb == pytest.approx(33.2, abs=0.1)


@pytest.mark.parametrize("memory", ["[N/A], [N/A]", "[Insufficient Permissions], 32607"])
def test_memory_may_be_unknown(gpus, memory):
    check = check_gpu(gpus(f"NVIDIA GB10, 580.95.05, 12.1, {memory}"), SIZE)
    assert check == Check("gpu", "ok", "NVIDIA GB10, sm_121")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver' >&2; exit 9", "NVIDIA-SMI has failed: no driver"),
        ("exit 3", "exit status 3"),
        ("echo 'hello, world'", "cannot be understood: hello, world"),
        ("echo 'a, b, c, d, e'", "cannot be understood"),
        ("exit 0", "shows no GPU"),
    ],
)
def test_broken_nvidia_smi(tools, script, reason):
    tools("nvidia-smi", script)
    check = check_driver(ask_nvidia_smi(), TORCH)
    assert check.status == "fail"
    assert reason in check.detail
    assert "--gpus all" in check.fix


def test_stuck_tool_is_left_behind(tools):
    path = tools("nvidia-smi", "exec /bin/sleep 60")
    start = time.monotonic()
    assert run_tool(str(path), limit_s=0.2) == ("", "no answer within 0.2 s")
    assert time.monotonic() - start < 50  # it was not waited for


def test_tool_that_cannot_start(tools):
    path = tools("nvidia-smi", "")
    path.chmod(0o644)
    assert run_tool(str(path)) == ("", "Permission denied")


@pytest.mark.usefixtures("tools")
def test_no_gpu_is_no_failure():
    found = ask_nvidia_smi()
    driver = check_driver(found, CPU_TORCH)
    assert driver.status == "warn"
    assert driver.detail == "no GPU: the torch backend on the CPU will be used"
    assert check_gpu(found, SIZE).status == "skipped"
    assert check_torch(found, CPU_TORCH) == Check("torch", "ok", "2.13.0+cpu on the CPU")
    compiler = check_compiler(found, CPU_TORCH)
    detail = "not found, and not needed without a GPU"
    assert (compiler.status, compiler.detail) == ("skipped", detail)


@pytest.mark.parametrize(
    ("driver", "cuda", "available", "status"),
    [
        ("580.95.05", (13, 0), True, "ok"),
        ("590.1", (13, 1), True, "ok"),
        ("575.57.08", (13, 0), False, "fail"),
        ("570.172.08", (12, 8), True, "ok"),
        ("550.163.01", (12, 8), True, "warn"),
        ("470.82", (12, 8), False, "fail"),
        ("470.82", None, False, "ok"),
    ],
)
def test_driver_against_cuda(gpus, driver, cuda, available, status):
    found = gpus(f"NVIDIA H200, {driver}, 9.0, 143167, 143771")
    check = check_driver(found, Torch("2.13.0", cuda, available))
    assert check.status == status
    if status != "ok":
        assert f"nvidia-driver-{580 if cuda[0] == 13 else 570}-open" in check.fix


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["sm_90", "sm_120"], (12, 0), True),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80"], (8, 9), True),  # machine code runs on later minors
        (["sm_86"], (8, 0), False),  # but not on earlier ones
        (["sm_90a"], (9, 0), True),
        (["sm_120a"], (12, 1), False),  # nor does what is for one GPU only
        (["sm_120f"], (12, 1), True),
        (["sm_90", "compute_90"], (12, 0), True),  # PTX is compiled by the driver
        (["compute_90a"], (12, 0), False),
        (["compute_120"], (9, 0), False),
        ([], (9, 0), False),
        (["gfx942"], (9, 0), False),
    ],
)
def test_covers(archs, capability, expected):
    assert covers(archs, capability) is expected


def test_torch_without_code_for_the_gpu(gpus):
    old = Torch("2.6.0+cu124", (12, 4), True, ("sm_80", "sm_90"), 8)
    check = check_torch(gpus(RTX_5090), old)
    assert check.status == "fail"
    assert "no code for sm_120, only for sm_80 sm_90" in check.detail
    assert check.fix.startswith("pip install")
    assert check_torch(gpus(RTX_5090), TORCH).status == "ok"


def test_torch_that_misses_the_gpu(gpus, monkeypatch):
    found = gpus(RTX_5090)
    assert "build without CUDA" in check_torch(found, CPU_TORCH).detail
    blind = Torch("2.13.0", (13, 0), available=False, arch_list=("sm_120",))
    assert check_torch(found, blind).fix == "see `driver` above"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_torch(found, blind).fix == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.slow
def test_torch_is_asked_for_real():
    torch = ask_torch()
    assert torch.error == ""
    assert torch.version == metadata.version("torch")
    assert torch.threads >= 1


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'OSError: libcudart.so: not found' >&2; exit 1", "OSError: libcudart.so: not found"),
        ("kill -SEGV $$", "exit status -11"),
        ("exit 0", "gave no answer"),
        ("echo hello", "gave no answer"),
        ("exec /bin/sleep 60", "no answer within 1 s"),
    ],
)
def test_torch_that_cannot_be_asked(tools, monkeypatch, script, error):
    monkeypatch.setattr(sys, "executable", str(tools("python", script)))
    torch = ask_torch(limit_s=1)
    assert torch.error == error
    check = check_torch(Gpus(), torch)
    assert check.status == "fail"
    assert error in check.detail


def test_the_compiler_matches_torch_and_gpu(tools, gpus, tmp_path, monkeypatch):
    found, fix = gpus(RTX_5090), 'pip install "cuda-toolkit[nvrtc,cudart]=={}.*"'
    assert check_compiler(found, TORCH).fix == fix.format("13.0")
    assert check_compiler(found, Torch("2.11.0", (12, 8), True)).fix == fix.format("12.8")
    library = put_compiler(tmp_path / "usual")
    assert "does not run" in check_compiler(found, TORCH).detail
    says = "echo 'Cuda compilation tools, release {0}, V{0}.88'; exit"
    monkeypatch.setattr(stand_in_compiler, "SCRIPT", "{body}")
    run_instead(monkeypatch, tmp_path / "compiler.sh", says.format("13.0"))
    assert check_compiler(found, TORCH) == Check("compiler", "ok", f"NVRTC 13.0.88 ({library})")
    run_instead(monkeypatch, tmp_path / "compiler.sh", says.format("12.4"))
    assert "torch has CUDA 13.0" in check_compiler(found, TORCH).detail
    assert "does not know this GPU" in check_compiler(found, Torch("2.11.0", (12, 8), True)).detail


def test_whether_the_kernels_run(gpus, tmp_path):
    good, bad = Check("compiler", "ok", "13.0"), Check("compiler", "warn", "not found")
    assert check_kernels(Gpus(installed=False), good).status == "skipped"
    old = check_kernels(gpus("Tesla T4, 580.95.05, 7.5, 14000, 15360"), good)
    assert (old.status, old.detail.partition(":")[0]) == ("warn", "sm_75")
    ada = check_kernels(gpus("NVIDIA L4, 580.95.05, 8.9, 22000, 23034"), good, tmp_path)
    assert (ada.status, ada.detail.partition(":")[0]) == ("ok", "sm_89")
    found = gpus(RTX_5090)
    assert "python -m qwen_megakernel build" in check_kernels(found, good, tmp_path).detail
    missing = check_kernels(found, bad, tmp_path)
    assert missing.status == "warn"
    assert "there is no compiler that will do; PyTorch decodes" in missing.detail
    for name in ("frame", "codec"):
        folder = tmp_path / f"{name}-sm_120a-0123456789abcdef-nvrtc13.0.88"
        folder.mkdir()
        (folder / f"{name}.cubin").touch()
    assert check_kernels(found, bad, tmp_path).status == "ok"
    assert check_kernels(gpus(H200), bad, tmp_path).status == "warn"


def test_windows_has_no_kernels(gpus, tmp_path, monkeypatch):
    found = gpus(RTX_5090)
    monkeypatch.setattr(sys, "platform", "win32")
    check = check_kernels(found, [], tmp_path)
    assert (check.status, check.detail) == (
        "warn",
        "the kernels are built on Linux only; PyTorch decodes",
    )


def test_gpu_memory(gpus):
    assert check_gpu(gpus(RTX_5090), SIZE).status == "ok"
    full = check_gpu(gpus("NVIDIA GeForce RTX 5090, 580.95.05, 12.0, 2000, 32607", H200), SIZE)
    assert full.status == "warn"
    assert "first of 2" in full.detail
    assert "--num-slots 4" in full.fix


def test_python():
    assert check_python().status == "ok"
    assert check_python((3, 10, 12)).status == "fail"


def test_packages_as_required():
    requirements = "# numbers\ntorch==2.13.0\nnumpy>=1.26.4\n\n"

    def checked(**versions):
        def installed(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        return check_packages(requirements, installed)

    fine = checked(torch="2.13.0+cpu", numpy="2.0")
    assert fine == Check("packages", "ok", "all 2 as required, torch 2.13.0+cpu")
    assert checked(torch="2.13", numpy="1.26.4").status == "ok"
    assert checked(torch="2.11.0", numpy="2.0").status == "warn"
    old = checked(torch="2.11.0", numpy="1.26")
    assert old.status == "fail"
    assert "wrong version: numpy 1.26 (>=1.26.4)" in old.detail
    assert "not the tested version: torch 2.11.0 (==2.13.0)" in old.detail
    assert checked(torch="2.13.0", numpy="1.26.4rc1").status == "fail"
    assert checked(torch="2.13.0", numpy="2.5.0rc1").status == "ok"
    missing = checked(numpy="2.0")
    assert (missing.status, missing.detail) == ("fail", "missing: torch")
    assert missing.fix == "pip install -r requirements.txt"


def test_requirements_may_have_extras_markers_and_comments():
    lines = "# all of it\nuvicorn[standard]>=0.52,<1  # a server\ntorch==2.13.0; extra == 'server'\n"
    lines += "nothing>=1; extra == 'other'\n"
    versions = {"uvicorn": "0.60", "torch": "2.13.0"}
    assert check_packages(lines, versions.__getitem__).detail == "all 2 as required, torch 2.13.0"
    too_new = check_packages(lines, (versions | {"uvicorn": "1.0"}).__getitem__)
    assert too_new.status == "fail"
    assert "uvicorn 1.0" in too_new.detail


def test_every_requirement_is_checked():
    lines = [line for line in read_requirements().splitlines() if line and not line.startswith("#")]
    assert check_packages(read_requirements()).detail.startswith(f"all {len(lines)} as required")


def test_cpu_threads(tmp_path):
    assert check_cpu(Torch(threads=2), cores=2).status == "ok"
    crowded = check_cpu(Torch(threads=64), cores=4.5)
    assert (crowded.status, crowded.fix) == ("warn", "export OMP_NUM_THREADS=4")
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert machine.usable_cores(quota) == 0.5
    quota.write_text("max 100000\n")
    assert machine.usable_cores(quota) == machine.usable_cores(tmp_path / "missing") >= 1


def test_synthetic_checkpoint_is_told(tiny_base):
    check = check_model(ask_model(str(tiny_base)))
    assert check.status == "warn"
    assert "noise" in check.detail


def test_complete_and_damaged_checkpoint(tiny_base, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"synthetic"', b'"real_life"', 1))
    assert check_model(ask_model(str(folder))).status == "ok"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    damaged = check_model(ask_model(str(folder)))
    assert (damaged.status, damaged.fix) == ("fail", "copy or download this checkpoint again")
    (folder / "config.json").unlink()
    incomplete = check_model(ask_model(str(folder)))
    assert incomplete.status == "fail"
    assert "config.json is missing" in incomplete.detail


def test_model_still_to_come(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ask_model(DEFAULT_MODEL)
    check = check_model(model)
    assert check.status == "warn"
    assert f"hf download {DEFAULT_MODEL} --revision " in check.fix
    assert check_model_disk(model, SIZE).status == "ok"
    offline = check_model(Model(DEFAULT_MODEL, True, tmp_path, offline=True, error="not there"))
    assert (offline.status, offline.detail) == ("fail", "not there")


def test_model_that_does_not_exist():
    model = ask_model("no-such-folder")
    assert check_model(model).status == "fail"
    assert check_model_disk(model, SIZE).status == "skipped"


def test_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path / "a" / "b"))
    models = check_model_disk(Model(DEFAULT_MODEL, True, tmp_path / "hub"), SIZE)
    assert models.status == "fail"
    assert "0.3 GB free, 2.5 GB needed" in models.detail
    assert "HF_HOME" in models.fix
    kernels = check_kernel_disk()
    assert kernels.status == "fail"
    assert str(tmp_path / "a" / "b") in kernels.detail


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert check_kernel_disk(tmp_path / "file" / "cache").status == "fail"


def test_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = check_port(port)
        assert taken.status == "fail"
        assert f"--port {port + 1}" in taken.fix
    assert check_port(port).status == "ok"


def test_report_is_aligned_and_counts():
    lines = report([Check("port", "ok", "free"), Check("driver", "fail", "old", "get a new one")])
    assert lines.splitlines() == [
        "OK      port        free",
        "FAIL    driver      old",
        "                    fix: get a new one",
        "not fit to serve yet: 1 failed, 0 warnings",
    ]


def run(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "qwen_megakernel", "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=240,
    )


def run_with_torch(*arguments):
    """The same in a process that has imported PyTorch already."""
    return run_warm(ROOT, "doctor", *arguments, program=COMMAND)


@pytest.mark.slow
def test_whole_command(tools, tiny_base):
    tools("unused", "")
    healthy = run_with_torch("--json", "--model", str(tiny_base))
    found = json.loads(healthy.stdout)
    assert healthy.stderr == ""
    by_name = {check["name"]: check for check in found["checks"]}
    assert list(by_name) == [
        "python", "packages", "cpu", "driver", "gpu", "torch", "compiler", "kernels",
        "tuning", "model", "model-disk", "kernel-disk", "port",
    ]  # fmt: skip
    assert all(set(check) == {"name", "status", "detail", "fix"} for check in found["checks"])
    assert found["ok"] is all(check["status"] != "fail" for check in found["checks"])
    assert healthy.returncode == (0 if found["ok"] else 1)
    assert by_name["model"]["status"] == "warn"

    tools("nvidia-smi", "echo 'no devices were found' >&2; exit 6")
    sick = run_with_torch("--model", "no-such-folder")
    assert sick.returncode == 1
    assert "FAIL    driver      nvidia-smi: no devices were found" in sick.stdout
    assert "FAIL    model       no-such-folder" in sick.stdout
    assert sick.stdout.splitlines()[-1].startswith("not fit to serve yet: ")
    assert "Traceback" not in sick.stdout + sick.stderr


@pytest.mark.slow
def test_whole_command_before_anything_is_installed(tools):
    """-S leaves site-packages out, so that Python finds only the standard library."""
    tools("unused", "")
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "qwen_megakernel", "doctor"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (bare.returncode, bare.stderr) == (1, "")
    assert "FAIL    packages    missing: packaging, and perhaps others" in bare.stdout
    assert "fix: pip install -r requirements.txt" in bare.stdout


def test_whole_command_where_torch_is_half_installed(tools, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_global_deps.so: cannot open')\n")
    broken = run("--json", PYTHONPATH=str(tmp_path))
    assert (broken.returncode, broken.stderr) == (1, "")
    by_name = {check["name"]: check for check in json.loads(broken.stdout)["checks"]}
    assert by_name["torch"]["status"] == "fail"
    assert "libtorch_global_deps.so" in by_name["torch"]["detail"]
    assert by_name["model"]["status"] == "skipped"


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_port_out_of_range_is_refused(port, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--port", port])
    assert exit_.value.code == 2
    assert "--port" in capsys.readouterr().err
