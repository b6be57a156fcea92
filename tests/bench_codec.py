"""The GPU codec: checked launch by launch, compared with the PyTorch codec, timed.

    python tests/bench_codec.py [--library build/codec.so] [--launches]

Weights are random (the true shape), activations lively, every figure a median. With `--launches`
also what each launch adds to a frame.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from codec_interpreter import Interpreter  # noqa: E402
from codec_weights import ODD, TINY, TRUE, WIDE, lively_decoder, random_codes  # noqa: E402
from torch import Tensor  # noqa: E402

from qwen_megakernel.codec import CodecDecoder, CodecStream  # noqa: E402
from qwen_megakernel.codec_cuda import BATCH_SIZES, CudaCodecStream  # noqa: E402
from qwen_megakernel.codec_plan import CodecPlan, GemmOp, Rows  # noqa: E402
from qwen_megakernel.config import HOP, CodecConfig  # noqa: E402

REPEATS = 200


def build(path: Path) -> None:
    """Compile the kernels for the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    subprocess.run(
        [
            "nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC",
            f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(path),
            str(ROOT / "csrc/codec_kernels.cu"),
        ],
        check=True,
    )  # fmt: skip
    print(f"built for sm_{arch} in {time.perf_counter() - start:.1f} s")


# ---------------------------------------------------------------------------- correctness


def written_by(op: object) -> Iterator[tuple[str, Tensor]]:
    for name in ("raw", "out", "kv", "squares_out", "pcm"):
        value = getattr(op, name, None)
        if value is not None:
            yield name, value.data if isinstance(value, Rows) else value


def check_launches(config: CodecConfig, library: Path, frames: int) -> list[str]:
    """Complaints about launches that differ from the interpreter, each on the same inputs."""
    decoder, slots = lively_decoder(config), [2, 0, 1]
    ours = CudaCodecStream(lively_decoder(config).cuda(), 3, library)
    plan = CodecPlan(decoder, 3, max_streams=4)
    interpreter, complaints = Interpreter(plan), []
    for mine, theirs in zip(ours._plan.ops, plan.ops, strict=True):
        for (_, a), (_, b) in zip(written_by(mine), written_by(theirs), strict=True):
            a[:3].copy_(b[:3])  # the capture left its traces
    for frame in range(frames):
        codes = random_codes(1, frame, 3)[:, 0]
        interpreter.begin(slots, codes)
        ours._launcher.input[:3] = torch.cat((torch.tensor(slots)[:, None], codes), 1).int()
        ours._plan.ages[:3] = plan.ages[:3].cuda()
        for index, (mine, theirs) in enumerate(zip(ours._plan.ops, plan.ops, strict=True)):
            ours._launcher.launch(mine, 3)
            interpreter.run(theirs)
            for (name, a), (_, b) in zip(written_by(mine), written_by(theirs), strict=True):
                got, expected = a[:3].float().cpu(), b[:3].float()
                worst = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
                if not worst <= 0.01:
                    complaints.append(
                        f"frame {frame} launch {index} {type(mine).__name__}.{name}: {worst:.2g}"
                    )
                a[:3].copy_(b[:3])  # the next launch starts equal
    return complaints


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_sound(exact: CodecDecoder, library: Path) -> tuple[list[str], list[str]]:
    """Facts and complaints at the true shape: distance from float32, splits, company."""
    codes = random_codes(90, slots=5)
    truth = CodecStream(exact, 5).decode(range(5), codes.cuda())
    torch16 = CodecStream(copy.deepcopy(exact).bfloat16(), 5)
    theirs = torch.cat([torch16.decode(range(5), part.cuda()) for part in codes.split(10, 1)], 1)
    stream = CudaCodecStream(exact, 8, library)
    whole = stream.decode(range(5), codes)
    error, error16 = rms(whole - truth), rms(theirs - truth)
    worst, worst16 = ((x - truth).abs().max().item() for x in (whole, theirs))
    facts = [
        f"loudness {rms(truth):.3f}, clamped {(truth.abs() == 1).float().mean():.4f}",
        f"rms error {error:.3g}, PyTorch bf16 {error16:.3g}, ratio {error / error16:.2f}",
        f"worst error {worst:.3g}, PyTorch bf16 {worst16:.3g}, ratio {worst / worst16:.2f}",
    ]
    complaints = [f"off: {fact}" for fact in facts[1:] if not error <= 1.25 * error16]
    for slot in range(5):
        stream.reset(slot)
    alone = torch.cat([stream.decode([3], part) for part in codes[3:4].split([1, 40, 49], 1)], 1)
    if not torch.equal(alone[0], whole[3]):
        complaints.append(f"alone differs from company by {(alone[0] - whole[3]).abs().max():.3g}")
    for slot in range(5):
        stream.reset(slot)
    stream.decode([7, 0], codes[:2, :50])
    mixed = torch.cat(
        [stream.decode([4, 7, 2], codes[[4, 0, 2], a : a + 9]) for a in range(0, 90, 9)], 1
    )
    if not (torch.equal(mixed[0], whole[4]) and torch.equal(mixed[2], whole[2])):
        complaints.append("slots of other ages change the samples")
    edges = torch.arange(1, 90) * HOP
    jump = (whole[:, edges] - whole[:, edges - 1] - (truth[:, edges] - truth[:, edges - 1])).abs().max()
    facts.append(f"worst error of a step across frames {jump:.3g}")
    return facts, complaints


