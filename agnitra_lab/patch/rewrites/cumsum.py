"""A running sum over the last dimension becomes one kernel, with the mask before it and the flips around it.

Trigger: torch.cumsum or x.cumsum of the last dimension; cumsum(x * mask) with a bool mask of x's shape;
cumsum(x.flip(d), d).flip(d), which is the sum from the other end.
Rule: as for softmax (`agnitra_lab.patch.rows`): the inputs are in memory anyway and the result is needed there.
Algebra: the same sums in fp32 whatever the dtype; eager sums 16-bit values in 16 bits, and is further from the truth.
Guard: float32, bfloat16 or float16 on both sides, no rounding of the input, plain rows, nothing written in between.
Source: Blelloch, "Prefix Sums and Their Applications", CMU-CS-90-190, 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.ops import argument, binary, fake_of, op_name
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

ACTION = "cumsum"


@dataclass(frozen=True)
class _RunningSum:
    x: fx.Node
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    """All nodes of the pattern, in graph order."""
    mask: fx.Node | None = None
    is_reverse: bool = False


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each running sum that stands alone by the kernel.

    Returns:
        One descriptor per sum.
    """
    descriptors = []
    num_found = 0
    for node in list(graph_module.graph.nodes):
        if op_name(node) != "cumsum" or not is_last_dim(_dim_of(node), argument(node, 0, "input")):
            continue
        num_found += 1
        found = _with_mask(_with_flips(_RunningSum(argument(node, 0, "input"), node, (node,))))
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
        config |= {"is_reverse": found.is_reverse, "has_mask": found.mask is not None}
        descriptors.append(
            context.describe(ACTION, found.result, gone, f"kernel {kernel.name}", config, kernel.content_hash)
        )
        narrow = source.narrow(found.result, context)
        options = {"reverse": found.is_reverse, "out_dtype": result.dtype}
        call = context.call(found.result, kernel.call, narrow, found.mask, **options)
        call.meta["example_value"] = result
        found.result.replace_all_uses_with(call)
        erase_unused(gone)
    if not num_found:
        context.refuse(ACTION, "the graph has no cumsum over the last dimension")
    return descriptors


def _dim_of(node: fx.Node) -> Any:
    return argument(node, 1, "dim", node.kwargs.get("axis"))


def _flipped(node: Any) -> fx.Node | None:
    """Return what `node` flips along its last dimension alone."""
    if op_name(node) != "flip" or not isinstance(node.args[0], fx.Node):
        return None
    dims = argument(node, 1, "dims") if len(node.args) <= 2 else node.args[1:]
    return node.args[0] if is_last_dim(dims, node.args[0]) else None


def _with_flips(found: _RunningSum) -> _RunningSum:
    users = list(found.result.users)
    x = _flipped(found.x)
    if x is None or len(users) != 1 or _flipped(users[0]) is None or list(found.x.users) != [found.result]:
        return found
    return replace(found, x=x, result=users[0], nodes=(found.x, found.result, users[0]), is_reverse=True)


def _with_mask(found: _RunningSum) -> _RunningSum:
    operands = binary(found.x, "mul")
    fakes = [fake_of(operand) for operand in operands or ()]
    if operands is None or len(found.x.users) != 1 or any(fake is None for fake in fakes):
        return found
    (x, mask), (fake, mask_fake) = operands, fakes
    if fake is not None and fake.dtype is torch.bool:
        x, mask, fake, mask_fake = mask, x, mask_fake, fake
    if fake is None or mask_fake is None or mask_fake.dtype is not torch.bool or fake.shape != mask_fake.shape:
        return found
    return replace(found, x=x, mask=mask, nodes=(found.x, *found.nodes))


def _why_not(found: _RunningSum, source: Widened) -> str | None:
    bare, x, result = source.fake(), fake_of(found.x), fake_of(found.result)
    if bare is None or x is None or result is None:
        return "shapes are not known"
    if bare.dtype not in KERNEL_DTYPES or result.dtype not in KERNEL_DTYPES:
        return f"it goes from {bare.dtype} to {result.dtype}, which the kernel does not"
    if torch.promote_types(x.dtype, result.dtype) is not result.dtype:
        return "its input is rounded before it is summed"
    values = [source.bare] if found.mask is None else [source.bare, found.mask]
    mask = bare if found.mask is None else fake_of(found.mask)
    if mask is None or not has_plain_rows(bare) or not has_plain_rows(mask) or not result.is_contiguous():
        return "its rows are not contiguous"
    first = source.nodes[-1] if source.nodes else found.nodes[0]
    if is_written([*values, found.x, *found.nodes], first, found.result):
        return "its input or result is written in between"
    problems = [why_fused_before(value) for value in values]
    return next((problem for problem in problems if problem), None) or why_fused_after(found.result)
