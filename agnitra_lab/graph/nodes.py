"""Read the call nodes of an exported FX graph into contract nodes: op, inputs, shape, module path, source, cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import torch
from torch import fx

from agnitra_lab.contracts import GraphNode
from agnitra_lab.graph.cost import bytes_moved, flops

# Bookkeeping that export inserts and that no eager call launches.
_GUARDS = frozenset({"aten::_assert_tensor_metadata", "aten::_assert_async", "aten::_assert_scalar", "aten::sym_size",
                     "aten::sym_constrain_range_for_size", "aten::sym_constrain_range"})  # fmt: skip
_TORCH_FOLDER = str(PurePath(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def read_nodes(graph_module: fx.GraphModule) -> tuple[tuple[GraphNode, ...], tuple[str, ...]]:
    """Describe every ATen call of an exported graph, regions (autocast, no_grad) opened up in place.

    Args:
        graph_module: the graph of a `torch.export.ExportedProgram`.

    Returns:
        The nodes in execution order, and the names of those whose values leave the graph.
    """
    resolved: dict[fx.Node, str] = {}
    nodes = tuple(_described(graph_module, resolved, prefix=""))
    output = next(iter(graph_module.graph.find_nodes(op="output")), None)
    frontier = [resolved[node] for node in output.all_input_nodes if node in resolved] if output is not None else []
    return nodes, tuple(dict.fromkeys(frontier))


def _described(graph_module: fx.GraphModule, resolved: dict[fx.Node, str], prefix: str) -> Iterator[GraphNode]:
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            resolved.setdefault(node, prefix + node.name)
        elif node.op == "call_function":
            region = _region_of(graph_module, node)
            if region is not None:
                yield from _region_nodes(node, region, resolved, f"{prefix}{node.name}.")
                continue
            op = op_name(node.target)
            if op is None:
                # getitem and the like hand one of their input's values on; consumers then point at the producer.
                source = next(iter(node.all_input_nodes), None)
                resolved[node] = resolved.get(source, node.name) if source is not None else node.name
            elif op not in _GUARDS:
                resolved[node] = prefix + node.name
                yield _describe(node, op, resolved)


def _region_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if not node.target.name().startswith("wrap"):
        return None
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            inner = graph_module.get_submodule(str(argument.target))
            if isinstance(inner, fx.GraphModule):
                return inner
    return None


def _region_nodes(
    node: fx.Node, region: fx.GraphModule, resolved: dict[fx.Node, str], prefix: str
) -> Iterator[GraphNode]:
    outer = [argument for argument in node.all_input_nodes if argument.op != "get_attr"]
    for placeholder, argument in zip(region.graph.find_nodes(op="placeholder"), outer, strict=False):
        resolved[placeholder] = resolved.get(argument, argument.name)
    last = node.name
    for described in _described(region, resolved, prefix):
        last = described.name
        yield described
    resolved[node] = last


def op_name(target: Any) -> str | None:
    """Return the name that the profiler prints for a call target ("aten::linear"), None for plain Python calls."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    return None


def _describe(node: fx.Node, op: str, resolved: dict[fx.Node, str]) -> GraphNode:
    value = first_tensor(node.meta.get("val"))
    return GraphNode(
        name=resolved[node],
        op=op,
        inputs=tuple(dict.fromkeys(resolved.get(source, source.name) for source in node.all_input_nodes)),
        shape=static_shape(value),
        dtype=str(value.dtype).removeprefix("torch.") if value is not None else None,
        module_path=_module_path(node),
        source=source_line(node),
        flops=flops(op, node),
        bytes_moved=bytes_moved(node),
    )


def first_tensor(value: Any) -> torch.Tensor | None:
    """Return the first tensor in a node's value, None when it holds none."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return next((item for item in value if isinstance(item, torch.Tensor)), None)
    return None


def static_shape(value: torch.Tensor | None) -> tuple[int, ...]:
    """Return a tensor's shape, () when there is no tensor or a size is symbolic."""
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return ()
    return tuple(int(size) for size in value.shape)


def _module_path(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    # A module that is called again carries "@1", "@2": it is the same module.
    return re.sub(r"@\d+", "", path)


def source_line(node: fx.Node) -> str | None:
    """Return file:line of the innermost frame outside of torch that made the node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    user_frames = list(_outside_torch(frames))
    if not user_frames:
        return None
    file, line = user_frames[-1]
    return f"{PurePath(file).name}:{line}"


def _outside_torch(frames: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((file, line) for file, line in frames if not file.startswith(_TORCH_FOLDER))
