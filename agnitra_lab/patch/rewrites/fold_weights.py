"""What a model computes from its weights alone is computed once, and again only when a weight changes.

Trigger: values that depend on parameters, perhaps with buffers and numbers, and are read beside the call's own inputs:
1 + weight of a norm, a weight under weight norm or another parametrisation, the bias that a table and constant
positions give, a weight that is widened at each call. What buffers alone give stays, for the rewrites that read masks.
Algebra: none; the same calls, ahead.
Guard: no random or in-place call among them, nothing writes what they read or give, and they do not leave the graph.
What is larger than 4 MiB is kept only where it takes no more memory than its sources (twice as much before a product).
Source: constant folding, as in Inductor's `freezing`, which needs weights that never change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.constants import is_of_the_model
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.ops import fake_of, is_in_place, is_torchs_own, memory_root, mutated_roots, op_name
from agnitra_lab.patch.weights import why_not_derivable

ACTION = "fold_weights"
_SMALL_BYTES = 4 * 2**20
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal_", "poisson", "gumbel", "rrelu", "empty", "seed")
_PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_LEAST_PACKED = 2**16
_PRODUCTS = {
    "linear", "matmul", "addmm", "baddbmm", "einsum", "sdpa", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each value of weights alone by a derived weight.

    Returns:
        One descriptor per value.
    """
    static = _static_nodes(graph_module.graph, context)
    descriptors = []
    for node in [node for node in graph_module.graph.nodes if node in static and _is_needed(node, static)]:
        cone = _cone(node)
        sources = [member for member in cone if member.op == "placeholder"]
        problem = _why_not(node, sources, context)
        if problem:
            context.refuse(ACTION, problem)
        elif any(isinstance(context.real_tensor(source), torch.nn.Parameter) for source in sources):
            descriptors.append(_fold(node, cone, sources, context))
    if not descriptors and not context.refusals:
        context.refuse(ACTION, "nothing in the graph is computed from weights alone")
    return descriptors


def _static_nodes(graph: fx.Graph, context: RewriteContext) -> set[fx.Node]:
    """Return the weights, the constants, and what pure calls make of them."""
    written = mutated_roots(graph)
    static: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            is_static = _is_weight(context.real_tensor(node))
        elif node.op == "get_attr":
            is_static = type(context.real_tensor(node)) is Tensor
        else:
            is_static = _is_pure(node) and all(source in static for source in node.all_input_nodes)
        if is_static and memory_root(node) not in written:
            static.add(node)
    return static


def _is_weight(tensor: Tensor | None) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or (tensor is not None and is_of_the_model(tensor))


def _is_pure(node: fx.Node) -> bool:
    """Whether a call gives one tensor, from its arguments alone."""
    if node.op not in ("call_function", "call_method") or fake_of(node) is None or is_in_place(node):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_known = node.op == "call_method" or is_torchs_own(node.target)
    return is_known and not any(word in str(name) for word in _RANDOM)


def _is_needed(node: fx.Node, static: set[fx.Node]) -> bool:
    """Whether a value is made, not only viewed, and read through views beside what is no weight."""
    if node.op in ("placeholder", "get_attr") or _is_alias(node):
        return False
    return any(user not in static for user in _readers(node, static))


def _readers(node: fx.Node, static: set[fx.Node]) -> list[fx.Node]:
    found = []
    for user in node.users:
        found += _readers(user, static) if user in static and _is_alias(user) else [user]
    return found


def _is_alias(node: fx.Node) -> bool:
    """Whether a node gives the memory of an argument."""
    fake = fake_of(node)
    if fake is None:
        return False
    storages = {
        source.untyped_storage()._cdata for used in node.all_input_nodes if (source := fake_of(used)) is not None
    }
    return fake.untyped_storage()._cdata in storages


def _cone(node: fx.Node) -> list[fx.Node]:
    """Return all that a node is made of, in graph order, itself last."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return [member for member in node.graph.nodes if member in found]


def _why_not(node: fx.Node, sources: Sequence[fx.Node], context: RewriteContext) -> str | None:
    fake = fake_of(node)
    tensors = [context.real_tensor(source) for source in sources]
    if not sources or fake is None:
        return None
    problem = why_not_derivable(tensors)
    if problem:
        return problem
    if not fake.is_contiguous():
        return "a value of weights alone is not contiguous"
    if any(tensor is not None and tensor.dtype in _PACKED and tensor.numel() > _LEAST_PACKED for tensor in tensors):
        return "a weight is kept in one byte a value, and would take more in memory and on the way"
    if any(user.op == "output" for user in _all_readers(node)):
        return "a value of weights alone leaves the graph, and its caller may write to it"
    size = math.prod(fake.shape) * fake.element_size()
    given = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    most = 2 * given if any(op_name(user) in _PRODUCTS for user in _all_readers(node)) else given
    if size > max(_SMALL_BYTES, most):
        return "a value of weights alone takes much more memory than they do"
    return None


def _all_readers(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        found += [user, *(_all_readers(user) if _is_alias(user) else [])]
    return found


def _fold(
    node: fx.Node, cone: Sequence[fx.Node], sources: Sequence[fx.Node], context: RewriteContext
) -> PatchDescriptor:
    gone = [member for member in cone if member.op in ("call_function", "call_method")]
    fake = fake_of(node)
    assert fake is not None
    descriptor = context.describe(
        ACTION, node, gone, "a weight of its own", {"shape": [int(size) for size in fake.shape]}
    )
    weight = context.derive(ACTION, sources, _builder(cone, sources, context), node, _spelling(cone))
    node.replace_all_uses_with(weight)
    erase_unused(gone)
    return descriptor


def _builder(cone: Sequence[fx.Node], sources: Sequence[fx.Node], context: RewriteContext) -> Callable[..., Tensor]:
    """Return the calls of a cone as a function of its weights."""
    constants = {node: context.real_tensor(node) for node in cone if node.op == "get_attr"}
    # The graph's own nodes are erased or change: their calls are kept by value.
    calls = [(node, node.op, node.target, node.args, dict(node.kwargs)) for node in cone if node.op.startswith("call")]

    def build(*tensors: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**constants, **dict(zip(sources, tensors, strict=True))}
        for node, op, target, args, kwargs in calls:
            given: Any = fx.node.map_arg((args, kwargs), values.__getitem__)
            if op == "call_method":
                values[node] = getattr(given[0][0], str(target))(*given[0][1:], **given[1])
            else:
                values[node] = target(*given[0], **given[1])  # type: ignore[operator]
        return values[calls[-1][0]]  # type: ignore[no-any-return]

    return build


def _spelling(cone: Sequence[fx.Node]) -> tuple[Any, ...]:
    """Return what tells the calls of one cone from those of another over the same weights."""
    places = {node: f"%{index}" for index, node in enumerate(cone)}
    return tuple(
        (str(node.target), repr(fx.node.map_arg((node.args, node.kwargs), places.__getitem__)))
        for node in cone
        if node.op.startswith("call")
    )
