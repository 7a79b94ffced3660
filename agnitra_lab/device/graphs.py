"""Capturing CUDA graphs so that they own all memory that they use, and outlive every other graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Shares of the ops after which a new segment begins, and the fewest ops that are worth cutting.
_CUTS = (0.05, 0.15, 0.4)
_LEAST_OPS = 24


class Segments:
    """Consecutive CUDA graphs of one call, replayed one after the other.

    The host writes a graph's nodes to the device before the first of them runs, some 0.9 us a node (1.1B decoder,
    H200: 1.36 ms between launch and end beyond the device's own time for eager's graph, 0.49 ms for a fused one). A
    short first graph lets the device begin while the host writes the rest.
    """

    def __init__(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        self._graphs = list(graphs)

    def replay(self) -> None:
        """Queue all of them on the current stream."""
        for graph in self._graphs:
            graph.replay()


def capture(call: Callable[[], Any], *, num_warm_calls: int = 1, should_cut: bool = False) -> tuple[Segments, Any]:
    """Capture one call.

    cuBLAS keeps one workspace a stream, and all captures share a stream. A graph captured second would use the
    workspace that the first one's pool holds, and read freed memory once that graph is gone (an illegal access, seen on
    an H200 with torch 2.11 beside Inductor's own graphs, which clear the workspaces). So they are cleared before the
    capture, which then allocates its own, and after it, so that nobody else takes this one.

    Args:
        call: launches the work on the current stream; it runs a few times first, on a side stream.
        num_warm_calls: how often.
        should_cut: begin new graphs between the call's ops, so that the device starts before all is launched. Only
            ops that PyTorch dispatches are seen; the kernels that compiled code launches between them stay together.

    Returns:
        The graph, and what the captured call returned: tensors in the graph's memory, overwritten by each replay.

    Raises:
        RuntimeError: when the call cannot be captured (it waits for the device, or allocates outside torch).
    """
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        counter = _Ops()
        with torch.cuda.stream(side):
            for _ in range(num_warm_calls):
                call()
            if should_cut:
                with counter:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        cuts = [int(counter.count * share) for share in _CUTS] if counter.count >= _LEAST_OPS else []
        torch._C._cuda_clearCublasWorkspaces()
        try:
            return _capture_segments(call, cuts) if cuts else _capture_whole(call)
        finally:
            torch._C._cuda_clearCublasWorkspaces()


def _capture_whole(call: Callable[[], Any]) -> tuple[Segments, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return Segments([graph]), outputs


def _capture_segments(call: Callable[[], Any], cuts: Sequence[int]) -> tuple[Segments, Any]:
    # One pool for all: a later segment may use the memory of what an earlier one let go, as they replay in this order.
    graphs = [torch.cuda.CUDAGraph()]
    pool = torch.cuda.graph_pool_handle()

    def cut() -> None:
        graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool)

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        graphs[0].capture_begin(pool=pool)
        try:
            with _Ops(cuts, cut):
                outputs = call()
        finally:
            graphs[-1].capture_end()
        torch.cuda.synchronize()
    return Segments(graphs), outputs


class _Ops(TorchDispatchMode):
    """Counts the ops that are dispatched, and calls `at_cut` before those whose number is in `cuts`."""

    def __init__(self, cuts: Sequence[int] = (), at_cut: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.count = 0
        self._cuts = frozenset(cuts)
        self._at_cut = at_cut

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self._at_cut is not None and self.count in self._cuts:
            self._at_cut()
        return func(*args, **(kwargs or {}))
