"""The torch.compile backend: rewrite the graph that Dynamo captured, then hand it to Inductor.

Dynamo graph -> rewrites in a fixed order (a failing one is dropped, never the call) -> Inductor -> callable
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.patch import PatchDescriptor, Refusal
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.rewrites import REWRITES
from agnitra_lab.patch.weights import DerivedWeight, WeightGuard

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


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
        dynamo_options: what Dynamo's config must say while it traces, for the rewrites to see what they look for.
        num_graphs: graphs that Dynamo handed over.
        graphs_sha256: of all of them, as they came.
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
        modules = [importlib.import_module(REWRITES[name]) for name in self.actions]
        self.dynamo_options: dict[str, Any] = {}
        for module in modules:
            self.dynamo_options |= getattr(module, "DYNAMO_OPTIONS", {})
        self.descriptors: list[PatchDescriptor] = []
        self.refusals: list[Refusal] = []
        self.num_graphs = 0
        self.graphs_sha256 = ""
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
        self.graphs_sha256 = hashlib.sha256((self.graphs_sha256 + _facts(graph_module.graph)).encode()).hexdigest()
        guard, unchanged = self._rewrite(graph_module, example_inputs)
        try:
            run = self._lower(graph_module, list(example_inputs))
        except Exception as error:
            self.failure = error
            raise PatchError(
                f"Inductor could not compile the rewritten graph: {type(error).__name__}: {first_line(error)}.",
                hint="The candidate is dropped; the original model is untouched.",
            ) from error
        graph = _CompiledGraph(run, guard, unchanged, self._recorder)
        self._graphs.append(graph)
        if guard.is_needed:
            self.guards.append(guard)
        return graph

    def try_on_copy(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
        """Rewrite a copy of a graph, and leave the graph as it is.

        Returns:
            The copy.
        """
        self.num_graphs += 1
        copied = _Snapshot(graph_module).graph_module_of()
        self._rewrite(copied, example_inputs)
        return copied

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

    @contextmanager
    def watched(self, mode: TorchDispatchMode) -> Iterator[None]:
        """Let a mode see the ops of this backend's graphs, and of nothing else.

        Dynamo runs no compiled code inside a dispatch mode; so it is entered behind Dynamo.
        """
        self._recorder.mode = mode
        try:
            yield
        finally:
            self._recorder.mode = None

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

        options = {**self._options_of_rewrites(), **self.options}
        return cast(Callable[..., Any], compile_fx(graph_module, example_inputs, config_patches=options))

    def _options_of_rewrites(self) -> dict[str, Any]:
        """Return what the rewrites that changed something want of Inductor, as far as this one knows it."""
        from torch._inductor import config

        found: dict[str, Any] = {}
        for action in {descriptor.action for descriptor in self.descriptors}:
            found |= getattr(importlib.import_module(REWRITES[action]), "INDUCTOR_OPTIONS", {})
        return {name: value for name, value in found.items() if hasattr(config, name)}

    def _rewrite(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[WeightGuard, fx.GraphModule | None]:
        """Rewrite the graph; return its guard, and the graph as it was where the guard may forbid the new one."""
        if not self.actions:
            return WeightGuard(), None
        pristine = _Snapshot(graph_module)
        dropped: dict[str, Refusal] = {}
        while True:
            actions = [name for name in self.actions if name not in dropped]
            context = RewriteContext(
                graph_module, example_inputs, self.kernels, self._shared, dict(self._ordinals), actions
            )
            failed, descriptors = _apply_all(actions, context)
            if failed is None:
                break
            dropped[failed.action] = failed
            pristine.restore()
        self.descriptors.extend(descriptors)
        self._ordinals = context.ordinals
        for refusal in [*dropped.values(), *context.refusals]:
            if refusal not in self.refusals:
                self.refusals.append(refusal)
        unchanged = pristine.graph_module_of() if context.guard.has_assumptions else None
        return context.guard, unchanged


GraphCall = tuple[Callable[..., Any], Sequence[Any], Any]


class _Recorder:
    """Where the graphs of one backend note their calls, while somebody listens, and what watches their ops."""

    calls: list[GraphCall] | None = None
    mode: TorchDispatchMode | None = None


class _CompiledGraph:
    """What Dynamo calls, and keeps for as long as it likes: `release` leaves it a shell that holds no memory."""

    # Dynamo wraps it and copies its `__dict__`, which would keep alive what `release` lets go.
    __slots__ = ("_guard", "_recorder", "_run", "_unchanged")

    def __init__(
        self,
        run: Callable[..., Any],
        guard: WeightGuard,
        unchanged: Callable[..., Any] | None,
        recorder: _Recorder,
    ) -> None:
        self._run: Callable[..., Any] | None = run
        self._recorder = recorder
        self._unchanged = unchanged
        self._guard = guard if guard.is_needed else None

    def __call__(self, *args: Any) -> Any:
        if self._guard is not None:
            self._guard(args)
            if self._guard.is_broken and self._unchanged is not None:
                return self._unchanged(*args)
        if self._run is None:
            raise PatchError("This graph was rolled back.", hint="Call the drop-in; it runs the original.")
        if self._recorder.mode is not None:
            with self._recorder.mode:
                return self._run(*args)
        if self._recorder.calls is None:
            return self._run(*args)
        outputs = self._run(*args)
        self._recorder.calls.append((self._run, args, outputs))
        return outputs

    def release(self) -> None:
        self._run = self._guard = self._unchanged = None


def _apply_all(actions: Sequence[str], context: RewriteContext) -> tuple[Refusal | None, list[PatchDescriptor]]:
    """Apply rewrites in order; stop at the first that raises and say which.

    The code of a graph is written once, after all of them: for a decoder of 22 layers that takes as long as they do.
    """
    descriptors: list[PatchDescriptor] = []
    graph_module = context.graph_module
    for action in actions:
        try:
            rewrite = importlib.import_module(REWRITES[action])
            made = rewrite.apply(graph_module, context.example_inputs, context)
            if made:
                graph_module.graph.lint()
        except Exception as error:
            return _dropped(action, error), []
        descriptors.extend(made)
    try:
        graph_module.recompile()
    except Exception as error:
        if not actions:
            raise
        # Whichever of them it was: with the last one gone, the next try says whether it was that.
        return _dropped(descriptors[-1].action if descriptors else actions[-1], error), []
    return None, descriptors


def _dropped(action: str, error: Exception) -> Refusal:
    return Refusal(
        action=action, reason=f"the rewrite failed and was dropped: {type(error).__name__}: {first_line(error)}"
    )


class _Snapshot:
    """A graph as Dynamo gave it, to start again from when a rewrite fails half way."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = _copy(graph_module.graph)
        self.buffers = {name for name, _ in graph_module.named_buffers()}

    def graph_module_of(self) -> fx.GraphModule:
        """Return a module of its own that computes what the graph did."""
        return fx.GraphModule(self.graph_module, _copy(self.graph))

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


def _facts(graph: fx.Graph) -> str:
    """Say what a graph computes on what, without the names of its nodes."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def fact(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, Mapping):
            return [(name, fact(item)) for name, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [fact(item) for item in value]
        if isinstance(value, slice):
            return [fact(value.start), fact(value.stop), fact(value.step)]
        # The address of anything else is another in each process.
        return repr(value) if isinstance(value, _PLAIN) else type(value).__name__

    rows = []
    for node in graph.nodes:
        value = node.meta.get("example_value")
        is_strided = isinstance(value, Tensor) and value.layout is torch.strided
        kind = (tuple(value.shape), value.stride(), value.dtype, value.device) if is_strided else type(value).__name__
        target = "" if node.op == "placeholder" else str(getattr(node.target, "__qualname__", node.target))
        rows.append((node.op, target, fact(node.args), fact(node.kwargs), kind))
    return repr(rows)


def first_line(error: BaseException) -> str:
    """Return the line of a message that says what went wrong: a compile worker puts its traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("Set TORCH", "You can suppress", "import torch"))]
    if not own:
        return "no message"
    return f"{own[0]} {own[-1]}" if "exception occurred in a subprocess" in own[0] else own[0]
