"""Capturing one CUDA graph so that it owns all memory that it uses, and outlives every other graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(call: Callable[[], Any], *, num_warm_calls: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture one call.

    cuBLAS keeps one workspace a stream, and all captures share a stream. A graph captured second would use the
    workspace that the first one's pool holds, and read freed memory once that graph is gone (an illegal access, seen on
    an H200 with torch 2.11 beside Inductor's own graphs, which clear the workspaces). So they are cleared before the
    capture, which then allocates its own, and after it, so that nobody else takes this one.

    Args:
        call: launches the work on the current stream; it runs a few times first, on a side stream.
        num_warm_calls: how often.

    Returns:
        The graph, and what the captured call returned: tensors in the graph's memory, overwritten by each replay.

    Raises:
        RuntimeError: when the call cannot be captured (it waits for the device, or allocates outside torch).
    """
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(num_warm_calls):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph):
                outputs = call()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph, outputs
