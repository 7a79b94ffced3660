"""What a rewrite works with: the real weights behind graph inputs, the kernels, and the log that it writes to."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor, fx
from torch.utils import _pytree

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import Kernel, KernelSource
from agnitra_lab.contracts.patch import PatchDescriptor, Refusal
from agnitra_lab.patch.ops import display_name
from agnitra_lab.patch.weights import Assumption, Build, DerivedWeight, WeightGuard

_INDEX = re.compile(r"\[(?:'([^']*)'|(\d+))\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


@dataclass(frozen=True)
class _Derivation:
    sources: tuple[fx.Node, ...]
    build: Build
    variant: tuple[Any, ...]


class RewriteContext:
    """State of one graph while it is rewritten.

    Attributes:
        graph_module: the graph being rewritten.
        actions: every action that is applied to the graph, in any order.
        guard: checks derived weights before each call of this graph.
        refusals: what was not done, with the reason.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        kernels: KernelSource | None,
        shared: dict[tuple[Any, ...], DerivedWeight] | None = None,
        ordinals: dict[str, int] | None = None,
        actions: Collection[str] = (),
    ) -> None:
        self.graph_module = graph_module
        self.actions = frozenset(actions)
        self.example_inputs = example_inputs
        self._kernels = kernels
        self.guard = WeightGuard()
        self.refusals: list[Refusal] = []
        self._shared = {} if shared is None else shared
        self.ordinals = {} if ordinals is None else ordinals
        self._assumed: set[fx.Node] = set()
        self._derived: dict[fx.Node, _Derivation] = {}
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        self._inputs = {
            node: (index, value) for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=False))
        }

    def refuse(self, action: str, reason: str) -> None:
        """Record why a change was not made; the same reason is kept once."""
        refusal = Refusal(action=action, reason=reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def kernel(self, template: str, shape: Sequence[int], dtype: torch.dtype) -> Kernel | None:
        """Return the kernel to put at a site; None, with a refusal on record, when there is none for it."""
        numbers = tuple(int(size) for size in shape)
        name = str(dtype).removeprefix("torch.")
        kernel = self._kernels(template, numbers, name) if self._kernels is not None else None
        if kernel is None:
            why = getattr(self._kernels, "why_not", lambda *site: None)(template, numbers, name)
            reason = f"no {template} kernel was given for the shape {numbers} and {name}"
            self.refuse(template, reason if why is None else f"{reason}: {why}")
        return kernel

    def real_tensor(self, node: Any) -> Tensor | None:
        """Return the real weight that a node stands for, None when it is computed or unknown."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            value = self._inputs.get(node, (0, None))[1]
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.graph_module)
        else:
            return None
        is_fake = isinstance(value, torch._subclasses.fake_tensor.FakeTensor)
        return value if isinstance(value, Tensor) and not is_fake else None

    def is_weight(self, node: Any) -> bool:
        """Whether a node is a parameter of the model, or a weight that a rewrite derived from some."""
        return node in self._derived or isinstance(self.real_tensor(node), torch.nn.Parameter)

    def derive(
        self, action: str, sources: Sequence[fx.Node], build: Build, before: fx.Node, variant: tuple[Any, ...] = ()
    ) -> fx.Node:
        """Add a weight built from the weights behind `sources` and return the node that reads it.

        The graph's callers keep passing the source weights, so the guard sees those of each call. A source may be a
        derived weight itself: the new one then follows the sources of that.

        Args:
            build: source tensors -> the derived tensor.
            before: where the reading node is inserted.
            variant: constants that `build` uses; graphs of one model share a derived weight only when they agree.
        """
        near, (origin, sources, build) = sources[0], self._expand(sources, build)
        tensors = [tensor for tensor in map(self.real_tensor, sources) if tensor is not None]
        key = (action, variant, origin, *map(id, tensors))
        weight = self._shared.get(key)
        if weight is None or not weight.is_current(tensors):
            weight = DerivedWeight(tensors, build)
            self._shared[key] = weight
        if all(source.op == "placeholder" for source in sources):
            self.guard.watch(weight, tuple(self._inputs[source][0] for source in sources))
        node = self.constant(action, weight.value, before, near)
        self._derived[node] = _Derivation(tuple(sources), build, (action, *variant, origin))
        return node

    def constant(self, action: str, value: Tensor, before: fx.Node, near: fx.Node) -> fx.Node:
        """Add a tensor that no call changes and return the node that reads it.

        Args:
            value: the tensor.
            before: where the reading node is inserted.
            near: a node whose value has the fake mode of the graph.
        """
        name = self._register(action, value)
        with self.graph_module.graph.inserting_before(before):
            node = self.graph_module.graph.get_attr(name)
        node.meta["example_value"] = _fake_like(value, near)
        return node

    def _expand(self, sources: Sequence[fx.Node], build: Build) -> tuple[tuple[Any, ...], tuple[fx.Node, ...], Build]:
        """Return what was derived on the way, the weights that `sources` go back to, and the build from those."""
        steps = [self._derived.get(source) for source in sources]
        if not any(steps):
            return (), tuple(sources), build

        def build_all(*tensors: Tensor) -> Tensor:
            rest, built = list(tensors), []
            for step in steps:
                taken = [rest.pop(0) for _ in (step.sources if step else (None,))]
                built.append(step.build(*taken) if step else taken[0])
            return build(*built)

        origins = [step.sources if step else (source,) for step, source in zip(steps, sources, strict=True)]
        names = tuple(step.variant if step else None for step in steps)
        return names, tuple(itertools.chain.from_iterable(origins)), build_all

    def assume(self, sources: Collection[fx.Node]) -> None:
        """Build on the values that these buffers have now: a call that finds others runs the graph as Dynamo gave it.

        Sources that are constants of the graph itself need no check.
        """
        for source in sources:
            tensor = self.real_tensor(source)
            if source.op == "placeholder" and tensor is not None and source not in self._assumed:
                self._assumed.add(source)
                self.guard.watch(Assumption(tensor), (self._inputs[source][0],))

    def _register(self, action: str, value: Tensor) -> str:
        number = sum(1 for _ in self.graph_module.buffers())
        name = f"agnitra_{action}_{number}"
        while hasattr(self.graph_module, name):
            number += 1
            name = f"agnitra_{action}_{number}"
        self.graph_module.register_buffer(name, value)
        # AOTAutograd asserts that each weight of a Dynamo graph has a source; it then treats it as static, which is
        # what lets a CUDA graph read it in place instead of copying it in at each call.
        sources = getattr(self.graph_module, "_param_name_to_source", None)
        if sources is not None:
            from torch._dynamo.source import LocalSource

            sources[name] = LocalSource(name)
        return name

    def describe(
        self,
        action: str,
        node: fx.Node,
        replaced: Sequence[fx.Node],
        replacement: str,
        config: Mapping[str, JsonValue] | None = None,
        kernel_hash: str | None = None,
    ) -> PatchDescriptor:
        """Return the descriptor of one change. Call it before the nodes are erased.

        Args:
            node: the node whose value is replaced; it gives module path and source line.
            replaced: the nodes that go away.
        """
        path = module_path(node)
        stem = f"{action}__{path or 'root'}"
        ordinal = self.ordinals.get(stem, 0)
        self.ordinals[stem] = ordinal + 1
        return PatchDescriptor(
            name=f"{stem}__{ordinal}",
            action=action,
            kind=ACTIONS[action].kind,
            node=node.name,
            module_path=path,
            source=source_line(node),
            replaced=tuple(display_name(gone) for gone in replaced),
            replacement=replacement,
            config=dict(config or {}),
            kernel_hash=kernel_hash,
        )

    def call(self, before: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before a node; a string names a method. Its fake value is for the caller to record."""
        graph = self.graph_module.graph
        with graph.inserting_before(before):
            is_method = isinstance(target, str)
            node = (graph.call_method if is_method else graph.call_function)(target, args, kwargs)  # type: ignore[arg-type]
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in before.meta:
                node.meta[key] = before.meta[key]
        return node

    def again(self, before: fx.Node, node: fx.Node, value: fx.Node) -> fx.Node:
        """Insert what `node` does to its first argument once more, for another value, before a node."""
        with self.graph_module.graph.inserting_before(before):
            copy = self.graph_module.graph.create_node(
                node.op, node.target, (value, *node.args[1:]), dict(node.kwargs), type_expr=node.type
            )
        copy.meta = {key: item for key, item in node.meta.items() if key != "example_value"}
        copy.meta["example_value"] = view_again(node, value.meta["example_value"])
        return copy


def view_again(node: fx.Node, fake: Tensor) -> Tensor:
    """Do to a fake tensor what `node` does to its first argument."""
    call = getattr(fake, node.target) if isinstance(node.target, str) else functools.partial(node.target, fake)
    return cast(Tensor, call(*node.args[1:], **node.kwargs))


def infer(node: fx.Node) -> None:
    """Record a new node's fake value by running it on those of its arguments; without them it stays unknown."""
    from torch._subclasses.fake_tensor import FakeTensor

    values = [source.meta.get("example_value") for source in node.all_input_nodes]
    modes = [leaf.fake_mode for leaf in _pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)]
    if not modes or any(value is None for value in values):
        return
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta["example_value"])
    with modes[0], torch.no_grad():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif callable(node.target):
            node.meta["example_value"] = node.target(*args, **kwargs)


def _fake_like(value: Tensor, near: fx.Node) -> Tensor:
    fake = near.meta.get("example_value")
    mode = getattr(fake, "fake_mode", None)
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


def erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses any more. A general dead-code pass would drop in-place writes."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def module_path(node: fx.Node) -> str:
    """Return the innermost module of a node as a fully qualified name, "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    raw = list(stack.values())[-1][0] if stack else ""
    text = re.sub(r"^L\['[^']*'\]|^L__self__|^self", "", raw)
    text = text.replace("._modules", "").replace("slf", "")
    text = _INDEX.sub(lambda found: "." + (found.group(1) or found.group(2) or ""), text)
    return text.strip(".")


def source_line(node: fx.Node) -> str | None:
    """Return `file.py:line` of the user's code behind a node: the innermost frame outside torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for path, line in reversed(frames):
        parts = PurePath(path).parts
        if "torch" not in parts and not path.endswith("patch/install.py"):
            return f"{parts[-1]}:{line}"
    return None