# ---------------------------------------------------------------------------- time


def timed(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median microseconds on the device."""
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for _ in range(10):
        run()
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1000 * median(start.elapsed_time(end) for start, end in events)


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def fill(stream: CudaCodecStream) -> None:
    """Warm slots: as old as the window, lively state."""
    codes = random_codes(75, slots=stream.num_slots)
    stream.decode(range(stream.num_slots), codes)


def frame_times(exact: CodecDecoder, library: Path) -> list[str]:
    stream = CudaCodecStream(exact, 32, library)
    fill(stream)
    torch_stream = CodecStream(copy.deepcopy(exact).bfloat16(), 32)
    lines = [
        "streams | graph, us | decode() on the host's clock, us | PyTorch bf16 graph, us | eager, us"
    ]
    for size in BATCH_SIZES:
        codes = random_codes(1, slots=size)
        inputs = torch.cat((torch.arange(size)[:, None], codes[:, 0]), 1).int().cuda()
        stream._step(inputs)
        ours = timed(stream._graphs[size].replay)
        laps = []
        for _ in range(100):
            start = time.perf_counter()
            stream.decode(range(size), codes).cpu()
            laps.append(time.perf_counter() - start)
        slots, on_device = torch.arange(size).cuda(), codes.cuda()

        def step(slots: Tensor = slots, codes: Tensor = on_device) -> None:
            with torch.no_grad():
                torch_stream._step(slots, codes)

        eager = timed(step, 20)
        theirs = timed(graph_of(step).replay, 50)
        lines.append(
            f"{size:7d} | {ours:9.0f} | {1e6 * median(laps):9.0f} | {theirs:9.0f} | {eager:9.0f}"
        )
    return lines


def describe(op: object) -> str:
    if isinstance(op, GemmOp):
        k = op.taps * op.source.data.shape[2]
        return f"gemm m {op.m} k {k} rows {op.source.rows} segments {op.segments}"
    return type(op).__name__


def launch_times(exact: CodecDecoder, library: Path, streams: int) -> list[str]:
    """What each launch adds to the graph of those before it, microseconds."""
    stream = CudaCodecStream(exact, 32, library)
    fill(stream)
    stream._launcher.input[:, 0] = torch.arange(32)
    ops, before, lines = stream._plan.ops, 0.0, []
    for count in range(1, len(ops) + 1):

        def run(count: int = count) -> None:
            for op in ops[:count]:
                stream._launcher.launch(op, streams)

        if 8 <= count <= 37 and count % 5:  # the layers are alike
            continue
        now = timed(graph_of(run).replay, 40)
        lines.append(f"{count - 1:3d} {now:8.1f} {now - before:7.1f}  {describe(ops[count - 1])}")
        before = now
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="built kernels; otherwise they are built")
    parser.add_argument("--launches", action="store_true", help="time every launch as well")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False
    library = args.library or ROOT / "build" / "codec.so"
    if not args.library:
        build(library)
    complaints = []
    for config in (TINY, ODD, WIDE):
        complaints += check_launches(config, library, frames=12)[:20]
    print("launch by launch:", complaints or "all equal the interpreter's")
    exact = lively_decoder(TRUE, "cuda")
    facts, more = check_sound(exact, library)
    for streams in (1, 8, 32) if args.launches else ():
        print(f"launches, {streams} streams:", *launch_times(exact, library, streams), sep="\n")
    print(*facts, *frame_times(exact, library), sep="\n")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    if complaints + more:
        sys.exit("\n".join(["WRONG:", *complaints, *more]))


if __name__ == "__main__":
    main()
