"""The cost of a tick stays as recorded: operators, waits, uploads and new tensors.

A tick is one round of the engine: a frame of every turn that speaks. On a CPU the test counts the calls
that would wait for a GPU or upload to it. So a copy that a change adds to a tick shows without a GPU.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_records import FOLDER, Golden
from listener import TEXT, Listener
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.turn import Finished

TORCH = "2.13"
"""The records hold for this version of torch: other versions dispatch other operators."""
WAITS = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
UPLOADS = {"tensor", "as_tensor", "from_numpy", "asarray"}
CYCLE = 8
"""Ticks after which the work repeats: `sampling.Draws` makes the noise of so many frames at a time."""
TICKS = {0: "the first tick", 1: "a tick", CYCLE: "a tick that makes noise"}
"""The ticks that are counted, by the number of their frame."""

Counts = dict[str, Counter]
"""Counts by part of a tick."""


class _Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, and the storages that they allocate."""

    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._count("operators")
        for _ in {_storage(x) for x in tree_leaves(out) if isinstance(x, Tensor)} - known:
            self._count("allocations")
        return out


class _Calls(TorchFunctionMode):
    """Counts the calls that would wait for a GPU, or upload to it."""

    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS:
            self._count(f"waits: {name}")
        if name in UPLOADS:
            self._count(f"uploads: {name}")
        return func(*args, **(kwargs or {}))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class TickCounter:
    """Counts what the engine's thread does in each tick, by part.

    The parts follow the engine's seams: `prefill`, `frame` (its launch), `codes` (the wait for them),
    `codec`, `sound` (the wait for it), and `engine` for everything else.
    """

    def __init__(self, tts: TTSDecoder) -> None:
        self.counts: dict[int, Counts] = {}
        """Counts of each frame in `TICKS`."""
        self._part = "engine"
        self._frame = -1
        self._streams: list[int] = []
        """The streams of each frame so far."""
        engine = tts._engine
        engine._backend, engine._codec = _Parts(engine._backend, self), _Parts(engine._codec, self)
        tick = engine._tick

        def counted() -> bool:
            self._frame = len(self._streams)
            if self._frame not in TICKS:
                return tick()
            self.counts[self._frame] = {}  # an earlier tick may have launched no frame
            with _Calls(self._count), _Operators(self._count):
                return tick()

        engine._tick = counted

    def begin(self) -> None:
        """Forget the counts. The next frame is frame 0."""
        self.counts.clear()
        self._streams.clear()

    def check_streams(self, num_streams: int) -> None:
        """Check that every frame had so many streams."""
        assert set(self._streams) == {num_streams}

    def _count(self, what: str) -> None:
        self.counts[self._frame].setdefault(self._part, Counter())[what] += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose work counts for a part."""

        def call(*args: Any) -> Any:
            with self.part(name):
                return function(*args)

        return call

    def see_streams(self, count: int) -> None:
        self._streams.append(count)


class _Parts:
    """A backend or a codec whose work counts for its parts."""

    def __init__(self, real: Any, counter: TickCounter) -> None:
        self._real, self._counter = real, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def prefill(self, *args: Any) -> None:
        with self._counter.part("prefill"):
            self._real.prefill(*args)

    def reset(self, slot: int) -> None:
        with self._counter.part("prefill"):
            self._real.reset(slot)

    def launch(self, slots: Sequence[int], rows_or_codes: Tensor) -> Any:
        of_codec = hasattr(self._real, "reset")
        if not of_codec:
            self._counter.see_streams(len(slots))
        with self._counter.part("codec" if of_codec else "frame"):
            launched = self._real.launch(slots, rows_or_codes)
        if of_codec:
            return replace(launched, samples=self._counter.named("sound", launched.samples))
        return replace(launched, codes=self._counter.named("codes", launched.codes))


def speak_together(
    tts: TTSDecoder, num_streams: int, num_frames: int, begin: Callable[[], None] = lambda: None
) -> None:
    """Speak turns of one length, which begin and end in the same ticks. Calls `begin` before them."""
    ready, go = threading.Event(), threading.Event()

    def hold_the_engine(event) -> None:
        if isinstance(event, Finished):  # on the engine's thread, so nothing begins in between
            ready.set()
            go.wait(60)

    tts.open_turn("Hi.", sink=hold_the_engine, ended=True, params=GenerationParams(max_frames=1))
    assert ready.wait(240)
    begin()
    listeners = [Listener() for _ in range(num_streams)]
    for seed, listener in enumerate(listeners):
        params = GenerationParams(seed=seed, min_frames=num_frames, max_frames=num_frames)
        tts.open_turn(TEXT, sink=listener, ended=True, params=params)
    go.set()
    for listener in listeners:
        assert listener.wait().num_frames == num_frames


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden("golden_ticks", request.config.getoption("--record"))


@pytest.fixture(scope="module")
def counted(tiny_custom_voice) -> Iterator[tuple[TTSDecoder, TickCounter]]:
    if not torch.__version__.startswith(f"{TORCH}."):
        pytest.skip(f"the records are of torch {TORCH}, this is {torch.__version__}")
    with TTSDecoder.load(tiny_custom_voice, num_slots=4, device="cpu", backend="torch") as tts:
        yield tts, TickCounter(tts)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_ticks_cost_what_is_recorded(golden, counted, num_streams):
    tts, counter = counted
    speak_together(tts, num_streams, 1)  # allocates all that is kept for such frames
    speak_together(tts, num_streams, CYCLE + 1, counter.begin)
    counter.check_streams(num_streams)
    name = f"streams: {num_streams}"
    found = {
        tick: {part: dict(sorted(counts[part].items())) for part in sorted(counts)}
        for frame, tick in TICKS.items()
        if (counts := counter.counts[frame])
    }
    if golden.recording:
        golden.write(name, found)
        pytest.skip("recorded")
    record = golden.case(name)
    for tick in TICKS.values():
        for part in sorted(record[tick].keys() | found[tick].keys()):
            one, other = (side[tick].get(part, {}) for side in (record, found))
            if one != other:
                golden.fail(name, f"{tick}, {part}: {other}, the record has {one}")


# --- on a GPU -------------------------------------------------------------------------------------

GPU_RECORD = FOLDER / "gpu_ticks.json"
"""Counts of a tick, by GPU architecture and PyTorch version, then by number of streams."""
MAX_WAITS = 2
"""The engine waits for a frame's codes and for a frame's sound. Both are events."""
_RUNTIME = ("Launch", "Synchronize", "Malloc", "HostAlloc", "Memcpy", "Memset", "EventRecord")


def device_counts(tts: TTSDecoder, num_streams: int, num_frames: int) -> Counter:
    """Calls of the CUDA runtime and work of the GPU for turns of a length."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiler:
        speak_together(tts, num_streams, num_frames)
        torch.cuda.synchronize()
    counts: Counter = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next((k for k in ("Memcpy", "Memset") if event.name.startswith(k)), "kernels")
            counts[f"GPU: {kind}"] += 1
        elif event.name.startswith("cuda") and any(word in event.name for word in _RUNTIME):
            counts[event.name] += 1
    return counts


