"""The wheel: its contents, and speech with it without a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import wave
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from live_server import ROOT

from qwen_megakernel import __version__

pytestmark = pytest.mark.slow  # a build, and two environments

BUILT_FROM = (
    "pyproject.toml", "README.md", "LICENSE", "requirements.txt",
    "qwen_megakernel", "pipecat_client", "csrc", "demo_voice", "deploy",
)  # fmt: skip
"""Everything from which a wheel is built."""
PLACES = {
    "qwen_megakernel": "qwen_megakernel",
    "pipecat_client": "pipecat_client",
    "qwen_megakernel/csrc": "csrc",
    "qwen_megakernel/demo_voice": "demo_voice",
}
"""Folder of the wheel -> folder of the repository."""


def run(*command: str | Path, cwd: Path, limit_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QWEN_MEGAKERNEL"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    built = run(sys.executable, "-m", "pip", "wheel", *options, folder / "source", cwd=folder)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel and nothing else."""
    return environment_with(wheel, tmp_path_factory.mktemp("bare")) / "bin"


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory) -> Path:
    """The `bin` of such an environment that also sees the packages of this one."""
    environment = environment_with(wheel, tmp_path_factory.mktemp("full"))
    site_packages = next(environment.glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def environment_with(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "env" / "bin" / "python")
    installed = run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder / "env"


def files_of(folder: str) -> set[str]:
    """The files relative to `folder`, without Python's caches."""
    found = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.*")}
    return {name for name in found if "__pycache__" not in name and (ROOT / folder / name).is_file()}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_has_every_file_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {f"{place}/{name}" for place, folder in PLACES.items() for name in files_of(folder)}
    assert found == wanted
    assert {"qwen_megakernel/py.typed", "pipecat_client/py.typed"} < found
    assert "qwen_megakernel/csrc/kernel_tts.cu" in found


def test_says_what_it_needs(wheel):
    metadata = metadata_of(wheel)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"server", "pipecat", "ray"}
    needed = metadata.get_all("Requires-Dist")
    assert all("extra ==" in line for line in needed)
    of_extras = (("server", "torch"), ("server", "starlette"), ("pipecat", "pipecat-ai"), ("ray", "ray"))
    for extra, package in of_extras:
        assert [line for line in needed if line.startswith(package) and f'extra == "{extra}"' in line], (
            extra,
            package,
        )


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]


def test_speaks_from_another_folder(full, tmp_path):
    spoken = run(full / "qwen-megakernel", "demo", "--folder", "here", cwd=tmp_path, limit_s=180)
    assert spoken.returncode == 0, spoken.stdout + spoken.stderr
    assert "finished: stop" in spoken.stdout
    with wave.open(str(tmp_path / "here" / "demo.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
    assert len(samples) > 2 * 24_000
    assert np.sqrt(np.mean(samples**2)) > 300


def test_kernel_sources_are_found(bare, tmp_path):
    program = (
        "from qwen_megakernel.installation.bundled import bundled_folder; print(bundled_folder('csrc'))"
    )
    sources = Path(run(bare / "python", "-c", program, cwd=tmp_path).stdout.strip())
    assert sources.is_relative_to(bare.parent)
    assert (sources / "kernel_tts.cu").read_bytes() == (ROOT / "csrc" / "kernel_tts.cu").read_bytes()


def test_doctor_knows_the_requirements(full, tmp_path):
    program = (
        "from qwen_megakernel.tools.doctor import INSTALL, check_packages, read_requirements;"
        "print(check_packages(read_requirements())); print(INSTALL)"
    )
    found, install = run(full / "python", "-c", program, cwd=tmp_path).stdout.splitlines()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    count = sum(1 for line in lines if line and not line.startswith("#"))
    assert f"all {count} as required" in found
    assert install == "pip install 'qwen-megakernel[server]'"


def test_a_command_without_its_packages_says_so_in_one_line(bare, tmp_path):
    listing = run(bare / "qwen-megakernel", "--help", cwd=tmp_path)
    assert listing.returncode == 0, listing.stderr
    assert listing.stdout.startswith("usage: qwen-megakernel COMMAND")
    for command in ("serve", "say", "demo", "doctor", "build", "bench"):
        assert f"\n  {command} " in listing.stdout
    for command in (["serve"], ["say", "--text", "Hello."]):
        said = run(bare / "qwen-megakernel", *command, cwd=tmp_path)
        assert said.returncode == 1
        assert said.stderr.count("\n") == 1
        assert "is not installed: pip install 'qwen-megakernel[server]'" in said.stderr
