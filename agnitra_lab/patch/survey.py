"""Find out where kernels would go before any is made: the rewrites over the captured graph, with nothing compiled."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from agnitra_lab.contracts.kernel import Kernel, KernelSource, Launch, Site, TensorLayout
from agnitra_lab.contracts.patch import Refusal
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.graph.compiled import CompiledGraph, read_compiled
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import fresh_entry
from agnitra_lab.patch.rollback import MutableState, run_original

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass(frozen=True)
class Survey:
    """What the rewrites found.

    Attributes:
        actions: those that changed the graph; a template's site is the business of the kernel source.
        refusals: why others did not.
        launches: how the kernels of the second round are called, each way once.
        graph: Dynamo's own graph, as a plain torch.compile would trace it; None where it makes several, or where the
            rewrites ask for another trace.
    """

    actions: frozenset[str]
    refusals: tuple[Refusal, ...]
    launches: tuple[Launch, ...] = ()
    graph: CompiledGraph | None = None


def survey(
    workload: Workload, actions: Sequence[str], kernels: KernelSource, *, together: KernelSource | None = None
) -> Survey:
    """Rewrite the graphs of one call and throw the result away; `kernels` hears of each site.

    Args:
        workload: runs once, on its own inputs; what it writes is restored.
        actions: what would be patched. Those that measure or merge weights do so here too.
        kernels: asked for each site; where it has none to give, all rewrites find all that they would take alone.
        together: asked for each site as well, in a second round over the same graphs: where it gives kernels, it hears
            of those sites alone that are left once the rewrites before have had theirs.

    Returns:
        What would change, and why the rest would not. Of a model that Dynamo cannot trace nothing would.
    """
    surveyor = _Surveyor(actions, kernels, together, is_module=isinstance(workload.model, nn.Module))
    state = MutableState.of(workload)
    try:
        with torch._dynamo.config.patch(surveyor.first.dynamo_options):
            run_original(workload, torch.compile(fresh_entry(workload.model), dynamic=False, backend=surveyor))
    except Exception as error:
        return Survey(frozenset(), (Refusal(action="survey", reason=f"{type(error).__name__}: {str(error)[:200]}"),))
    finally:
        state.restore()
    first = surveyor.first
    return Survey(
        frozenset(change.action for change in first.descriptors),
        tuple(first.refusals),
        tuple(surveyor.launches),
        surveyor.graph_of_all(),
    )


class _Surveyor:
    """A backend that lets rewrites loose on copies of each graph, and runs it as it was."""

    def __init__(
        self, actions: Sequence[str], kernels: KernelSource, together: KernelSource | None, *, is_module: bool
    ) -> None:
        self.first = Backend(actions, kernels=kernels)
        self.launches: dict[Launch, None] = {}
        self._placed = _Placed(together) if together is not None else None
        self._second = Backend(actions, kernels=self._placed)
        self._is_module = is_module
        self._graph: CompiledGraph | None = None

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not self.first.num_graphs and not _has_recurrent_layers(graph_module.graph):
            # What the rewrites find does not depend on whether a profile can use the graph.
            with contextlib.suppress(Exception):
                self._graph = read_compiled(graph_module, is_module=self._is_module)
        self.first.try_on_copy(graph_module, example_inputs)
        # Each round merges weights of its own: those of one at a time.
        self.first.release()
        if self._placed is not None:
            changed = self._second.try_on_copy(graph_module, example_inputs)
            self.launches |= dict.fromkeys(self._placed.launches_in(changed.graph))
            self._second.release()
        return graph_module.forward

    def graph_of_all(self) -> CompiledGraph | None:
        """The one graph of the model, None where there are several, or torch.compile would make another."""
        return self._graph if self.first.num_graphs == 1 else None


class _Placed:
    """A kernel source that knows afterwards which call in a graph is of which site."""

    def __init__(self, kernels: KernelSource) -> None:
        self._kernels = kernels
        self._sites: dict[Callable[..., Any], Site] = {}

    def __call__(self, template: str, shape: tuple[int, ...], dtype: str) -> Kernel | None:
        kernel = self._kernels(template, shape, dtype)
        if kernel is None:
            return None
        given = kernel.call

        def call(*tensors: Any, **options: Any) -> Any:
            return given(*tensors, **options)

        self._sites[call] = Site(template, tuple(shape), dtype)
        return replace(kernel, call=call)

    def launches_in(self, graph: fx.Graph) -> Iterator[Launch]:
        """Yield how the graph calls the kernels, where all of it is known."""
        for node in graph.nodes:
            site = self._sites.get(inspect.unwrap(node.target)) if node.op == "call_function" else None
            known = all(isinstance(source.meta.get("example_value"), Tensor) for source in node.all_input_nodes)
            if site is not None and known:
                args, options = fx.map_arg((node.args, dict(node.kwargs)), _layout)
                with contextlib.suppress(TypeError):  # a size that is no number
                    launch = Launch(site, tuple(args), tuple(options.items()))
                    hash(launch)
                    yield launch


def _has_recurrent_layers(graph: fx.Graph) -> bool:
    """Whether the graph holds what Dynamo leaves out of it unless it is told not to (`keep_eager.DYNAMO_OPTIONS`)."""
    return any(getattr(node.target, "__name__", "") in _RECURRENT for node in graph.nodes)


def _layout(node: fx.Node) -> Any:
    fake = node.meta["example_value"]
    offset, dtype = int(fake.storage_offset()), str(fake.dtype).removeprefix("torch.")
    return TensorLayout(tuple(map(int, fake.shape)), tuple(map(int, fake.stride())), offset, dtype)
