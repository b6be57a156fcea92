"""`python -m qwen_megakernel tune`: finds the frame kernel's fastest setting on this GPU for the server.

Every setting must draw the same codes, which is checked. A setting is kept only if it certainly beats
the default, both for one stream and for as many as share a frame.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.bench.against import CONFIDENCE
from qwen_megakernel.bench.frame_kernel import LiveSlots, Prompts
from qwen_megakernel.bench.setting_search import (
    L2_SHARES,
    Trial,
    confirm,
    grid_candidates,
    ring_candidates,
    search,
)
from qwen_megakernel.bench.worker import WARM_UP, device_times
from qwen_megakernel.build_tts import FORMS, BuildError, build, frame_library
from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.config import ConfigError, ModelConfig
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.engine.backends import tuning_target
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.installation.kernel_tuning import Setting, Target, Tuning
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import SHAPES
from qwen_megakernel.tools.build import DEFAULT_MODEL, find_config
from qwen_megakernel.tts_model import choose_device

INSTANCES = 3
"""Copies of the packed weights. Their addresses move a figure. With fewer copies the bound would be too
narrow."""
STREAMS = (1, 8)
"""Numbers of streams for which frames are timed."""
REPEATS = 50
"""Frames of a measurement."""
POSITION = 200
"""The timed frames lie around this position."""
CODE_ROWS, CODE_FRAMES = 230, 64
"""Prompt rows and frames whose codes are compared. Within these frames attention gets a second item."""
LEAST_RING_SLOTS = 8
"""The kernel's own limit, which is half of its computing warps (csrc/shared_memory.cuh)."""

_started = time.monotonic()


def tell(line: str) -> None:
    """Print progress to stderr. stdout is for the table."""
    print(f"{time.monotonic() - _started:5.1f} s  {line}", file=sys.stderr, flush=True)


# --- kernels on the device -----------------------------------------------------------------------


class KernelInstance:
    """One copy of the packed weights, on which every build can run."""

    def __init__(
        self, config: ModelConfig, talker: Talker, libraries: dict[int | None, Path], prompts: Prompts
    ) -> None:
        """Pack the weights.

        Args:
            config: the shape.
            talker: bf16, on the GPU.
            libraries: builds by `Setting.ring_slots`. The default's is under None.
            prompts: fill the slots.
        """
        self._libraries, self._prompts = libraries, prompts
        self._hidden, self._device = config.talker.hidden_size, talker.codec_head.weight.device
        self._backend = MegakernelBackend(
            talker, config.talker, config.predictor, library=libraries[None],
            max_positions=CODE_ROWS + CODE_FRAMES + REPEATS + 2 * WARM_UP,
        )  # fmt: skip
        self._expected: list[Tensor] | None = None
        self.streams = STREAMS
        self.max_grid = self._backend.max_grid

    def frame_time(self, setting: Setting, streams: int) -> float:
        """Microseconds of a frame: the median of frames that are queued back to back."""
        self._backend.load_kernel(self._libraries[setting.ring_slots], setting)
        text = torch.zeros(streams, self._hidden, device=self._device)
        rows = POSITION - REPEATS // 2 - WARM_UP
        with LiveSlots(self._prompts, self._backend, streams, rows):
            times = device_times(lambda: self._backend.launch(range(streams), text), REPEATS)
        return float(np.median(times))

    def draws_default_codes(self, setting: Setting) -> bool:
        """Whether the codes are those of the default setting, bit for bit."""
        if self._expected is None:
            self._expected = self._codes(Setting())
        return all(map(torch.equal, self._codes(setting), self._expected))

    def _codes(self, setting: Setting) -> list[Tensor]:
        """Codes [frames, n, 16] for each number of streams n."""
        self._backend.load_kernel(self._libraries[setting.ring_slots], setting)
        found = []
        for n in self.streams:
            text = torch.zeros(n, self._hidden, device=self._device)
            with LiveSlots(self._prompts, self._backend, n, CODE_ROWS):
                frames = [self._backend.decode(range(n), text) for _ in range(CODE_FRAMES)]
            found.append(torch.stack(frames))
        return found


def build_rings(config: ModelConfig, target: Target) -> dict[int | None, Path]:
    """Build the default kernel and kernels with other rings, by number of slots.

    Raises:
        BuildError: the default cannot be built. Others that cannot be built are left out.
    """
    default = build(frame_library(config, target.arch, target.form), target.arch, tell)
    sizes = read_cubin(default).facts
    slots = ring_candidates(sizes["ring_slots"], LEAST_RING_SLOTS, sizes["most_ring_slots"])

    def build_ring(count: int) -> Path | None:
        try:
            library = frame_library(config, target.arch, target.form, ring_slots=count)
            return build(library, target.arch)
        except BuildError as error:
            tell(f"a ring of {count} slots is not tried: {error}")
            return None

    tell(f"building kernels with rings of {', '.join(map(str, slots)) or 'no other number of'} slots")
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        built = dict(zip(slots, threads.map(build_ring, slots), strict=True))
    return {None: default} | {count: path for count, path in built.items() if path is not None}


