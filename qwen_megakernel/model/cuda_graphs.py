"""Captures work that never changes as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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
    stream = _first_run_stream(device)
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


@cache
def _first_run_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, because cuBLAS keeps a workspace for each stream that it has run on."""
    return torch.cuda.Stream(device)