def counts_a_tick(tts: TTSDecoder, num_streams: int) -> dict[str, float]:
    """Counts of a tick in the steady state: from `CYCLE` more frames, so without beginning and end."""
    speak_together(tts, num_streams, 2 * CYCLE)
    short, long = (device_counts(tts, num_streams, cycles * CYCLE) for cycles in (2, 3))
    names = sorted(short.keys() | long.keys())
    return {name: each for name in names if (each := (long[name] - short[name]) / CYCLE)}


@pytest.mark.gpu
@pytest.mark.parametrize("num_streams", [1, 3])
def test_ticks_cost_a_gpu_what_is_recorded(request, tiny_custom_voice, num_streams, report):
    major, minor = torch.cuda.get_device_capability()
    machine, streams = f"sm_{major}{minor}, torch {torch.__version__}", f"streams: {num_streams}"
    with TTSDecoder.load(tiny_custom_voice, num_slots=4, backend="megakernel") as tts:
        tts.warm_up()
        found = counts_a_tick(tts, num_streams)
    report(f"{machine}, {streams}, a tick: {json.dumps(found)}")
    assert sum(count for name, count in found.items() if "Synchronize" in name) <= MAX_WAITS
    assert not [name for name in found if "Malloc" in name or "HostAlloc" in name]
    records = json.loads(GPU_RECORD.read_text()) if GPU_RECORD.is_file() else {}
    if request.config.getoption("--record"):
        records.setdefault(machine, {})[streams] = found
        GPU_RECORD.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
        pytest.skip("recorded")
    record = records.get(machine, {}).get(streams)
    if record is None:
        pytest.skip(
            f"nothing is recorded of {machine}: python -m pytest tests/test_golden_ticks.py --record"
        )
    assert found == record
