"""A process of `bench --against`: it drives one version of this package, request by request.

`bench.against` runs this file as a script, `python -P worker.py TREE DEVICE`, with another tree first on
the import path. So the script imports nothing of its own package by name. `MODULES` has what it needs of
a version. A request is a line of JSON on standard input. Its reply is a line on standard output. The
version's own output goes to standard error.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = "qwen_megakernel"
MODULES = {
    "build": ("build_tts",),
    "codec": ("codec.cuda_stream", "codec_cuda"),
    "config": ("config",),
    "kernel": ("decoding.kernel_backend", "megakernel"),
    "shapes": ("synth.config", "synth_config"),
    "torch": ("decoding.torch_backend", "decoder"),
    "tts": ("tts_model",),
    "turn": ("turn",),
    "weights": ("synth.checkpoint", "synth_checkpoint"),
}
"""What the worker uses of a version, and the modules that may have it, the newest name first."""

NUM_SLOTS = 8
PROMPT_ROWS = (138, 9, 61, 3, 140, 17, 52, 30)
"""For each stream. Prompts of 49 rows and more go through the CUDA graph, in pieces of 128. The rest
goes through the frame kernel. The first prompt uses both."""
WARM_UP = 10
"""Frames before the timed ones. On a CPU there are a third as many."""
WARM_UP_TURNS = 3
TURN_FRAMES = 2
"""Frames of a timed turn. The first one goes to the codec while the second is launched."""
SPEECH_FRAMES = 12
"""Frames of the turn whose samples are compared."""
TURN_TIMEOUT_S = 60.0
SENTENCE = "The train to the coast leaves at nine, so please be on time."


def find_module(role: str) -> ModuleType:
    """The first module of `MODULES[role]` that this version has. Raises `ModuleNotFoundError`."""
    for name in (f"{PACKAGE}.{place}" for place in MODULES[role]):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but something that it imports does not
            missing = error
    raise missing


def device_times(launch: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds from the end of a launch to the end of the next. All are queued back to back."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(WARM_UP):
        launch()
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in pairwise(events)]


def host_times(run: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of each run on the host's clock."""
    times = []
    for _ in range(WARM_UP // 3 + repeats):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return times[-repeats:]


def weights_digest(module: torch.nn.Module) -> int:
    """A sum over the bits of all bf16 weights. Different weights explain different codes."""
    return sum(
        int(weight.detach().view(torch.int16).sum(dtype=torch.int64))
        for weight in module.state_dict().values()
        if weight.device.type != "meta"
    )


class Worker:
    """One version on one device. A request names a public method."""

    def __init__(self, tree: Path, device: torch.device) -> None:
        """Import all that is needed, so that no request waits for an import.

        Args:
            tree: the root of the version's tree.
            device: `cpu` or `cuda:N`.

        Raises:
            RuntimeError: the imported package is not the tree's.
        """
        self._modules = {role: find_module(role) for role in MODULES}
        home = Path(str(sys.modules[PACKAGE].__file__)).resolve()
        if not home.is_relative_to(tree.resolve()):
            raise RuntimeError(f"{PACKAGE} came from {home.parent}, not from {tree}")
        self._device, self._on_gpu = device, device.type == "cuda"
        self._backend: Any = None
        self._rows = torch.zeros(0)
        self._tts: Any = None

    def ready(self) -> dict[str, Any]:
        """Answer when the imports are done."""
        return {}

    def build(self, shapes: Sequence[str]) -> dict[str, Any]:
        """Compile the frame kernel of each shape and the codec's kernels, in parallel."""
        build = self._modules["build"]
        arch = build.detect_arch(self._device)
        libraries = [build.frame_library(self._config(shape), arch) for shape in shapes]
        # Older trees have one library for all architectures.
        codec = getattr(build, "codec_library", lambda _: self._modules["codec"].LIBRARY)
        libraries.append(codec(arch))
        with ThreadPoolExecutor(len(libraries)) as threads:
            list(threads.map(lambda library: build.build(library, arch), libraries))
        return {}

    def codes(self, shape: str, streams: Sequence[int], frames: int) -> dict[str, Any]:
        """Decode with random weights.

        Args:
            shape: of the weights.
            streams: how many decode together. Each number gets new slots.
            frames: to decode.

        Returns:
            `weights`, their digest; `codes` by number of streams: [frames, streams, 16].
        """
        weights, backend = self._random_backend(shape, max(PROMPT_ROWS) + frames)
        hidden = self._config(shape).talker.hidden_size
        rows = _normal(1, max(PROMPT_ROWS), hidden)
        found = {}
        for n in streams:
            text = _normal(2, frames, n, hidden)
            for slot in range(n):
                backend.prefill(slot, rows[: PROMPT_ROWS[slot]], self._params(seed=1000 + slot))
            found[str(n)] = [
                backend.launch(range(n), frame.to(self._device)).codes().tolist() for frame in text
            ]
            for slot in range(n):
                backend.release(slot)
        del backend
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
        return {"weights": weights, "codes": found}

    def load(self, shape: str, checkpoint: str, longest: int, repeats: int) -> dict[str, Any]:
        """Prepare to `measure`: a backend with random weights, and a checkpoint that speaks.

        Args:
            shape: of the random weights.
            checkpoint: a folder.
            longest, repeats: the last position, and the number of frames that are timed there.

        Returns:
            `speech`: a digest of the samples of a turn.
        """
        max_positions = longest + repeats + 2 * WARM_UP
        _, self._backend = self._random_backend(shape, max_positions)
        self._rows = _normal(1, max_positions, self._config(shape).talker.hidden_size)
        self._tts = self._modules["tts"].TTSDecoder.load(
            checkpoint,
            backend="megakernel" if self._on_gpu else "torch",
            device=str(self._device),
            num_slots=NUM_SLOTS,
            max_positions=1024,
            offline=True,
        )
        for seed in range(WARM_UP_TURNS):
            self._turn(seed, TURN_FRAMES)
        _, samples = self._turn(0, SPEECH_FRAMES)
        return {"speech": hashlib.sha256(b"".join(samples)).hexdigest()}

    def measure(
        self, streams: Sequence[int], positions: Sequence[int], repeats: int, turns: int
    ) -> dict[str, list[float]]:
        """Microseconds of every timed frame and turn, by figure.

        Args:
            streams, positions: of the frames.
            repeats: frames to time for each pair of these. They lie around the position.
            turns: to time, one after the other.
        """
        figures = {
            f"frame, {n} stream{'s' * (n > 1)} at {position}": self._frame_times(n, position, repeats)
            for n in streams
            for position in positions
        }
        figures["TTFC"] = [self._turn(seed, TURN_FRAMES)[0] for seed in range(turns)]
        if self._on_gpu:
            torch.cuda.synchronize()  # the next measurement has the GPU to itself
        return figures

    def close(self) -> None:
        """End the engine's thread."""
        if self._tts is not None:
            self._tts.close()

    def _config(self, shape: str) -> Any:
        return self._modules["shapes"].shape_config(shape)

    def _params(self, **fields: int) -> Any:
        return self._modules["config"].GenerationParams(**fields)

    def _random_backend(self, shape: str, max_positions: int) -> tuple[int, Any]:
        """A backend with random weights, and a digest of them. It is fp32 on a CPU and bf16 on a GPU."""
        config = self._config(shape)
        talker = self._modules["weights"].random_talker(config, self._device)
        digest = weights_digest(talker)
        sizes = {"num_slots": NUM_SLOTS, "max_positions": max_positions}
        if not self._on_gpu:
            make = self._modules["torch"].TorchBackend
            return digest, make(talker.float(), config.talker, config.predictor, **sizes)
        build = self._modules["build"]
        arch = build.detect_arch(self._device)
        library = build.build(build.frame_library(config, arch), arch)
        make = self._modules["kernel"].MegakernelBackend
        return digest, make(talker, config.talker, config.predictor, library=library, **sizes)

    def _frame_times(self, streams: int, position: int, repeats: int) -> list[float]:
        slots, backend = range(streams), self._backend
        rows = self._rows[: max(2, position - repeats // 2 - WARM_UP)]
        text = torch.zeros(streams, rows.shape[1], device=self._device)
        for slot in slots:
            backend.prefill(slot, rows, self._params(seed=slot))
        if self._on_gpu:
            times = device_times(lambda: backend.launch(slots, text), repeats)
        else:
            times = host_times(lambda: backend.launch(slots, text).codes(), repeats)
        for slot in slots:
            backend.release(slot)
        return times

    def _turn(self, seed: int, frames: int) -> tuple[float, list[bytes]]:
        """Speak one turn. Returns the microseconds from `open_turn` to its first audio, and its
        samples."""
        turn, heard, finished = self._modules["turn"], [], threading.Event()

        def sink(event: Any) -> None:
            if isinstance(event, turn.Audio):
                heard.append((time.perf_counter(), event.samples))
            elif isinstance(event, turn.Finished):
                finished.set()

        params = self._params(seed=seed, min_frames=frames, max_frames=frames)
        started = time.perf_counter()
        self._tts.open_turn(SENTENCE, sink=sink, ended=True, params=params)
        if not finished.wait(TURN_TIMEOUT_S) or not heard:
            raise RuntimeError("a turn gave no audio")
        return 1e6 * (heard[0][0] - started), [samples.tobytes() for _, samples in heard]


def _normal(seed: int, *shape: int) -> torch.Tensor:
    """Random values, fp32 on the CPU. They are the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    device = torch.device(sys.argv[2])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # on a busy CPU, threads that wait for each other make times useless
    worker = Worker(Path(sys.argv[1]), device)
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
