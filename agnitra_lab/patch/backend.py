"""The torch.compile backend: rewrite the graph that Dynamo captured, then hand it to Inductor.

Dynamo graph -> rewrites in a fixed order (a failing one is dropped, never the call) -> Inductor -> callable
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.patch import PatchDescriptor, Refusal
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.rewrites import REWRITES
from agnitra_lab.patch.weights import DerivedWeight, WeightGuard


class Backend:
    """A backend for `torch.compile(backend=...)` that records what it changed.

    Args:
        actions: names of the rewrites and templates to apply; actions that are options are not its business.
        kernels: gives the kernel for each site of the template actions.
        options: Inductor options for this compilation, as `torch.compile(options=...)` takes them.
        is_lowered: False runs the rewritten graph as it is, without Inductor.

    Attributes:
        descriptors: every change made, in graph order.
        refusals: every change asked for and not made.
        num_graphs: graphs that Dynamo handed over.
        failure: what Inductor raised on the last graph that it could not compile.
    """

    def __init__(
        self,
        actions: Sequence[str] = (),
        *,
        kernels: KernelSource | None = None,
        options: Mapping[str, Any] | None = None,
        is_lowered: bool = True,
    ) -> None:
        self.actions = [name for name in REWRITES if name in actions]
        self.kernels = kernels
        self.options = dict(options or {})
        self.is_lowered = is_lowered
        self.descriptors: list[PatchDescriptor] = []
        self.refusals: list[Refusal] = []
        self.num_graphs = 0
        self.failure: Exception | None = None
        self.guards: list[WeightGuard] = []
        self._graphs: list[_CompiledGraph] = []
        self._recorder = _Recorder()
        self._ordinals: dict[str, int] = {}
        self._shared: dict[tuple[Any, ...], DerivedWeight] = {}

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite and compile one graph.

        Raises:
            PatchError: when Inductor cannot compile the rewritten graph.
        """
        self.num_graphs += 1
        guard = self._rewrite(graph_module, example_inputs)
        try:
            run = self._lower(graph_module, list(example_inputs))
        except Exception as error:
            self.failure = error
            raise PatchError(
                f"Inductor could not compile the rewritten graph: {type(error).__name__}: {_first_line(error)}.",
                hint="The candidate is dropped; the original model is untouched.",
            ) from error
        graph = _CompiledGraph(run, guard, self._recorder)
        self._graphs.append(graph)
        if guard.is_needed:
            self.guards.append(guard)
        return graph

    def record(self, call: Callable[[], Any]) -> tuple[Any, list[GraphCall]]:
        """Run something and note every call of this backend's graphs inside it.

        Returns:
            What it returned, and (the compiled graph, its arguments, its outputs) a call.
        """
        calls: list[GraphCall] = []
        self._recorder.calls = calls
        try:
            return call(), calls
        finally:
            self._recorder.calls = None

    def release(self) -> None:
        """Let go of compiled code, derived weights and guards. Calls through this backend's graphs end here."""
        for graph in self._graphs:
            graph.release()
        self._graphs.clear()
        self.guards.clear()
        self._shared.clear()

    def _lower(self, graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if not self.is_lowered:
            return graph_module.forward
        from torch._inductor.compile_fx import compile_fx

        return cast(Callable[..., Any], compile_fx(graph_module, example_inputs, config_patches=self.options))

    def _rewrite(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> WeightGuard:
        if not self.actions:
            return WeightGuard()
        pristine = _Snapshot(graph_module)
        dropped: dict[str, Refusal] = {}
        while True:
            context = RewriteContext(graph_module, example_inputs, self.kernels, self._shared, dict(self._ordinals))
            failed, descriptors = _apply_all([name for name in self.actions if name not in dropped], context)
            if failed is None:
                break
            dropped[failed.action] = failed
            pristine.restore()
        self.descriptors.extend(descriptors)
        self._ordinals = context.ordinals
        for refusal in [*dropped.values(), *context.refusals]:
            if refusal not in self.refusals:
                self.refusals.append(refusal)
        return context.guard


GraphCall = tuple[Callable[..., Any], Sequence[Any], Any]


class _Recorder:
    """Where the graphs of one backend note their calls, while somebody listens."""

    calls: list[GraphCall] | None = None


class _CompiledGraph:
    """What Dynamo calls, and keeps for as long as it likes: `release` leaves it a shell that holds no memory."""

    # Dynamo wraps it and copies its `__dict__`, which would keep alive what `release` lets go.
    __slots__ = ("_guard", "_recorder", "_run")

    def __init__(self, run: Callable[..., Any], guard: WeightGuard, recorder: _Recorder) -> None:
        self._run: Callable[..., Any] | None = run
        self._recorder = recorder
        self._guard = guard if guard.is_needed else None

    def __call__(self, *args: Any) -> Any:
        if self._guard is not None:
            self._guard(args)
        if self._run is None:
            raise PatchError("This graph was rolled back.", hint="Call the drop-in; it runs the original.")
        if self._recorder.calls is None:
            return self._run(*args)
        outputs = self._run(*args)
        self._recorder.calls.append((self._run, args, outputs))
        return outputs

    def release(self) -> None:
        self._run = self._guard = None


def _apply_all(actions: Sequence[str], context: RewriteContext) -> tuple[Refusal | None, list[PatchDescriptor]]:
    """Apply rewrites in order; stop at the first that raises and say which."""
    descriptors: list[PatchDescriptor] = []
    graph_module = context.graph_module
    for action in actions:
        try:
            rewrite = importlib.import_module(REWRITES[action])
            made = rewrite.apply(graph_module, context.example_inputs, context)
            graph_module.graph.lint()
            graph_module.recompile()
        except Exception as error:
            reason = f"the rewrite failed and was dropped: {type(error).__name__}: {_first_line(error)}"
            return Refusal(action=action, reason=reason), []
        descriptors.extend(made)
    return None, descriptors


class _Snapshot:
    """A graph as Dynamo gave it, to start again from when a rewrite fails half way."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = _copy(graph_module.graph)
        self.buffers = {name for name, _ in graph_module.named_buffers()}

    def restore(self) -> None:
        for name, _ in list(self.graph_module.named_buffers()):
            if name not in self.buffers:
                delattr(self.graph_module, name)
                getattr(self.graph_module, "_param_name_to_source", {}).pop(name, None)
        self.graph_module.graph = _copy(self.graph)
        self.graph_module.recompile()


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = copied.node_copy(node, lambda old: mapping[old])
        # Dynamo hangs the origin of each input on its node; AOTAutograd asserts that it is there.
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
        mapping[node] = new
    return copied


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
