"""Find the graph of every root call that a profile saw: traced once per module and signature, then remembered."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from agnitra_lab.contracts import ComputationGraph, GraphHandoff, GraphNode
from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.capture import capture, original_module
from agnitra_lab.graph.compiled import CompiledGraph, capture_compiled
from agnitra_lab.graph.nodes import read_nodes
from agnitra_lab.graph.semantics import Phase, analyse
from agnitra_lab.profiler.markers import RootCall, signature_of
from agnitra_lab.profiler.places import RootGraph

# A cell that calls hundreds of small modules by hand would otherwise wait for as many traces.
MAX_ROOTS = 8
_MAX_KNOWN = 8


@dataclass(frozen=True)
class _Traced:
    handoff: GraphHandoff
    origin_of: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None
    phase: Phase | None = None


@dataclass
class RootGraphs:
    """The graphs of a profile's root calls.

    Attributes:
        handoffs: marker index of the root call -> its graph, in the order of first call.
        graphs: the same for attribution.
        phases: marker index of the root call -> prefill or decode, where the semantic analysis knows.
        note: why a root has no graph, None when all have one.
        capture_ms: what tracing them took.
    """

    handoffs: dict[int, GraphHandoff] = field(default_factory=dict)
    graphs: dict[int, RootGraph] = field(default_factory=dict)
    phases: dict[int, Phase] = field(default_factory=dict)
    note: str | None = None
    capture_ms: float = 0.0

    def nodes(self) -> tuple[tuple[str, GraphNode], ...]:
        """Return (printed name, node) of every graph."""
        return tuple((graph.prefix + node.name, node) for graph in self.graphs.values() for node in graph.nodes)


# Tracing a 22-layer decoder takes seconds; in a notebook the same model is profiled again and again.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Traced]] = weakref.WeakKeyDictionary()


def capture_roots(
    roots: Mapping[int, RootCall], compiled: Collection[int] = (), trained: Collection[int] = ()
) -> RootGraphs:
    """Trace every root call on the inputs of its first call; one that cannot be traced leaves a note.

    Args:
        roots: what `ModuleMarkers` recorded.
        compiled: marker indices of the root calls that torch.compile ran.
        trained: of the root calls that a backward pass followed.

    Returns:
        The graphs: exported ones for eager roots, Dynamo's own for compiled ones.
    """
    found = RootGraphs()
    problems: list[str] = []
    if not roots:
        found.note = "no torch.nn.Module was called, so there is no graph to tie ops to"
    started_ns = time.perf_counter_ns()
    traced: dict[int, _Traced] = {}
    for index, call in list(roots.items())[:MAX_ROOTS]:
        try:
            traced[index] = _traced(call, is_compiled=index in compiled, has_backward=index in trained)
        except CaptureError as error:
            problems.append(error.message)
    found.capture_ms = (time.perf_counter_ns() - started_ns) / 1e6
    if len(roots) > MAX_ROOTS:
        problems.append(f"{len(roots)} root modules were called; the first {MAX_ROOTS} were traced")
    problems += [entry.note for entry in traced.values() if entry.note]
    found.note = "; ".join(dict.fromkeys(problems)) or found.note
    found.handoffs = {index: entry.handoff for index, entry in traced.items()}
    found.phases = {index: entry.phase for index, entry in traced.items() if entry.phase is not None}
    prefixes = _prefixes({index: roots[index].module for index in traced}, found.phases)
    found.graphs = {
        index: RootGraph(entry.handoff.graph.nodes, prefixes.get(index, ""), entry.origin_of, index in compiled)
        for index, entry in traced.items()
    }
    return found


def remember(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], graph: CompiledGraph, *,
    is_compiled: bool = True,
) -> None:  # fmt: skip
    """Keep a graph of a module, so that a profile of its calls need not trace it.

    Args:
        module: the original.
        args, kwargs: what it was traced on.
        graph: what `capture_compiled` would find, or `capture` for calls that are not compiled.
        is_compiled: which of the two.
    """
    _keep(_known.setdefault(module, {}), _key(module, args, kwargs, is_compiled=is_compiled), _of_compiled(graph))


def remembered(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_compiled: bool
) -> CompiledGraph | None:
    """Return the graph that a profile or `remember` has kept of a module, None where neither has."""
    known = _known.get(module, {}) if isinstance(module, nn.Module) else {}
    found = known.get(_key(module, args, kwargs, is_compiled=is_compiled))
    return CompiledGraph(found.handoff, found.origin_of, found.note) if found is not None else None


def forget(module: Any) -> None:
    """Drop every graph of a module."""
    if isinstance(module, nn.Module):
        _known.pop(module, None)


def _key(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_compiled: bool, has_backward: bool = False
) -> Hashable:
    return _state(module), signature_of(args, dict(kwargs)), is_compiled, is_compiled and has_backward


def _keep(known: dict[Hashable, _Traced], key: Hashable, entry: _Traced) -> None:
    if len(known) >= _MAX_KNOWN:
        known.pop(next(iter(known)))
    known[key] = entry


def _of_compiled(graph: CompiledGraph) -> _Traced:
    return _Traced(graph.handoff, graph.origin_of, graph.note, analyse(graph.handoff).phase)


def _traced(call: RootCall, *, is_compiled: bool, has_backward: bool) -> _Traced:
    module = original_module(call.module)
    key = _key(module, call.args, call.kwargs, is_compiled=is_compiled, has_backward=has_backward)
    known = _known.setdefault(module, {}) if isinstance(module, nn.Module) else {}
    if key not in known:
        _keep(known, key, _trace(call, is_compiled=is_compiled, has_backward=has_backward))
    return known[key]


def _trace(call: RootCall, *, is_compiled: bool, has_backward: bool) -> _Traced:
    if is_compiled:
        return _of_compiled(capture_compiled(call.module, call.args, call.kwargs, has_grad=has_backward))
    own = _own_graph(call.module)
    handoff = own if own is not None else _named_as_traced(call.module, capture(call.module, call.args, call.kwargs))
    return _Traced(handoff, phase=analyse(handoff).phase)


def _own_graph(module: Any) -> GraphHandoff | None:
    """Read the graph of an exported program's module as it is, so that its nodes keep their names."""
    if not isinstance(module, fx.GraphModule):
        return None
    calls = [node for node in module.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    if not any(isinstance(node.target, torch._ops.OpOverload) and "val" in node.meta for node in calls):
        return None
    if any(node.op != "call_function" for node in calls if not _is_guard(module, node)):
        return None
    nodes, frontier = read_nodes(module)
    return GraphHandoff(graph=ComputationGraph(nodes=nodes), materialization_frontier=frontier)


def _named_as_traced(module: Any, handoff: GraphHandoff) -> GraphHandoff:
    """Give the nodes of a symbolically traced module the names of its own: a leaf module is one node there."""
    if not isinstance(module, fx.GraphModule):
        return handoff
    leaves = {str(node.target): node.name for node in module.graph.nodes if node.op == "call_module"}
    inside = Counter(node.module_path for node in handoff.graph.nodes)
    renamed = {
        node.name: leaf if inside[node.module_path] == 1 else f"{leaf}.{node.name}"
        for node in handoff.graph.nodes
        if (leaf := leaves.get(node.module_path or "")) is not None
    }
    nodes = tuple(
        node.model_copy(
            update={
                "name": renamed.get(node.name, node.name),
                "inputs": tuple(renamed.get(name, name) for name in node.inputs),
            }
        )
        for node in handoff.graph.nodes
    )
    frontier = tuple(renamed.get(name, name) for name in handoff.materialization_frontier)
    return handoff.model_copy(update={"graph": ComputationGraph(nodes=nodes), "materialization_frontier": frontier})


def _is_guard(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and "guard" in str(node.target)


def _state(module: Any) -> Hashable:
    """Return what changes when the module's code or weights' types do."""
    if not isinstance(module, nn.Module):
        return id(module)
    first = next(module.parameters(), None)
    code = hash(tuple((type(part), part.training, "forward" in part.__dict__) for part in module.modules()))
    return code, (first.dtype, first.device) if first is not None else None


def _prefixes(modules: Mapping[int, nn.Module], phases: Mapping[int, Phase]) -> dict[int, str]:
    if len(modules) < 2:
        return {}
    distinct = {id(module) for module in modules.values()}
    if len(distinct) == 1 and len({phases.get(index) for index in modules}) == len(modules):
        return {index: f"{phases.get(index) or 'other'}:" for index in modules}
    counts: Counter[str] = Counter()
    prefixes = {}
    for index, module in modules.items():
        name = type(module).__name__
        counts[name] += 1
        prefixes[index] = f"{name}:" if counts[name] == 1 else f"{name}_{counts[name]}:"
    return prefixes
