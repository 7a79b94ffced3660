"""Capture the graphs of the root modules that a profile saw, and name their nodes across roots."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from agnitra_lab.contracts import GraphHandoff, GraphNode
from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.capture import capture
from agnitra_lab.profiler.attribution import Place
from agnitra_lab.profiler.markers import RootCall

# A cell that calls hundreds of small modules by hand would otherwise wait for as many traces.
MAX_ROOTS = 8


@dataclass
class RootGraphs:
    """The graphs of a profile's root modules.

    Attributes:
        handoffs: marker index of the root -> its graph, in the order of first call.
        note: why a root has no graph, None when all have one.
        capture_ms: what tracing them took.
    """

    handoffs: dict[int, GraphHandoff] = field(default_factory=dict)
    note: str | None = None
    capture_ms: float = 0.0
    _prefixes: dict[int, str] = field(default_factory=dict)

    def label(self, place: Place) -> str | None:
        """Return the printed node name of a place: prefixed with its root where there are several."""
        return f"{self._prefixes.get(place.root, '')}{place.node}" if place.node is not None else None

    def nodes(self) -> tuple[tuple[str, GraphNode], ...]:
        """Return (printed name, node) of every graph."""
        return tuple(
            (f"{self._prefixes.get(root, '')}{node.name}", node)
            for root, handoff in self.handoffs.items()
            for node in handoff.graph.nodes
        )


def capture_roots(roots: Mapping[int, RootCall]) -> RootGraphs:
    """Trace every root module on the inputs of its first call; a root that cannot be traced leaves a note.

    Args:
        roots: what `ModuleMarkers` recorded.
    """
    graphs = RootGraphs()
    problems: list[str] = []
    if not roots:
        graphs.note = "no torch.nn.Module was called, so there is no graph to tie ops to"
    started_ns = time.perf_counter_ns()
    for index, call in list(roots.items())[:MAX_ROOTS]:
        try:
            graphs.handoffs[index] = capture(call.module, call.args, call.kwargs)
        except CaptureError as error:
            problems.append(error.message)
    graphs.capture_ms = (time.perf_counter_ns() - started_ns) / 1e6
    if len(roots) > MAX_ROOTS:
        problems.append(f"{len(roots)} root modules were called; the first {MAX_ROOTS} were traced")
    if problems:
        graphs.note = "; ".join(problems)
    if len(graphs.handoffs) > 1:
        graphs._prefixes = _prefixes({index: roots[index].module for index in graphs.handoffs})
    return graphs


def _prefixes(modules: Mapping[int, nn.Module]) -> dict[int, str]:
    counts: Counter[str] = Counter()
    prefixes = {}
    for index, module in modules.items():
        name = type(module).__name__
        counts[name] += 1
        prefixes[index] = f"{name}:" if counts[name] == 1 else f"{name}_{counts[name]}:"
    return prefixes
