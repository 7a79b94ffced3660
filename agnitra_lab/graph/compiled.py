"""The graph that torch.compile made of a model, found again without running or compiling the model.

Inductor's kernels name nodes of Dynamo's graph. Dynamo gives the same names whenever it traces the same model, so the
nodes behind kernels that were compiled long ago can be told by tracing once more.
"""

from __future__ import annotations

import builtins
import itertools
import math
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from agnitra_lab.contracts import ComputationGraph, GraphHandoff, GraphNode
from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.backward_names import backward_origins, reason_of
from agnitra_lab.graph.capture import original_module
from agnitra_lab.graph.dynamo_nodes import DynamoReader
from agnitra_lab.graph.tree import ADDRESS_MARK


@dataclass(frozen=True)
class CompiledGraph:
    """Dynamo's graph of a compiled model.

    Attributes:
        handoff: the calls in execution order, by Dynamo's names.
        origin_of: name of a node of the backward graph -> Dynamo node whose gradient it computes; and name of a
            Dynamo node that only picks an output (getitem) -> the node that has it.
        note: what is missing, None when nothing is.
    """

    handoff: GraphHandoff
    origin_of: Mapping[str, str]
    note: str | None

    def resolve(self, names: Iterable[str], *, is_backward: bool) -> tuple[str, ...]:
        """Return the nodes of `handoff` that the names in one of Inductor's comments mean, each once.

        The comments of a backward module mix the backward graph's names with Dynamo's, and a name may be in both:
        there the backward graph's is meant, in a forward module Dynamo's. Names that are in neither are left out.
        """
        known = {node.name for node in self.handoff.graph.nodes}
        found: dict[str, None] = {}
        for name in names:
            meant = meant_by(name, known, self.origin_of, is_backward=is_backward)
            if meant in known:
                found[meant] = None
        return tuple(found)


def meant_by(name: str, known: Container[str], origin_of: Mapping[str, str], *, is_backward: bool) -> str:
    """Return the node that a name in one of Inductor's comments means, by the rule of `CompiledGraph.resolve`."""
    return origin_of.get(name) or name if is_backward or name not in known else name


def capture_compiled(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, has_grad: bool = False
) -> CompiledGraph:
    """Trace a model as torch.compile does, and stop before anything is compiled or run.

    Nothing is computed, and the model's own compiled code, caches and marks stay as they are.

    Args:
        model: what torch.compile gave, or the module or function that it was given.
        args: positional inputs of one call.
        kwargs: keyword inputs of one call.
        has_grad: whether the call is a training step's. Then the backward graph is made as well, by Inductor's own
            passes up to code generation, to learn the names of its nodes.

    Returns:
        The graph; of a model in which Dynamo breaks the graph, the first one.

    Raises:
        CaptureError: Dynamo cannot trace the model, or torch.compile is switched off.

    Source: the backend's place in torch.compile; node names as `torch._inductor.utils.get_kernel_metadata` prints them.
    """
    target = original_module(model)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    if not callable(target):
        raise CaptureError(
            f"A compiled graph needs a module or function, got {type(model).__name__}.",
            hint="Pass what torch.compile returned, or what it was given.",
        )
    inputs = (tuple(args), dict(kwargs or {}))
    try:
        return _trace(_entry(target), inputs, target, has_grad, is_whole=True).result(None)
    except _Refused as refused:
        reason, is_broken = refused.reason, refused.is_broken
    try:
        if not is_broken:
            raise _Refused(reason)
        top = _top_frame(target)
        with _never_run(top.__code__):
            trace = _trace(top, inputs, target, has_grad, is_whole=False)
    except _Refused:
        raise CaptureError(
            f"Dynamo cannot trace {getattr(target, '__name__', type(target).__name__)} ({reason}).",
            hint="torch.compile runs such a model, or its first lines, as ordinary Python; profile it as eager code.",
        ) from None
    return trace.result(f"Dynamo breaks the graph ({reason}); only the first part is known.")


def read_compiled(graph_module: fx.GraphModule, *, is_module: bool) -> CompiledGraph:
    """Read the graph that Dynamo has handed to a backend, before anything changes it.

    Args:
        graph_module: as the backend got it.
        is_module: whether a module was compiled, and not a function.
    """
    return _read(graph_module, is_module=is_module).result(None)


def _read(graph_module: fx.GraphModule, *, is_module: bool) -> _Trace:
    reader = DynamoReader(graph_module, is_module=is_module)
    nodes, frontier = reader.read()
    return _Trace(nodes, frontier, reader.picked_outputs())


