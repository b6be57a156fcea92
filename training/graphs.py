"""Training steps as CUDA graphs. Without them, small layers leave a GPU waiting for its next launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]
"""One update. Returns figures to show, on the device."""


def captured(step: Step, example: Batch) -> Step:
    """`step` for batches of the shapes in `example`. Three real steps are done before the capture.

    The step must not wait for the device. It must keep in tensors what changes from call to call.
    """
    inputs = {name: tensor.cuda() for name, tensor in example.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(inputs)

    def replay(batch: Batch) -> Tensor:
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return output

    return replay


def _captured_if_possible(kind: object, step: Step, example: Batch) -> Step:
    """Capture the step. If that fails, show the reason and return the step itself, which is slower."""
    try:
        return captured(step, example)
    except RuntimeError as error:
        print(f"no graph for {kind}: {error}", flush=True)
        return lambda batch: step({name: tensor.cuda() for name, tensor in batch.items()})


class Steps:
    """Runs steps of several kinds. On CUDA, each kind is captured when it first occurs."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._captured: dict[object, Step] = {}
        self._count = 0

    def run(self, kind: object, step: Step, batch: Batch) -> Tensor:
        """One update of a kind, which names its code path and shapes."""
        if not self._on_gpu:
            return step(batch)
        if kind not in self._captured:
            self._captured[kind] = _captured_if_possible(kind, step, batch)
        figures = self._captured[kind](batch)
        self._count += 1
        if self._count % 20 == 0:
            torch.cuda.synchronize()  # otherwise the schedule's clock would be that of the queue
        return figures


def clock(seconds: float) -> Iterator[tuple[int, float]]:
    """Yield (step, share of the time that has passed) until the time is over. At least one step."""
    began, step = monotonic(), 0
    while (share := (monotonic() - began) / seconds) < 1 or step == 0:
        yield step, min(share, 1.0)
        step += 1
