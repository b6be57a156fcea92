"""Captures work that never changes as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(
    run: Callable[[], object],
    device: torch.device,
    pool: tuple[int, int] | None = None,
) -> torch.cuda.CUDAGraph:
    """A graph of one `run`. `run` executes once before the capture. The capture itself does not execute
    it.

    Args:
        run: queues the work. Its tensors must stay where they are, and must outlive the graph.
        device: a CUDA GPU.
        pool: memory from `torch.cuda.graph_pool_handle`, which graphs share for their intermediate
            values. Such graphs must run one after the other, and leave their results in other memory.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries create handles and choose kernels, which is not allowed in a capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA during the capture.
    capturing = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with torch.cuda.device(device), capturing:
        run()
    return graph
