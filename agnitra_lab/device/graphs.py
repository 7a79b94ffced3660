"""Capturing CUDA graphs so that they own all memory that they use, and outlive every other graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Shares of the ops after which a new segment begins, and the fewest ops that are worth cutting.
_CUTS = (0.05, 0.15, 0.4)
_LEAST_OPS = 24
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)
_LEAST_TAIL_BYTES = 2**24
"""A copy of as much takes 8 us of an H200, about what the host takes to launch one op."""


class Tail:
    """The product that a call ends with, launched by itself after the graphs.

    What a graph computes lies in its own memory, and a caller needs a copy of it: 262 MB of logits take 123 us of a
    prefill of 14.7 ms (1.1B decoder, 4 x 1024 tokens, H200). A product outside the graph writes to new memory.

    Attributes:
        storage: address of the memory that it wrote to while the call was captured.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        self._func, self._args, self._has_out = func, args, "out" in kwargs
        # What it wrote is as large as all that this saves.
        self._kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        self._shape, self._stride = result.shape, result.stride()
        self._options: dict[str, Any] = {"dtype": result.dtype, "device": result.device}
        self.storage = result.untyped_storage().data_ptr()

    def __call__(self) -> Tensor:
        """Compute it again from what the graphs have left, into new memory."""
        if not self._has_out:
            return cast(Tensor, self._func(*self._args, **self._kwargs))
        out = torch.empty_strided(self._shape, self._stride, **self._options)
        return cast(Tensor, self._func(*self._args, **self._kwargs, out=out))


class Segments:
    """Consecutive CUDA graphs of one call, replayed one after the other.

    The host writes a graph's nodes to the device before the first of them runs, some 0.9 us a node (1.1B decoder,
    H200: 1.36 ms between launch and end beyond the device's own time for eager's graph, 0.49 ms for a fused one). A
    short first graph lets the device begin while the host writes the rest.

    Attributes:
        tail: the op that must run after each replay, None where the graphs are the whole call.
    """

    def __init__(self, graphs: Sequence[torch.cuda.CUDAGraph], tail: Tail | None = None) -> None:
        self._graphs = list(graphs)
        self.tail = tail

    def replay(self) -> None:
        """Queue all of them on the current stream."""
        for graph in self._graphs:
            graph.replay()


Watched = Callable[[TorchDispatchMode], AbstractContextManager[Any]]
"""Lets a mode see the ops of a call while it runs."""


def everywhere(mode: TorchDispatchMode) -> AbstractContextManager[Any]:
    """Let a mode see every op."""
    return cast(AbstractContextManager[Any], mode)


def capture(
    call: Callable[[], Any],
    *,
    num_warm_calls: int = 1,
    should_cut: bool = False,
    has_tail: bool = False,
    watched: Watched = everywhere,
) -> tuple[Segments, Any]:
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
        has_tail: leave a large product that is the last of those ops out of the graphs, as their `tail`. Whether a
            kernel of compiled code comes after it cannot be seen here: the caller must hold results against the call's.
        watched: which of its ops are seen for that; Dynamo runs no compiled code inside a mode.

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
            if should_cut or has_tail:
                with watched(counter):
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        is_cut = should_cut and counter.count >= _LEAST_OPS
        cuts = [int(counter.count * share) for share in _CUTS] if is_cut else []
        last = counter.last_product if has_tail else None
        torch._C._cuda_clearCublasWorkspaces()
        try:
            if not cuts and last is None:
                return _capture_whole(call)
            with suppress(_OtherOpsError):
                return _capture_segments(call, cuts, last, watched)
            return _capture_segments(call, cuts, None, watched)
        finally:
            torch._C._cuda_clearCublasWorkspaces()


def _capture_whole(call: Callable[[], Any]) -> tuple[Segments, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return Segments([graph]), outputs


def _capture_segments(
    call: Callable[[], Any], cuts: Sequence[int], last: int | None, watched: Watched
) -> tuple[Segments, Any]:
    # One pool for all: a later segment may use the memory of what an earlier one let go, as they replay in this order.
    graphs = [torch.cuda.CUDAGraph()]
    pool = torch.cuda.graph_pool_handle()
    ops = _Ops()

    def cut() -> None:
        with warnings.catch_warnings():
            # A call may be its last product and nothing else.
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
            graphs[-1].capture_end()
        if ops.count == last:
            # What comes now runs: on values, since an index of garbage would end the process.
            for graph in graphs:
                graph.replay()
            return
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool)

    ops.cut_at({*cuts, *([last] if last is not None else [])}, cut)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        graphs[0].capture_begin(pool=pool)
        try:
            with watched(ops):
                outputs = call()
        finally:
            if last is None or ops.count < last:
                graphs[-1].capture_end()
        torch.cuda.synchronize()
    if last is not None and ops.last_product != last:
        raise _OtherOpsError(f"op {ops.last_product} is the last product, and the graphs end before op {last}")
    # The last product counts as left out only where it was: with other cuts alone it is in the last graph.
    return Segments(graphs, None if last is None else ops.tail), outputs


class _OtherOpsError(RuntimeError):
    """A captured call runs other ops than one that is not, as Python may that asks which of them it is.

    Its graphs end somewhere before its last product, and what comes after them in the call would never run again.
    """


class _Ops(TorchDispatchMode):
    """Counts the ops that are dispatched, and stops before some of them.

    Attributes:
        count: ops so far.
        last_product: number of the last op that computes anything, None where it is no large product.
        tail: that op of this run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.last_product: int | None = None
        self.tail: Tail | None = None
        self._cuts: frozenset[int] = frozenset()
        self._at_cut: Callable[[], None] = lambda: None

    def cut_at(self, cuts: Collection[int], at_cut: Callable[[], None]) -> None:
        """Call `at_cut` before the ops with these numbers."""
        self._cuts, self._at_cut = frozenset(cuts), at_cut

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count in self._cuts:
            self._at_cut()
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            is_tail = func._overloadpacket in _PRODUCTS and _is_large(result)
            self.last_product = self.count if is_tail else None
            self.tail = Tail(func, args, kwargs or {}, result) if is_tail else None
        return result


def _is_view(func: Any) -> bool:
    return bool(func.is_view) or func is _aten._unsafe_view.default


def _is_large(result: Any) -> bool:
    """Whether a result is large, and has its memory to itself."""
    if not isinstance(result, Tensor) or result.device.type != "cuda" or result.storage_offset():
        return False
    num_bytes = result.numel() * result.element_size()
    return num_bytes >= _LEAST_TAIL_BYTES and result.untyped_storage().nbytes() == num_bytes
