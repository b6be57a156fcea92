"""Capture work that never changes as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of one `run`. It runs once before the capture, and the capture itself does not run it.

    Args:
        run: queues the work; its tensors stay where they are, and must outlive the graph.
        device: a CUDA GPU.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries make their handles and choose, which a capture must not
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph
