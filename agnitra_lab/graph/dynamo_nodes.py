"""Read the call nodes of one of Dynamo's graphs into contract nodes, by the names that Inductor's comments use."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from agnitra_lab.contracts import GraphNode
from agnitra_lab.graph.cost import bytes_moved, flops
from agnitra_lab.graph.nodes import first_tensor, op_name, source_line, static_shape

_OPERATORS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.neg: "neg",
    operator.floordiv: "floor_divide", operator.mod: "remainder", operator.pow: "pow", operator.matmul: "matmul",
    operator.iadd: "add_", operator.isub: "sub_", operator.imul: "mul_", operator.itruediv: "div_",
    operator.eq: "eq", operator.ne: "ne", operator.lt: "lt", operator.le: "le", operator.gt: "gt", operator.ge: "ge",
    operator.and_: "__and__", operator.or_: "__or__", operator.xor: "__xor__", operator.invert: "bitwise_not",
    operator.iand: "__iand__", operator.ior: "__ior__", operator.abs: "abs",
}  # fmt: skip
# Python's name -> the op's. Every conversion by method, such as x.float(), is aten::to.
_OTHER_NAMES = {"cross_entropy": "cross_entropy_loss", "nll_loss": "nll_loss_nd", "type_as": "to"} | dict.fromkeys(
    ("float", "double", "half", "bfloat16", "int", "long", "short", "bool", "type", "cuda", "cpu"), "to"
)


class DynamoReader:
    """Reads one graph. The body of a checkpoint, and of other calls with one body, is opened up in place."""

    def __init__(self, graph_module: fx.GraphModule, *, is_module: bool) -> None:
        """Take the graph; `is_module` says that a module was compiled, whose own name is no part of module paths."""
        self._root = graph_module
        self._is_module = is_module
        self._names: dict[fx.Node, str] = {}
        # Bodies name their nodes for themselves: a name that occurs twice tells nothing without its call.
        self._num_uses = Counter(node.name for node in _visited(graph_module))

    def read(self) -> tuple[tuple[GraphNode, ...], tuple[str, ...]]:
        """Return the calls that compute or view a tensor, in order, and the names of those that leave the graph."""
        nodes = tuple(self._read(self._root, ""))
        output = next(iter(self._root.graph.find_nodes(op="output")))
        frontier = [self._names[node] for node in output.all_input_nodes]
        return nodes, tuple(dict.fromkeys(frontier))

    def picked_outputs(self) -> dict[str, str]:
        """Return name -> name of its producer, for the nodes that only hand on a value (getitem of a split)."""
        picked = {node: name for node, name in self._names.items() if _is_call(node) and name != node.name}
        return {node.name: name for node, name in picked.items() if _op(node) is None}

    def _read(self, graph_module: fx.GraphModule, prefix: str) -> Iterator[GraphNode]:
        for node in graph_module.graph.nodes:
            body = _body(graph_module, node)
            if body is not None:
                yield from self._read_body(node, body, f"{prefix}{node.name}.")
                continue
            op = _op(node) if _is_call(node) else None
            source = next(iter(node.all_input_nodes), None)
            if op is None and source is not None:
                self._names[node] = self._names.get(source, source.name)
            elif op is None:
                self._names.setdefault(node, node.name)
            else:
                self._names[node] = node.name if self._num_uses[node.name] == 1 else prefix + node.name
                yield self._describe(node, op)

    def _read_body(self, call: fx.Node, body: fx.GraphModule, prefix: str) -> Iterator[GraphNode]:
        outer = [argument for argument in call.all_input_nodes if argument.op != "get_attr"]
        for placeholder, argument in zip(body.graph.find_nodes(op="placeholder"), outer, strict=False):
            self._names[placeholder] = self._names.get(argument, argument.name)
        last = call.name
        for described in self._read(body, prefix):
            last = described.name
            yield described
        self._names[call] = last

    def _describe(self, node: fx.Node, op: str) -> GraphNode:
        value = first_tensor(node.meta.get("example_value"))
        with _values(node):
            num_flops, num_bytes = flops(op, node), bytes_moved(node, op)
        return GraphNode(
            name=self._names[node],
            op=op,
            inputs=tuple(dict.fromkeys(self._names.get(source, source.name) for source in node.all_input_nodes)),
            shape=static_shape(value),
            dtype=str(value.dtype).removeprefix("torch.") if value is not None else None,
            module_path=self._module_path(node),
            source=source_line(node),
            flops=num_flops,
            bytes_moved=num_bytes,
        )

    def _module_path(self, node: fx.Node) -> str | None:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            # What the compiled module's own forward calls, where that is the outermost frame.
            return "" if self._is_module else None
        return module_path(str(list(stack.values())[-1][0]), is_module=self._is_module)


def module_path(path: str, *, is_module: bool) -> str:
    """Return a module's full name from the Python expression that Dynamo reached it by.

    Args:
        path: "L['self'].blocks.0.attn" (torch 2.13), "L['self']._modules['blocks']._modules['0'].attn" (2.11), or
            "getattr(L['self'].blocks, '0')".
        is_module: whether the first name is the compiled module, to which paths are relative.

    Returns:
        Such as "blocks.0.attn"; "" for the compiled module itself.
    """
    before = ""
    while before != path:
        before, path = path, re.sub(r"getattr\(([^()]*), ['\"]([^'\"]*)['\"]\)", r"\1.\2", path)
    path = re.sub(r"^[LG]\[['\"](\w+)['\"]\]", "" if is_module else r"\1", path)
    path = re.sub(r"\.(_modules|__dict__)(?=\[)", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    # A module that is called again carries "@1", "@2": it is the same module.
    return re.sub(r"@\d+", "", path).strip(".")


def _visited(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in graph_module.graph.nodes:
        if _is_call(node):
            yield node
        body = _body(graph_module, node)
        if body is not None:
            yield from _visited(body)


def _is_call(node: fx.Node) -> bool:
    return node.op.startswith("call_")


def _body(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    attributes = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
    bodies = [getattr(graph_module, str(attribute.target), None) for attribute in attributes]
    modules = [body for body in bodies if isinstance(body, fx.GraphModule)]
    return modules[0] if len(modules) == 1 else None


def _op(node: fx.Node) -> str | None:
    """Return the name that the profiler prints for the call; None for a call that neither computes nor writes."""
    target, value = node.target, node.meta.get("example_value")
    if isinstance(target, torch._ops.OpOverload) and not target._schema.returns:
        return op_name(target)
    if target is operator.setitem:
        return "aten::index_put_" if _has_tensor_index(node) else "aten::copy_"
    if first_tensor(value) is None:
        return None
    if target is operator.getitem:
        return _getitem_op(node)
    if node.op == "call_module":
        return "torch.nn.Module"
    packet = getattr(target, "_qualified_op_name", None)
    return op_name(target) or (str(packet) if packet else _python_op(node))


def _python_op(node: fx.Node) -> str:
    target = node.target
    python_name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    name = _OPERATORS.get(target) or _OTHER_NAMES.get(python_name, python_name)
    if node.kwargs.get("inplace") is True:
        name += "_"
    if hasattr(torch.ops.aten, name):
        return f"aten::{name}"
    return f"{getattr(target, '__module__', None) or 'torch'}.{name}"


def _getitem_op(node: fx.Node) -> str | None:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("example_value"), torch.Tensor):
        return None
    if _has_tensor_index(node):
        return "aten::index"
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, (int, fx.Node)) and not isinstance(part, bool) for part in parts):
        return "aten::select"
    return "aten::slice" if any(isinstance(part, slice) for part in parts) else "aten::unsqueeze"


def _has_tensor_index(node: fx.Node) -> bool:
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, (list, torch.Tensor))
        or (isinstance(part, fx.Node) and isinstance(part.meta.get("example_value"), torch.Tensor))
        for part in parts
    )


@contextmanager
def _values(node: fx.Node) -> Iterator[None]:
    """Show a node's values under the key that the cost formulas read; AOTAutograd must not find them there."""
    shown = [each for each in (node, *node.all_input_nodes) if "val" not in each.meta]
    for each in shown:
        each.meta["val"] = each.meta.get("example_value")
    try:
        yield
    finally:
        for each in shown:
            del each.meta["val"]
