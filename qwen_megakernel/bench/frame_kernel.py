"""The bench's kernel part: a frame's time by streams and positions, and what bounds it.

One process on one GPU measures the frame kernel, a plain streaming read of the same bytes, PyTorch eager
and PyTorch as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qwen_megakernel.bench.worker import WARM_UP, device_times, host_times
from qwen_megakernel.build_tts import READ_LIBRARY, build, detect_arch, frame_library
from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, ModelConfig
from qwen_megakernel.cuda_driver import Launch, load_module
from qwen_megakernel.decoding.frame_schedule import Exchange
from qwen_megakernel.decoding.graph_backend import GraphBackend
from qwen_megakernel.decoding.kernel_backend import FrameDumps, MegakernelBackend
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.tools.machine_code import resources

STREAMS = (1, 2, 4, 8)
"""Measured by default."""
MOST_STREAMS = 32
"""The most streams of a frame of the kernel."""
POSITIONS = (100, 500, 1000, 2000)
REPEATS = 200
EAGER_REPEATS = 10
"""Few repeats, because an eager frame takes tens of milliseconds and varies little."""
PARTS = ("talker", "predictor", "sampling")

Report = Callable[[str], None]
_Backend = MegakernelBackend | TorchBackend


class BenchError(RuntimeError):
    """A part of the bench cannot run. The message is one line that says why."""


@dataclass(frozen=True, slots=True)
class FrameFigures:
    """The figures of the frame kernel for a number of streams at a position. Times are in
    microseconds."""

    streams: int
    position: int
    median_us: float
    """Time on the device from the end of a frame to the end of the next. Frames are queued back to
    back."""
    p95_us: float
    decode_us: float
    """Median time of `decode` on the host's clock: launch, frame, codes in host memory."""
    parts_us: dict[str, float]
    """Medians of `PARTS` by the kernel's own clock. The rest of the frame is the launch, the first
    product and the last sum."""
    bytes: int
    """Bytes that a frame must read: weights of the talker and of 15 passes, keys and values."""
    gb_s: float
    floor_us: float
    """Time of a plain streaming read of the same number of bytes."""
    eager_us: float
    """Time of PyTorch in bf16, on the host's clock."""
    graph_us: float
    """Time of PyTorch in bf16 as CUDA graphs, on the device. The torch backend does this on a GPU."""

    def ratios(self) -> dict[str, float]:
        """The ratios of this frame to the floor, and of PyTorch to this frame."""
        return {
            "over_floor": self.median_us / self.floor_us,
            "eager_over_this": self.eager_us / self.median_us,
            "graph_over_this": self.graph_us / self.median_us,
        }


# --- what a frame is made of -------------------------------------------------------------------


def part_of(exchange: Exchange) -> str:
    """The member of `PARTS` to which an exchange belongs."""
    return "sampling" if exchange.step == "code" else exchange.model


def parts_of(stamps: np.ndarray, parts: Sequence[str]) -> dict[str, float]:
    """Median microseconds of each part.

    Args:
        stamps: int64 [frames, exchanges or more], nanoseconds at the end of each exchange.
        parts: the part of each exchange.

    Raises:
        BenchError: stamps are missing or run backwards.
    """
    if (stamps[:, len(parts) - 1] < stamps[:, 0]).any() or (stamps[:, : len(parts)] == 0).any():
        raise BenchError("the kernel's stamps are not those of the exchanges that were expected")
    lasted = np.diff(stamps[:, : len(parts)], axis=1) / 1000
    of = np.array(parts[1:])
    return {part: float(np.median(lasted[:, of == part].sum(1))) for part in PARTS}