class Bench:
    """Random weights on the device, and the builds that run on them."""

    def __init__(
        self, config: ModelConfig, device: torch.device, libraries: dict[int | None, Path]
    ) -> None:
        """Make the weights. The arguments are those of `KernelInstance`."""
        self._shape = (config, random_talker(config, device), libraries)
        self._prompts = Prompts(config, device, CODE_ROWS)

    def _pack(self) -> list[KernelInstance]:
        tell(f"packing random weights {INSTANCES} times")
        return [KernelInstance(*self._shape, self._prompts) for _ in range(INSTANCES)]

    def search(self) -> tuple[Setting, list[Trial], tuple[int, ...]]:
        """Returns the setting that won, all trials, and the numbers of streams that were timed."""
        instances, trials = self._pack(), list[Trial]()
        first, config, libraries = instances[0], self._shape[0], self._shape[2]

        def report(trial: Trial) -> None:
            tell(f"{trial.setting}: {verdict(trial)}")
            trials.append(trial)

        knobs = {
            "ring_slots": [slots for slots in libraries if slots is not None],
            "grid": grid_candidates(config, first.max_grid, first.streams[-1]),
            "l2_share": L2_SHARES,
        }
        timers = [instance.frame_time for instance in instances]
        best = search(knobs, first.streams, timers, first.draws_default_codes, report)
        return best, trials, first.streams

    def confirm(self, setting: Setting, streams: Sequence[int]) -> Trial:
        """Compare the setting with the default, on other copies of the weights."""
        tell(f"{setting}: comparing it with the default once more")
        return confirm(setting, streams, [instance.frame_time for instance in self._pack()])


# --- showing and keeping -------------------------------------------------------------------------


def verdict(trial: Trial) -> str:
    """The result of a trial, in a word or two."""
    if not trial.same_codes:
        return "draws other codes"
    if trial.is_faster:
        return "faster"
    return "slower" if trial.worst > 1 else "not faster beyond doubt"


def table(trials: Sequence[Trial], streams: Sequence[int]) -> str:
    """A Markdown table of the trials."""
    names = [f"{n} stream{'s' * (n > 1)} (at most)" for n in streams]
    rows = [["tried", "beside", *names, ""], ["---"] * (3 + len(names))]
    for trial in trials:
        figures = [
            "{:.4f} ({:.4f})".format(*trial.ratios[n]) if n in trial.ratios else "-" for n in streams
        ]
        rows.append([str(trial.setting), str(trial.base), *figures, verdict(trial)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def keep(target: Target, final: Trial | None) -> str:
    """Write the tuning. If nothing beats the default, remove a tuning that is there. Says what was done.

    Args:
        target: what was tuned.
        final: the setting that won, in comparison with the default. None if none won.

    Raises:
        OSError: the tuning cannot be written.
    """
    if final is None or not final.is_faster:
        target.path.unlink(missing_ok=True)
        return (
            "Kept: the default. No setting beats it for every number of streams "
            f"with {100 * CONFIDENCE:.0f} % confidence."
        )
    tuning = Tuning(target, final.setting, {str(n): figures for n, figures in final.ratios.items()})
    return f"Kept: {tuning}.\nThe server uses it from its next start on: {tuning.save()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m qwen_megakernel tune`."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL",
        help=f"whose shape: {', '.join(SHAPES)}, a checkpoint on disk, or a Hugging Face id in the "
        f"cache; weights are random (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--form", choices=FORMS, default="auto",
        help="of the frame kernel; a server takes auto (default), so that another is not used there",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Tune, print the trials, keep the winner. Returns 1 if this cannot be done."""
    try:
        device = choose_device(args.device)
        if device.type != "cuda":
            raise BuildError("tuning needs a CUDA GPU, and torch finds none; see `doctor`")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        config = find_config(args.model)
        target = tuning_target(config, device, args.form)
        bench = Bench(config, device, build_rings(config, target))
        best, trials, streams = bench.search()
        if best != Setting():
            trials.append(bench.confirm(best, streams))
        print(
            f"{target.gpu}, {target.sms} SMs, {target.form} form, {args.model}: time of a frame at "
            f"position {POSITION} over that of the setting beside it\n"
        )
        print(table(trials, streams))
        print(f"\n{keep(target, trials[-1] if best != Setting() else None)}")
    except (CheckpointError, ConfigError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