class _Found(BaseException):
    """Dynamo has the graph; leave. No Exception, so that nothing on the way takes it for a failure and goes on."""


class _Refused(Exception):  # noqa: N818 (an outcome, not an error that anyone sees)
    def __init__(self, reason: str, *, is_broken: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_broken = is_broken


class _NoGraph(BaseException):
    """A frame would run, or runs, without having given a graph."""


@dataclass
class _Trace:
    nodes: tuple[GraphNode, ...] = ()
    frontier: tuple[str, ...] = ()
    origin_of: dict[str, str] = field(default_factory=dict)
    backward_problem: str | None = None

    def result(self, note: str | None) -> CompiledGraph:
        handoff = GraphHandoff(graph=ComputationGraph(nodes=self.nodes), materialization_frontier=self.frontier)
        notes = [text for text in (note, self.backward_problem) if text]
        return CompiledGraph(handoff, self.origin_of, " ".join(notes) or None)


_TRACE_NAME = "agnitra_trace_"
_numbers = itertools.count()


def _entry(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a code object of its own that calls the target.

    Dynamo keeps what it knows per code object: the target's own must not hear of this trace.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise _NoGraph
        return target(*args, **kwargs)

    return _copied(entry, {"__builtins__": builtins, "torch": torch, "_NoGraph": _NoGraph})


def _top_frame(target: Callable[..., Any]) -> types.FunctionType | types.MethodType:
    """Return the frame in which Dynamo makes the first graph when it breaks: forward itself, in a copy."""
    call = target.forward if isinstance(target, nn.Module) else target
    function = getattr(call, "__func__", call)
    if not isinstance(function, types.FunctionType):
        raise _Refused("not a Python function")
    copied = _copied(function, dict(function.__globals__))
    return types.MethodType(copied, call.__self__) if hasattr(call, "__self__") else copied


@contextmanager
def _never_run(code: types.CodeType) -> Iterator[None]:
    """Stop a frame that Dynamo gives up on (a break inside of a loop) before its first line."""
    if sys.getprofile() is not None:
        raise _Refused("another profiler watches this thread")

    def stop(frame: types.FrameType, _event: str, _argument: object) -> None:
        if frame.f_code is code:
            raise _NoGraph

    sys.setprofile(stop)
    try:
        yield
    finally:
        sys.setprofile(None)


def _copied(function: Callable[..., Any], own_globals: dict[str, Any]) -> types.FunctionType:
    assert isinstance(function, types.FunctionType)
    # Never the same name twice: of a name that it has seen with other sizes Dynamo makes the sizes symbolic.
    name = f"{_TRACE_NAME}{next(_numbers)}"
    code = function.__code__.replace(co_name=name)
    # Dynamo also stores things among a function's globals: those of its own die with it.
    own_globals["__name__"] = name
    copied = types.FunctionType(code, own_globals, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _trace(
    function: Callable[..., Any], inputs: tuple[tuple[Any, ...], dict[str, Any]], target: Any, has_grad: bool,
    *, is_whole: bool,
) -> _Trace:  # fmt: skip
    trace = _Trace()

    def keep(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found = _read(graph_module, is_module=isinstance(target, nn.Module))
        trace.nodes, trace.frontier, trace.origin_of = found.nodes, found.frontier, found.origin_of
        if has_grad:
            known = {node.name for node in trace.nodes}
            trace.backward_problem, origins = backward_origins(graph_module, example_inputs)
            picked = trace.origin_of
            origins = {name: picked.get(origin, origin) for name, origin in origins.items()}
            trace.origin_of = {**picked, **{name: origin for name, origin in origins.items() if origin in known}}
        raise _Found

    def leave(_entries: Sequence[Any]) -> Any:
        # Guards are made for a frame that gave no graph: it would run next, for real.
        raise _NoGraph

    try:
        with _untouched(target, keep), torch.set_grad_enabled(has_grad):
            torch.compile(function, backend=keep, fullgraph=is_whole, options={"guard_filter_fn": leave})(
                *inputs[0], **inputs[1]
            )
    except _Found:
        return trace
    except _NoGraph:
        raise _Refused("torch.compile is switched off, or the graph is empty") from None
    except Exception as error:
        raise _Refused(reason_of(error), is_broken=True) from None
    raise _Refused("Dynamo left it to run as it is")


@contextmanager
def _untouched(target: Any, backend: Callable[..., Any]) -> Iterator[None]:
    """Take back what Dynamo writes outside of the trace: marks on weights, counters, backends, sizes seen."""
    from torch._dynamo import eval_frame, pgo
    from torch._dynamo.utils import counters

    tensors = [*target.parameters(), *target.buffers()] if isinstance(target, nn.Module) else []
    unmarked = [tensor for tensor in tensors if ADDRESS_MARK not in tensor.__dict__]
    kept = {category: counter.copy() for category, counter in counters.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for tensor in unmarked:
            tensor.__dict__.pop(ADDRESS_MARK, None)
        counters.clear()
        counters.update(kept)
        backends = getattr(eval_frame, "cached_backends", {})
        for key in [key for key, value in backends.items() if getattr(value, "compiler_fn", value) is backend]:
            del backends[key]
        # Per code object, 2 KB for a model of two layers.
        sizes_seen = getattr(pgo, "_CODE_STATE", None) or {}
        for code in [code for code in sizes_seen if code.name.startswith(_TRACE_NAME)]:
            del sizes_seen[code]


def node_set_cost(handoff: GraphHandoff, names: Iterable[str]) -> tuple[float | None, float | None]:
    """Count what a fused set of nodes costs: the FLOPs of its nodes, and the bytes that cross its border.

    What one node of the set hands to another stays on the chip. From outside come inputs and parameters, each counted
    once however many nodes of the set read it; to the outside go the values that a node outside uses, or that leave
    the graph, or that nothing uses (writes into given memory). Views move nothing: what lies behind them counts.

    This is an approximation where the graph says too little: the size of parameters is what a node moves beyond its
    known inputs and its output, so a parameter that two nodes read together with different others counts twice; of a
    node with several outputs only the first is sized.

    Args:
        handoff: the graph.
        names: nodes of it; others are left out.

    Returns:
        FLOPs, None when no node of the set is a matrix product, convolution or attention; bytes, None when the set is
        empty or a size is symbolic.
    """
    by_name = {node.name: node for node in handoff.graph.nodes}
    members = [by_name[name] for name in dict.fromkeys(names) if name in by_name]
    counted = [node.flops for node in members if node.flops is not None]
    num_flops = sum(counted) if counted else None
    if not members or any(node.bytes_moved is None for node in members):
        return num_flops, None
    return num_flops, _read_bytes(members, by_name) + _written_bytes(members, handoff, by_name)


def _read_bytes(members: Sequence[GraphNode], by_name: Mapping[str, GraphNode]) -> float:
    inside = {node.name for node in members if not _is_view(node)}
    # What lies behind the views -> the view (or the parameters of one node) -> bytes.
    reads: dict[str, dict[str, float]] = defaultdict(dict)

    def count(base: str, seen_as: str, num_bytes: float) -> None:
        reads[base][seen_as] = max(num_bytes, reads[base].get(seen_as, 0.0))

    for node in members:
        if _is_view(node):
            continue
        remaining = max(0.0, (node.bytes_moved or 0.0) - _size(node))
        unsized = [name for name in node.inputs if name not in by_name]
        sized = [name for name in node.inputs if name in by_name]
        for name in sized:
            # Where the size of the rest is unknown, the last input takes it: the other outputs of a split.
            is_rest = not unsized and name == sized[-1]
            taken = remaining if is_rest else min(remaining, float(_size(by_name[name])))
            remaining -= taken
            base = _behind_views(name, by_name)
            if base not in inside:
                count(base, name, taken)
        if unsized:
            count(" ".join(unsized), "", remaining)
    return sum(
        min(sum(seen.values()), max(_size(by_name[base]), *seen.values())) if base in by_name else sum(seen.values())
        for base, seen in reads.items()
    )


def _written_bytes(members: Sequence[GraphNode], handoff: GraphHandoff, by_name: Mapping[str, GraphNode]) -> float:
    inside = {node.name for node in members}
    used: set[str] = set()
    leaving = {_behind_views(name, by_name) for name in handoff.materialization_frontier}
    for node in handoff.graph.nodes:
        bases = {_behind_views(name, by_name) for name in node.inputs}
        used |= bases
        if node.name not in inside and not _is_view(node):
            leaving |= bases
    return float(
        sum(_size(node) for node in members if not _is_view(node) and (node.name in leaving or node.name not in used))
    )


def _behind_views(name: str, by_name: Mapping[str, GraphNode]) -> str:
    while (node := by_name.get(name)) is not None and _is_view(node) and node.inputs:
        name = node.inputs[0]
    return name


def _is_view(node: GraphNode) -> bool:
    return node.bytes_moved == 0.0


def _size(node: GraphNode) -> int:
    dtype = getattr(torch, node.dtype or "", None)
    return math.prod(node.shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else 0
