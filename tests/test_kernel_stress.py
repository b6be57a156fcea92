"""The frame kernel in long runs: with changing streams, beside other work, and under the sanitizer."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

if torch.cuda.is_available():
    from kernel_twins import build_kernel, make_kernel

SLOTS = 48
POSITIONS = 400
CHECKED_STREAMS = 24
"""The number of streams that are decoded again, alone, at the end."""


@dataclass
class Life:
    """A stream from its prompt to its release."""

    seed: int
    rows: int
    codes: list[torch.Tensor] = field(default_factory=list)

    def params(self) -> GenerationParams:
        return GenerationParams(seed=self.seed)


class Crowd:
    """Streams that come and go at random on one backend."""

    def __init__(self, kernel: MegakernelBackend, hidden: int, seed: int) -> None:
        self.kernel, self.random = kernel, random.Random(seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        self.prompt = torch.randn(64, hidden, device="cuda", generator=generator)
        self.text = torch.zeros(kernel.max_batch, hidden, device="cuda")
        self.live: dict[int, Life] = {}
        self.gone: list[Life] = []
        self.joined = 0

    def step(self) -> None:
        """A stream may come or go. Then decode one frame of some of the live streams."""
        free = [slot for slot in range(SLOTS) if slot not in self.live]
        if free and (not self.live or self.random.random() < 0.05):
            self.join(self.random.choice(free))
        count = self.random.randint(1, self.kernel.max_batch)
        slots = self.random.sample(sorted(self.live), min(len(self.live), count))
        codes = self.kernel.decode(slots, self.text[: len(slots)])
        for slot, row in zip(slots, codes, strict=True):
            life = self.live[slot]
            life.codes.append(row)
            if life.rows + len(life.codes) > POSITIONS or self.random.random() < 0.01:
                self.leave(slot)

    def join(self, slot: int) -> None:
        life = Life(self.joined, self.random.randint(1, len(self.prompt)))
        self.kernel.prefill(slot, self.prompt[: life.rows], life.params())
        self.live[slot] = life
        self.joined += 1

    def leave(self, slot: int) -> None:
        self.kernel.release(slot)
        self.gone.append(self.live.pop(slot))
        if len(self.gone) > 4 * CHECKED_STREAMS:  # keep a random choice of all
            self.gone.pop(self.random.randrange(len(self.gone)))

    def check_alone(self) -> int:
        """Decode some of the streams again, alone: the codes are the same. Returns how many frames."""
        for slot in list(self.live):
            self.leave(slot)
        frames = 0
        for life in self.random.sample(self.gone, CHECKED_STREAMS):
            self.kernel.prefill(0, self.prompt[: life.rows], life.params())
            alone = torch.cat([self.kernel.decode([0], self.text[:1]) for _ in life.codes])
            self.kernel.release(0)
            assert torch.equal(alone, torch.stack(life.codes)), f"stream {life.seed}"
            frames += len(alone)
        return frames


class OtherWork:
    """Kernels, copies and memsets on another CUDA stream, queued between frames and never awaited."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a = torch.randn(512, 512, device="cuda")
        self.b = torch.zeros(1 << 20, device="cuda")

    def queue(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            if number % 3 == 0:
                torch.mm(self.a, self.a, out=self.a).clamp_(-1, 1)
            elif number % 3 == 1:
                self.b.zero_()
            else:
                self.b[: len(self.b) // 2].copy_(self.b[len(self.b) // 2 :])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("shape", "frames", "limit_s"), [("tiny", 100_000, 240), ("0.6b", 100_000, 45)])
def test_streams_come_and_go_beside_other_work(shape, frames, limit_s, report):
    """100,000 frames of the small shape, and as many of the true one as the time allows."""
    config = shape_config(shape)
    kernel = make_kernel(shape, random_talker(config, "cuda"), num_slots=SLOTS, max_positions=512)
    # The tags begin anew after 20 frames. An old tag must not count as a new one.
    kernel._epoch = 2**32 - 20 * kernel._num_tags
    crowd, other = Crowd(kernel, config.talker.hidden_size, seed=3), OtherWork()
    start, done, early = time.monotonic(), 0, None
    while done < frames and time.monotonic() - start < limit_s:
        crowd.step()
        other.queue(done)
        done += 1
        if done == 2000:
            early = torch.cuda.memory_allocated(), resident_bytes()
    lasted = time.monotonic() - start
    torch.cuda.synchronize()
    again = crowd.check_alone()
    late = torch.cuda.memory_allocated(), resident_bytes()
    report(
        f"{shape}: {done} frames, {crowd.joined} streams in {lasted:.0f} s; {again} frames of "
        f"{CHECKED_STREAMS} streams equal alone; device memory {late[0] - early[0]:+d} bytes, "
        f"host {(late[1] - early[1]) / 1e6:+.1f} MB"
    )
    assert shape == "0.6b" or done == frames
    assert abs(late[0] - early[0]) < 1 << 20
    assert late[1] - early[1] < 64 << 20


SANITIZED = """
import sys
import torch
from kernel_twins import make_kernel
from qwen_megakernel.decoding import kernel_backend as megakernel
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

megakernel.TalkerPrefill = lambda *_, **__: None  # PyTorch's kernels; racecheck fails on them
config = shape_config("tiny")
talker = random_talker(config, "cuda")
options = {"grid": 8, "max_spins": 2**31 - 1, "num_slots": 10, "max_positions": 64}
kernel = make_kernel("tiny", talker, racecheck=sys.argv[1] == "racecheck", **options)
rows = torch.zeros(12, config.talker.hidden_size)
for slot in range(10):
    kernel.prefill(slot, rows[: 9 + slot % 2], GenerationParams(seed=slot))
for slots in ([0, 1], [0, 1, 2, 3, 4], list(range(10))):
    print("codes", kernel.decode(slots, rows[: len(slots)]).tolist(), flush=True)
"""
SUMMARIES = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
}


@pytest.mark.parametrize("tool", SUMMARIES)
def test_the_sanitizer_finds_nothing(tool):
    """The small shape on eight CTAs. The tool watches only the frame kernel, so that it ends in time.

    For racecheck, lanes copy the weights instead of the copy engine (csrc/ring.cuh).
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        pytest.skip("no compute-sanitizer")
    build_kernel("tiny", racecheck=tool == "racecheck")  # without the tool
    only = ["--kernel-name", "kns=frame_kernel", "--report-api-errors", "no"]
    child = subprocess.run(
        [program, "--tool", tool, *only, sys.executable, "-c", SANITIZED, tool],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-1000:]
    assert child.stdout.count("codes [[") == 3
    assert SUMMARIES[tool] in child.stdout, child.stdout[-3000:]
