"""The GPU codec's time a frame, beside the PyTorch codec's on the same GPU.

    python tests/bench_codec.py [--launches STREAMS | --forms]

Weights are random, in the true shape, and scaled so that activations are lively. Every figure is a
median. `--launches` also measures what each launch adds to a frame. `--forms` measures the small form
beside the large one, on a GPU that has room for both.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from codec_weights import TRUE, lively_decoder, random_codes  # noqa: E402
from torch import Tensor  # noqa: E402

from qwen_megakernel.build_tts import build, codec_library, detect_arch  # noqa: E402
from qwen_megakernel.codec.cuda_ops import GemmOp  # noqa: E402
from qwen_megakernel.codec.cuda_stream import CudaCodecStream, batch_sizes  # noqa: E402
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream  # noqa: E402
from qwen_megakernel.model.cuda_graphs import capture  # noqa: E402

GPU = torch.device("cuda", 0)

REPEATS = 200
STREAMS = 32


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


def fill(stream: CudaCodecStream) -> None:
    """Decode in every slot as many frames as the window holds, so that its state is lively."""
    codes = random_codes(75, slots=STREAMS).cuda()
    for frame in range(codes.shape[1]):
        stream.launch(range(STREAMS), codes[:, frame]).samples()


def frame_times(exact: CodecDecoder, library: Path) -> list[str]:
    stream = CudaCodecStream(exact, STREAMS, library)
    fill(stream)
    torch_stream = CodecStream(copy.deepcopy(exact).bfloat16(), STREAMS)
    lines = [
        "streams | graph, us | launch() and its samples on the host's clock, us | "
        "PyTorch bf16 graph, us | eager, us"
    ]
    for size in batch_sizes(STREAMS):
        codes = random_codes(1, slots=size).cuda()
        stream.launch(range(size), codes[:, 0]).samples()
        ours = timed(stream._graphs[size].replay)
        laps = []
        for _ in range(100):
            start = time.perf_counter()
            stream.launch(range(size), codes[:, 0]).samples()
            laps.append(time.perf_counter() - start)
        slots = torch.arange(size).cuda()

        def step(slots: Tensor = slots, codes: Tensor = codes) -> None:
            with torch.no_grad():
                torch_stream._step(slots, codes)

        eager = timed(step, 20)
        theirs = timed(capture(step, GPU).replay, 50)
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
    """Microseconds that each launch adds to the graph of the launches before it."""
    stream = CudaCodecStream(exact, STREAMS, library)
    fill(stream)
    ops, before, lines = stream._plan.ops, 0.0, []
    for count in range(1, len(ops) + 1):

        def run(count: int = count) -> None:
            for op in ops[:count]:
                stream._launcher.launch(op, streams)

        if 8 <= count <= 37 and count % 5:  # the layers are alike
            continue
        now = timed(capture(run, GPU).replay, 40)
        lines.append(f"{count - 1:3d} {now:8.1f} {now - before:7.1f}  {describe(ops[count - 1])}")
        before = now
    return lines


def form_times(exact: CodecDecoder, arch: str, rounds: int = 6) -> list[str]:
    """Times of the two forms' graphs, in the order ABBA: medians over the rounds, and their ratio."""
    graphs = {}
    for form in ("large", "small"):
        stream = CudaCodecStream(exact, STREAMS, build(codec_library(arch, form), arch))
        fill(stream)
        graphs[form] = stream._graphs
    lines = ["streams | large, us | small, us | small over large (each round)"]
    for size in batch_sizes(STREAMS):
        laps: dict[str, list[float]] = {form: [] for form in graphs}
        for lap in range(rounds):
            for form in sorted(graphs, reverse=lap % 2 == 1):
                laps[form].append(timed(graphs[form][size].replay))
        ratios = [s / large for s, large in zip(laps["small"], laps["large"], strict=True)]
        large, small = (median(laps[form]) for form in ("large", "small"))
        lines.append(
            f"{size:7d} | {large:9.1f} | {small:9.1f} | {small / large:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, metavar="STREAMS", help="time every launch as well")
    parser.add_argument("--forms", action="store_true", help="time the small form beside the large")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    arch = detect_arch(GPU)
    library = build(codec_library(arch), arch)
    print(f"kernels ready after {time.perf_counter() - start:.1f} s")
    exact = lively_decoder(TRUE, "cuda")
    if args.forms:
        print(*form_times(exact, arch), sep="\n")
        return
    if args.launches:
        print(*launch_times(exact, library, args.launches), sep="\n")
    print(*frame_times(exact, library), sep="\n")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)


if __name__ == "__main__":
    main()
