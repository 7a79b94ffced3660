"""Softmax and log-softmax over the last dimension become one kernel where they stand alone.

Trigger: torch.softmax, F.softmax, x.softmax, nn.Softmax and their logarithms, or e / e.sum with e = exp(x - max(x)),
each with the maximum and sum of the last dimension; a widening cast before and a narrowing cast after are taken along.
Rule: the kernel is opaque to Inductor, which would fuse a scale, a mask or a product around a softmax into its own
loop. So the input must be in memory anyway (given to the graph, or the result of a product, a convolution or another
kernel, or a view of one) and somebody must need the result there (`agnitra_lab.patch.rows`).
Algebra: the same formula, in fp32, rounded once.
Guard: float32, bfloat16 or float16 on both sides, no rounding of the input, plain rows, nothing written in between.
Source: Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.ops import argument, binary, fake_of, is_cast, op_name
from agnitra_lab.patch.rows import (
    KERNEL_DTYPES,
    Widened,
    has_plain_rows,
    is_last_dim,
    is_written,
    site_of,
    why_fused_after,
    why_fused_before,
    widened,
)

ACTION = "softmax"
_WITH_STACKLEVEL = (functional.softmax, functional.log_softmax)


@dataclass(frozen=True)
class _Softmax:
    x: fx.Node
    is_log: bool
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    """All nodes of the pattern, in graph order."""


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each softmax that stands alone by the kernel.

    Returns:
        One descriptor per softmax.
    """
    descriptors = []
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = _match(node)
        if found is None:
            continue
        num_found += 1
        found = _with_narrowing(found)
        source = widened(found.x)
        problem = _why_not(found, source)
        if problem:
            context.refuse(ACTION, problem)
            continue
        fake, bare, result = fake_of(found.x), fake_of(source.bare), fake_of(found.result)
        assert fake is not None and bare is not None and result is not None
        kernel = context.kernel(ACTION, site_of(fake), bare.dtype)
        if kernel is None:
            continue
        gone = [*reversed(source.nodes), *found.nodes]
        config: dict[str, JsonValue] = {"kernel": kernel.config.key(), "shape": [int(size) for size in fake.shape]}
        config |= {"is_log": found.is_log, "dtypes": f"{bare.dtype} to {result.dtype}".replace("torch.", "")}
        descriptors.append(
            context.describe(ACTION, found.result, gone, f"kernel {kernel.name}", config, kernel.content_hash)
        )
        narrow = source.narrow(found.result, context)
        call = context.call(found.result, kernel.call, narrow, is_log=found.is_log, out_dtype=result.dtype)
        call.meta["example_value"] = result
        found.result.replace_all_uses_with(call)
        erase_unused(gone)
    if not num_found:
        context.refuse(ACTION, "the graph has no softmax over the last dimension")
    return descriptors


def softmax_dim(node: fx.Node) -> Any:
    """Return the dimension of a softmax call, also where F.softmax chooses it itself."""
    dim = argument(node, 1, "dim")
    fake = fake_of(argument(node, 0, "input"))
    if dim is None and fake is not None:
        return 0 if fake.dim() in (0, 1, 3) else 1
    return dim


def softmax_dtype(node: fx.Node) -> torch.dtype | None:
    """Return the dtype that a softmax call asks for."""
    dtype = argument(node, 3 if node.target in _WITH_STACKLEVEL else 2, "dtype")
    return dtype if isinstance(dtype, torch.dtype) else None


def _match(node: fx.Node) -> _Softmax | None:
    if op_name(node) in ("softmax", "log_softmax"):
        x = argument(node, 0, "input")
        if not isinstance(x, fx.Node) or not is_last_dim(softmax_dim(node), x):
            return None
        return _Softmax(x, op_name(node) == "log_softmax", node, (node,))
    return _match_by_hand(node)


def _match_by_hand(quotient: fx.Node) -> _Softmax | None:
    """Match e / sum(e) with e = exp(x - max(x))."""
    operands = binary(quotient, "div")
    power = operands[0] if operands else None
    if operands is None or op_name(power) != "exp" or not isinstance(power, fx.Node):
        return None
    shifted = binary(power.args[0], "sub")
    x = shifted[0] if shifted else None
    if shifted is None or not isinstance(x, fx.Node):
        return None
    total = _of_each_row(operands[1], "sum", power)
    largest = _of_each_row(shifted[1], "max", x) or _of_each_row(shifted[1], "amax", x)
    if total is None or largest is None:
        return None
    members = {*total, *largest, power, power.args[0], quotient}
    return _Softmax(x, False, quotient, tuple(node for node in quotient.graph.nodes if node in members))


def _of_each_row(node: Any, name: str, of: fx.Node) -> list[fx.Node] | None:
    """Return the nodes that take a reduction of `of` over its last dimension into the shape [..., 1], or None."""
    fake, rows = fake_of(node), fake_of(of)
    if fake is None or rows is None or tuple(fake.shape) != (*rows.shape[:-1], 1):
        return None
    nodes = []
    while op_name(node) in ("unsqueeze", "getitem", "view", "reshape"):
        if op_name(node) == "getitem" and not _adds_dimensions(node.args[1]):
            break
        nodes.append(node)
        node = node.args[0]
    if name == "max" and op_name(node) == "getitem" and node.args[1] == 0:
        nodes.append(node)
        node = node.args[0]
    elif name == "max":
        return None
    dim = argument(node, 1, "dim", argument(node, 1, "axis")) if op_name(node) == name else None
    if dim is None or node.args[:1] != (of,) or not is_last_dim(dim, of) or node.kwargs.get("dtype") is not None:
        return None
    return [*nodes, node]


def _adds_dimensions(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _with_narrowing(found: _Softmax) -> _Softmax:
    """Take along the cast of the result, which the kernel rounds to anyway."""
    users = list(found.result.users)
    fake = fake_of(users[0]) if len(users) == 1 and is_cast(users[0]) else None
    if fake is None or fake.dtype not in KERNEL_DTYPES:
        return found
    before = fake_of(found.result)
    if before is None or before.dtype.itemsize < fake.dtype.itemsize:
        return found
    return _Softmax(found.x, found.is_log, users[0], (*found.nodes, users[0]))


def _why_not(found: _Softmax, source: Widened) -> str | None:
    bare, x, result = source.fake(), fake_of(found.x), fake_of(found.result)
    if bare is None or x is None or result is None:
        return "shapes are not known"
    # Those on the way count too: a softmax in float64 is not computed in float32.
    fakes = [bare, x, *(fake for fake in map(fake_of, found.nodes) if fake is not None)]
    if any(fake.dtype not in KERNEL_DTYPES for fake in fakes):
        return f"its dtypes are {', '.join(str(fake.dtype).removeprefix('torch.') for fake in fakes)}"
    if _is_rounded_first(found, x.dtype):
        return "its input is rounded before the softmax"
    if not has_plain_rows(bare) or not result.is_contiguous():
        return "its rows are not contiguous"
    inner = {*found.nodes, *source.nodes}
    if any(set(node.users) - inner for node in found.nodes if node is not found.result):
        return "an intermediate value is used elsewhere too"
    first = source.nodes[-1] if source.nodes else found.nodes[0]
    if is_written([source.bare, found.x, *found.nodes], first, found.result):
        return "its input or result is written in between"
    return why_fused_before(source.bare) or why_fused_after(found.result)


def _is_rounded_first(found: _Softmax, dtype: torch.dtype) -> bool:
    asked = softmax_dtype(found.nodes[0]) if len(found.nodes) <= 2 else None
    return asked is not None and torch.promote_types(asked, dtype) is not asked