def frame_bytes(config: ModelConfig, streams: int, position: int) -> int:
    """Bytes that a frame must read: bf16 weights once for each pass, keys and values of the streams."""

    def qkv_rows(c: Any) -> int:
        return (c.num_heads + 2 * c.num_kv_heads) * c.head_dim

    def layer(c: Any) -> int:
        rows = qkv_rows(c) + c.num_heads * c.head_dim
        return c.hidden_size * (rows + 3 * c.intermediate_size)

    t, p = config.talker, config.predictor
    weights = t.num_layers * layer(t) + t.vocab_size * t.hidden_size
    weights += (NUM_CODEBOOKS - 1) * (p.num_layers * layer(p) + p.vocab_size * p.hidden_size)
    # In the passes after the first, the first layer's QKV comes from a table: one row for each stream.
    weights -= (NUM_CODEBOOKS - 2) * qkv_rows(p) * (p.hidden_size - streams)
    if t.hidden_size != p.hidden_size:
        weights += t.hidden_size * p.hidden_size
    return 2 * weights + KvCache.num_bytes(t, streams * position, torch.bfloat16)


# --- measuring ---------------------------------------------------------------------------------


class Prompts:
    """Fills slots up to a position. Keys and values of each length are computed once."""

    def __init__(self, config: ModelConfig, device: torch.device, longest: int) -> None:
        generator = torch.Generator(device).manual_seed(1)
        shape = (longest, config.talker.hidden_size)
        self._rows = torch.randn(shape, device=device, generator=generator).bfloat16()

    def fill(self, backend: _Backend, streams: int, rows: int) -> None:
        """Start slots 0 to `streams` - 1, each with `rows` rows."""
        for slot in range(streams):
            params = GenerationParams(seed=slot)
            backend.prefill(slot, self._rows[:rows], params, SharedRows(rows, rows - 1))


