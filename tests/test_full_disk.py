"""A disk without room, and a reader that leaves: one line at most, and nothing half-written stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from live_server import ROOT, LiveServer, collect, send

from qwen_megakernel.installation.nvrtc import find_compiler

IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
SMALL_DISK = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'


def on_small_disk(folder: Path, size: str, *command: str) -> subprocess.CompletedProcess:
    """Run a command for which `folder` is a disk of that size and the kernel cache."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*IN_NAMESPACE, "sh", "-c", SMALL_DISK, "sh", "4k", str(folder), "true"], capture_output=True
        ).returncode
    ):
        pytest.skip("a small disk cannot be mounted here")
    return subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", SMALL_DISK, "sh", size, str(folder), sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "QWEN_MEGAKERNEL_CACHE": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


FILL = """
import contextlib, os, sys
def fill(room):
    "Leave so many bytes of the cache's disk."
    with open(os.environ["QWEN_MEGAKERNEL_CACHE"] + "/filler", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room))
"""
BUILD = (
    FILL
    + """
from pathlib import Path
from qwen_megakernel import build_tts
from qwen_megakernel.tools.build import KernelBuild, build_all
fill(int(sys.argv[1]))
build_tts.SOURCES = Path(sys.argv[2])
library = build_tts.Library("many", "many.cu", header="")
print(build_all([KernelBuild(library, "90a")]))
print(sorted(path.name for path in build_tts.cache_folder().iterdir() if path.is_dir()))
"""
)
KERNEL = 'extern "C" __global__ void many(float* x) { x[threadIdx.x] *= 2.f; }\n'


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler")
@pytest.mark.parametrize("room", [0, 4096, 12_288])
def test_a_kernel_that_has_no_room_fails_in_a_line(tmp_path, room):
    disk, sources = tmp_path / "disk", tmp_path / "csrc"
    disk.mkdir()
    sources.mkdir()
    (sources / "many.cu").write_text(KERNEL)
    result = on_small_disk(disk, "256k", "-c", BUILD, str(room), str(sources))
    assert result.stderr == ""
    *told, products, folders = result.stdout.splitlines()
    assert (products, folders) == ("[None]", "[]")
    assert "failed: " in told[-1]
    assert "No space left on device" in told[-1]


TUNE = (
    FILL
    + """
from qwen_megakernel.installation import kernel_tuning
from qwen_megakernel.installation.kernel_tuning import Setting, Target, Tuning
target = Target("GPU", 132, "90a", "large", "kHidden = 1024", "0" * 16)
Tuning(target, Setting(ring_slots=14), {"1": (0.9, 0.95)}).save()
fill(int(sys.argv[1]))
try:
    Tuning(target, Setting(ring_slots=18), {str(n): (0.9, 0.95) for n in range(500)}).save()
except OSError as error:
    print(error.strerror)
print(kernel_tuning.find(target, print).setting.ring_slots)
print(sorted(os.listdir(os.environ["QWEN_MEGAKERNEL_CACHE"])))
"""
)


@pytest.mark.parametrize("room", [0, 4096])
def test_a_tuning_that_has_no_room_leaves_the_one_before(tmp_path, room):
    result = on_small_disk(tmp_path, "64k", "-c", TUNE, str(room))
    assert result.stderr == ""
    error, ring_slots, files = result.stdout.splitlines()
    assert (error, ring_slots) == ("No space left on device", "14")
    assert files == "['filler', 'tuning-GPU-large-1024.json']"


@pytest.mark.slow
def test_a_server_whose_log_has_no_room_goes_on(brief_base, recording):
    """Log and banner go to a full disk: turns are spoken, and SIGTERM ends the server properly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--model", str(brief_base), "--speaker-ref", str(recording), "--port", str(port))
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "server.py"), *options], stdout=full, stderr=full, cwd=ROOT
        )
    server = LiveServer.__new__(LiveServer)
    server.process, server.port, server._readers = process, port, []
    try:
        wait_until_ready(server)
        for _ in range(3):
            with server.connect() as client:
                client.send("{")
                assert json.loads(client.recv(timeout=120))["code"] == "bad_request"
                send(client, text="Hello there.", seed=1)
                assert collect(client)[1]["samples"] > 0
        assert server.stop(signal.SIGTERM) == 0
    finally:
        server.kill()


def wait_until_ready(server: LiveServer, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert server.process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/ready", timeout=60):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server is not ready")


def test_a_reader_of_the_output_that_leaves_is_no_error():
    """As `protocol-schema | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qwen_megakernel", "protocol-schema"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
