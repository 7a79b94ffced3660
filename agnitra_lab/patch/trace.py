"""Dynamo's trace of one call, made to look at the model's graph, that one candidate takes over to compile it.

To trace a 22-layer decoder takes some 2 s of an H200's host: once to see what the rewrites find, and once more for the
candidate that they then make. Dynamo's own guards and bytecode stay as they are; what it calls in the end is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext, TracingContext, compile_context, tracing

from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.liveness import Surroundings

Compiled = Callable[..., Any]
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class Trace:
    """The graph of one call, and the function in which Dynamo calls it.

    Args:
        model: what is traced.
        dynamo_options: under which it is.

    Attributes:
        compiled: what `torch.compile` gave; for whoever made the trace to set.
    """

    def __init__(self, model: Callable[..., Any], dynamo_options: Mapping[str, Any]) -> None:
        self.compiled: Compiled | None = None
        self._dynamo_options = dict(dynamo_options)
        # Dynamo guards all but hooks.
        self._surroundings = Surroundings(model) if isinstance(model, nn.Module) else None
        self._num_graphs = 0
        self._given: tuple[fx.GraphModule, list[Any], TracingContext | None, CompileContext | None] | None = None
        self._owner: Backend | None = None
        self._run: Compiled | None = None

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Take a graph from Dynamo: run it as it is, or as the backend compiles it that has taken the trace over."""
        if self._owner is not None:
            return self._owner(graph_module, example_inputs)
        self._num_graphs += 1
        if self._num_graphs > 1:
            # Of several graphs each would need its turn: the model is traced again.
            self._given = None
            return graph_module.forward
        if not _has_symbols(graph_module):
            contexts = TracingContext.try_get(), CompileContext.try_get()
            self._given = (graph_module, list(example_inputs), *contexts)
        self._run = graph_module.forward
        return self._call

    @property
    def is_taken(self) -> bool:
        """Whether a backend has taken it over."""
        return self._owner is not None

    def fits(self, backend: Backend) -> bool:
        """Whether a backend would be given the same graph; true once, since a graph is changed as it is compiled."""
        if self.compiled is None or self._given is None:
            return False
        return backend.dynamo_options == self._dynamo_options or not has_recurrent_layers(self._given[0].graph)

    def take(self, backend: Backend, call: Callable[[Compiled], Any]) -> Compiled | None:
        """Compile the graph with a backend, which from here on is given what Dynamo traces anew for other inputs.

        Args:
            backend: one that it fits.
            call: runs a function as the model was when it was traced.

        Returns:
            The function; None where Dynamo takes the call for another one by now, as after a change of the model.

        Raises:
            PatchError: when Inductor cannot compile it.
            Exception: whatever else it raises.
        """
        assert self.compiled is not None
        # A call that Dynamo traces again comes in by `__call__`, as a second graph.
        call(self.compiled)
        is_changed = self._surroundings is not None and self._surroundings.difference() is not None
        if self._given is None or is_changed:
            return None
        graph_module, example_inputs, traced, compiling = self._given
        self._given, self._owner = None, backend
        with torch.no_grad(), compile_context(compiling), tracing(traced):
            self._run = backend(graph_module, example_inputs)
        return self.compiled

    def _call(self, *args: Any) -> Any:
        assert self._run is not None
        return self._run(*args)


def has_recurrent_layers(graph: fx.Graph) -> bool:
    """Whether a graph holds what Dynamo leaves out of it unless it is told not to (`keep_eager.DYNAMO_OPTIONS`)."""
    return any(getattr(node.target, "__name__", "") in _RECURRENT for node in graph.nodes)


def _has_symbols(graph_module: fx.GraphModule) -> bool:
    """Whether a size is no number: then guards are still to be made as the graph is compiled."""
    found = (node.meta.get("example_value") for node in graph_module.graph.nodes if node.op == "placeholder")
    sizes = (size for value in found for size in (value.shape if isinstance(value, torch.Tensor) else (value,)))
    return any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes)
