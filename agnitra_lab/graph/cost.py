"""What a graph node costs by its shapes: floating point operations and bytes, the numerator and floor of a roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

# These read or write only the rows that an index names, never the whole table or cache.
_INDEXED_READS = frozenset({"aten::embedding", "aten::index_select", "aten::gather", "aten::index"})
_INDEXED_WRITES = frozenset({"aten::index_copy_", "aten::index_put_", "aten::index_add_", "aten::scatter_",
                             "aten::copy_"})  # fmt: skip


def flops(op: str, node: fx.Node) -> float | None:
    """Count the floating point operations of a matrix product, convolution or attention.

    Args:
        op: the profiler's name of the op.
        node: an exported call node whose arguments carry their value in `meta["val"]`.

    Returns:
        Multiply and add count as two. None for every other op: their time is a matter of bytes.

    Source: the formulas of torch.utils.flop_counter, applied to undecomposed ops. Causal attention counts in full.
    """
    formula = _FORMULAS.get(op)
    output = node.meta.get("val")
    if formula is None or not isinstance(output, torch.Tensor):
        return None
    tensors = [argument for argument in map(_value, node.args) if isinstance(argument, torch.Tensor)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not all(isinstance(size, int) for shape in (*shapes, tuple(output.shape)) for size in shape):
        return None
    try:
        return float(formula(shapes, tuple(output.shape)))
    except IndexError:
        # A tensor that the formula needs came by keyword, or not at all.
        return None


def bytes_moved(node: fx.Node, op: str | None = None) -> float | None:
    """Count the bytes of a node's inputs and outputs, each once: the least traffic that the op can cause.

    Args:
        node: a call node whose arguments carry their value in `meta["val"]`.
        op: the profiler's name of the op, for a node of Dynamo's, whose target has no schema.

    Returns:
        Bytes; 0 for views, which move nothing; None when a size is symbolic.
    """
    outputs = _tensors(node.meta.get("val"))
    inputs = [tensor for argument in node.all_input_nodes for tensor in _tensors(argument.meta.get("val"))]
    if not all(isinstance(size, int) for tensor in (*inputs, *outputs) for size in tensor.shape):
        return None
    if _shares_storage(op, inputs, outputs) if op is not None else _is_view(node, inputs, outputs):
        return 0.0
    op = op or getattr(getattr(node.target, "_schema", None), "name", "")
    if op in _INDEXED_READS:
        # torch.nn.functional.embedding takes the indices first, the ATen op its table.
        indices = inputs[:1] if node.target is torch.nn.functional.embedding else inputs[1:]
        return float(sum(_size(tensor) for tensor in indices) + 2 * sum(_size(tensor) for tensor in outputs))
    if op in _INDEXED_WRITES:
        written = inputs[1:]
        return float(sum(_size(tensor) for tensor in written) + (_size(written[-1]) if written else 0))
    return float(sum(_size(tensor) for tensor in (*inputs, *outputs)))


def _is_view(node: fx.Node, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not inputs or not outputs:
        return False
    aliases = [returned.alias_info for returned in schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    return outputs[0].dtype == inputs[0].dtype


def _shares_storage(op: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Tell a view without a schema: its output lies in its input's memory, although it writes nothing."""
    if op.endswith("_") or not inputs or not outputs or any(t.layout != torch.strided for t in (inputs[0], outputs[0])):
        return False
    return outputs[0].untyped_storage()._cdata == inputs[0].untyped_storage()._cdata


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


def _size(tensor: torch.Tensor) -> int:
    # An expanded tensor is read from its storage, however many elements it shows.
    shown = tensor.numel() * tensor.element_size()
    return min(shown, tensor.untyped_storage().nbytes()) if tensor.layout == torch.strided else shown


Shape = tuple[int, ...]


def _linear(shapes: list[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * shapes[0][-1]


def _matrix_product(shapes: list[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * shapes[0][-1]


def _added_product(shapes: list[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * shapes[1][-1]


def _convolution(shapes: list[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(shapes[1][1:])


def _transposed_convolution(shapes: list[Shape], output: Shape) -> int:
    return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _attention(shapes: list[Shape], output: Shape) -> int:
    query, key, value = shapes[:3]
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FORMULAS: dict[str, Callable[[list[Shape], Shape], int]] = {
    "aten::linear": _linear,
    "aten::matmul": _matrix_product,
    "aten::mm": _matrix_product,
    "aten::bmm": _matrix_product,
    "aten::mv": _matrix_product,
    "aten::addmm": _added_product,
    "aten::baddbmm": _added_product,
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
    "aten::conv_transpose1d": _transposed_convolution,
    "aten::conv_transpose2d": _transposed_convolution,
    "aten::conv_transpose3d": _transposed_convolution,
    "aten::scaled_dot_product_attention": _attention,
}


def read_once_bytes(model: Any) -> int:
    """Return the bytes of the parameters that every call reads whole: all but lookup tables.

    Args:
        model: a module; anything else has none.
    """
    if not isinstance(model, torch.nn.Module):
        return 0
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))}
    # A head that is tied to a table reads all of it.
    tables -= {id(m.weight) for m in modules if isinstance(m, torch.nn.Linear)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
