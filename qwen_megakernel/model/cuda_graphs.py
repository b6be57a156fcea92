"""Capture work that never changes as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(
    run: Callable[[], object],
    device: torch.device,
    pool: tuple[int, int] | None = None,
) -> torch.cuda.CUDAGraph:
    """A graph of one `run`. It runs once before the capture, and the capture itself does not run it.

    Args:
        run: queues the work; its tensors stay where they are, and must outlive the graph.
        device: a CUDA GPU.
        pool: memory from `torch.cuda.graph_pool_handle` that graphs share for what each makes on its
            way. They must run one after the other, and leave their results in other memory.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries make their handles and choose, which a capture must not
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA meanwhile.
    capturing = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with torch.cuda.device(device), capturing:
        run()
    return graph