class KernelBench:
    """The frame kernel and what it is compared with, on one GPU with one set of weights."""

    def __init__(
        self,
        config: ModelConfig,
        talker: Talker,
        streams: Sequence[int],
        positions: Sequence[int],
        repeats: int,
        form: str,
        report: Report,
    ) -> None:
        """Build the kernels and pack the weights.

        Args:
            config: the shape.
            talker: bf16, on the GPU.
            streams, positions: what will be measured. The largest of each decide the size of the caches.
            repeats: timed frames for each figure.
            form: of the kernel, one of `build_tts.FORMS`.
            report: told what is being done.

        Raises:
            BuildError: there is no compiler, or the GPU is too old.
        """
        self._config, self._repeats = config, repeats
        self._device = talker.codec_head.weight.device
        self._gpu = torch.cuda.get_device_properties(self._device)
        self.arch = detect_arch(self._device)
        self.library = build(frame_library(config, self.arch, form), self.arch, report)
        self._read = load_module(build(READ_LIBRARY, self.arch, report), self._device)
        most = max(positions) + repeats + 2 * WARM_UP
        shape = (talker, config.talker, config.predictor)
        self._widest = max(streams)
        self._kernel = MegakernelBackend(
            *shape, library=self.library, num_slots=self._widest, max_positions=most
        )
        self._torch = TorchBackend(*shape, max_positions=most, max_batch=self._widest)
        self._graphs = GraphBackend(*shape, max_positions=most, max_batch=self._widest, progress=report)
        self._prompts = Prompts(config, self._device, most)
        self._buffer = torch.zeros(
            frame_bytes(config, self._widest, max(positions)), dtype=torch.uint8, device=self._device
        )

    def measure(self, streams: int, position: int) -> FrameFigures:
        """Measure all figures of one row. The timed frames lie around `position`."""
        text = torch.zeros(streams, self._config.talker.hidden_size, device=self._device)
        slots = range(streams)
        with self._running(self._kernel, streams, position, self._repeats):
            device = device_times(lambda: self._kernel.launch(slots, text), self._repeats)
        with self._running(self._kernel, streams, position, self._repeats):
            host = host_times(lambda: self._kernel.decode(slots, text), self._repeats)
        with self._running(self._torch, streams, position, EAGER_REPEATS):
            eager = host_times(lambda: self._torch.decode(slots, text), EAGER_REPEATS)
        repeats = max(self._repeats // 10, 3)
        with self._running(self._graphs, streams, position, repeats):
            graphs = device_times(lambda: self._graphs.launch(slots, text), repeats)
        num_bytes, median = frame_bytes(self._config, streams, position), float(np.median(device))
        return FrameFigures(
            streams=streams,
            position=position,
            median_us=median,
            p95_us=float(np.percentile(device, 95)),
            decode_us=float(np.median(host)),
            parts_us=self._parts(streams, position, text),
            bytes=num_bytes,
            gb_s=num_bytes / median / 1000,
            floor_us=self._floor_us(num_bytes),
            eager_us=float(np.median(eager)),
            graph_us=float(np.median(graphs)),
        )

    def _running(self, backend: _Backend, streams: int, position: int, repeats: int) -> LiveSlots:
        """Start slots so that the next `repeats` frames, after a warm-up, lie around `position`."""
        return LiveSlots(self._prompts, backend, streams, max(2, position - repeats // 2 - WARM_UP))

    def _parts(self, streams: int, position: int, text: torch.Tensor) -> dict[str, float]:
        parts = [part_of(exchange) for exchange in self._kernel.exchanges(streams)]
        stamps = torch.zeros(
            self._repeats, self._kernel.num_exchanges, dtype=torch.int64, device=self._device
        )
        with self._running(self._kernel, streams, position, self._repeats):
            for row in stamps:
                self._kernel.launch(range(streams), text, dumps=FrameDumps(stamps=row))
            return parts_of(stamps.cpu().numpy(), parts)

    def _floor_us(self, num_bytes: int) -> float:
        out = torch.zeros(1, dtype=torch.int32, device=self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        facts = self._read.facts
        params = (
            c_void_p(self._buffer.data_ptr()), c_int64(num_bytes // 16), c_void_p(out.data_ptr()),
        )  # fmt: skip
        read = Launch(
            self._read, self._read.kernel("read_kernel"), params, threads=facts["threads"],
            grid=(self._gpu.multi_processor_count * facts["ctas_per_sm"], 1),
        )  # fmt: skip
        return float(np.median(device_times(lambda: read(stream), self._repeats // 4 + 1)))


@dataclass(slots=True)
class LiveSlots:
    """Slots 0 to `streams` - 1, live as long as the context."""

    prompts: Prompts
    backend: _Backend
    streams: int
    rows: int

    def __enter__(self) -> None:
        self.prompts.fill(self.backend, self.streams, self.rows)
        torch.cuda.synchronize()

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        for slot in range(self.streams):
            self.backend.release(slot)


# --- the part ----------------------------------------------------------------------------------


def run(
    config: ModelConfig,
    talker: Talker,
    *,
    streams: Sequence[int] = STREAMS,
    positions: Sequence[int] = POSITIONS,
    repeats: int = REPEATS,
    form: str = "auto",
    report: Report,
) -> Iterator[dict[str, Any]]:
    """Yield the kernel part of the bench's JSON after every row, each time with one row more.

    Args:
        config, talker: what is decoded. The talker is bf16, on the GPU.
        streams, positions: the rows of the table.
        repeats: timed frames for each figure.
        form: of the kernel, one of `build_tts.FORMS`.
        report: told what is being done.
    """
    bench = KernelBench(config, talker, streams, positions, repeats, form, report)
    frames: list[dict[str, Any]] = []
    for n in streams:
        for position in positions:
            row = bench.measure(n, position)
            report(f"{n} streams, position {position}: {row.median_us:.0f} us")
            frames.append({**asdict(row), **row.ratios()})
            yield {
                "arch": bench.arch,
                "form": form,
                "build": [asdict(kernel) for kernel in resources(bench.library)],
                "repeats": repeats,
                "frames": list(frames),
            }
