"""Sums and means move in front of the linear or convolution that they follow; a diagonal matrix multiplies by rows.

Trigger and algebra, one rule each, for all finite values (never from sampled results):

- diag(a) @ B: row i is a[i] * B[i], since all other terms are 0; B @ diag(a): column j is B[:, j] * a[j].
- mean(mean(x, p), q) = mean(x, p and q), and the same of sums: every group has one size.
- sum over n of (x W^T + b)[n] = x . (sum over n of W[n]) + sum over n of b[n]: the sums of W are taken once.
- mean over rows r of (x[r] W^T + b) = (mean over r of x[r]) W^T + b; for a sum, b counts once a row.
- mean over all positions of a convolution: `agnitra_lab.patch.window_sums` has the rule and its proof.

Scalings, shifts by something small and casts between the two commute: red(s y + t) = s red(y) + red(t).
Guard: nothing else reads the product or the steps after it, nothing writes to them, the saving is at least eightfold.
Sums are taken in float64 (float32 for half types) and rounded once, so that the error is that of the last rounding.
Source: linearity; the cases are KernelBench level 1 problem 12, level 2 problems 14, 18, 42, 44 and 51.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.emit import emit
from agnitra_lab.patch.matmuls import MatMul, match_product
from agnitra_lab.patch.ops import fake_of, is_written_between, memory_root, mutated_roots, op_name
from agnitra_lab.patch.reductions import Affine, Reduction, match_affine, match_reduction, wide_dtype
from agnitra_lab.patch.weights import why_not_derivable
from agnitra_lab.patch.window_sums import Convolution, match_convolution, sum_windows, weight_of_windows

ACTION = "linear_algebra"
_LEAST_SAVING = 8


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Apply each rule wherever it holds.

    Returns:
        One descriptor per change.
    """
    descriptors: list[PatchDescriptor] = []
    for rule in (_apply_diagonal, _apply_reduced_product, _apply_reduced_convolution, _apply_repeated_reduction):
        for node in list(graph_module.graph.nodes):
            made = rule(node, context)
            if made is not None:
                descriptors.append(made)
    if not descriptors and not context.refusals:
        context.refuse(ACTION, "no sum or mean follows a linear or convolution, and no diagonal matrix is multiplied")
    return descriptors


def _apply_diagonal(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    if op_name(node) not in ("matmul", "mm") or len(node.args) != 2 or node.kwargs:
        return None
    for is_left, (matrix, other) in ((True, node.args), (False, node.args[::-1])):
        vector = _diagonal_of(matrix)
        size, result = fake_of(other), fake_of(node)
        if vector is None or size is None or result is None or not isinstance(other, fx.Node):
            continue
        if is_written_between(memory_root(vector), matrix, node):  # type: ignore[arg-type]
            context.refuse(ACTION, "the diagonal is written before its matrix is multiplied")
            return None
        descriptor = context.describe(ACTION, node, [node], "rows times a vector" if is_left else "columns times one")
        scale = emit(context, node, torch.unsqueeze, vector, -1) if is_left and size.dim() > 1 else vector
        value = emit(context, node, torch.mul, other, scale)
        if result.is_contiguous():
            value = emit(context, node, "contiguous", value)
        _replace(node, value, [matrix, node])  # type: ignore[list-item]
        return descriptor
    return None


def _diagonal_of(matrix: Any) -> fx.Node | None:
    """Return the vector that a node puts on the main diagonal of a matrix of zeros."""
    if op_name(matrix) not in ("diag", "diag_embed") or len(matrix.args) != 1 or matrix.kwargs:
        return None
    vector = matrix.args[0]
    fake = fake_of(vector)
    return vector if fake is not None and fake.dim() == 1 and fake.is_floating_point() else None


def _apply_repeated_reduction(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    outer = match_reduction(node)
    inner = match_reduction(outer.value) if outer is not None else None
    if outer is None or inner is None or outer.is_mean != inner.is_mean or len(inner.node.users) != 1:
        return None
    fake, result = fake_of(inner.value), fake_of(node)
    assert fake is not None and result is not None
    left = list(range(fake.dim()))
    if not inner.has_kept_dims:
        left = [dim for dim in left if dim not in inner.dims]
    outer_dims = tuple(left[dim] for dim in outer.dims)
    if is_written_between(memory_root(inner.value), inner.node, node) or not result.is_contiguous():
        return None
    descriptor = context.describe(ACTION, node, [inner.node, node], "one reduction over the dimensions of both")
    dims = tuple(sorted({*inner.dims, *outer_dims}))
    reduce = torch.mean if outer.is_mean else torch.sum
    total = emit(context, node, reduce, inner.value, dims, keepdim=True, dtype=wide_dtype(fake))
    gone = {*(() if inner.has_kept_dims else inner.dims), *(() if outer.has_kept_dims else outer_dims)}
    _replace(node, _finish(total, tuple(sorted(gone)), node, context), [inner.node, node])
    return descriptor


def _apply_reduced_product(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    reduction = match_reduction(node)
    affine = match_affine(reduction) if reduction is not None else None
    product = match_product(affine.base) if affine is not None else None
    if reduction is None or affine is None or product is None:
        return None
    problem = _why_not_product(reduction, affine, product, context)
    if problem:
        context.refuse(ACTION, problem)
        return None
    fake = fake_of(product.a)
    assert fake is not None
    is_over_columns = fake.dim() - 1 in reduction.dims
    gone = [product.node, *reversed(affine.steps), node]
    replacement = "product with the summed weight" if is_over_columns else "linear of the reduced rows"
    descriptor = context.describe(ACTION, node, gone, replacement, {"dims": list(reduction.dims)})
    emit_base = _emit_summed_columns if is_over_columns else _emit_reduced_rows
    base = emit_base(reduction, product, wide_dtype(fake), context)
    _replace(node, _with_affine(base, reduction, affine, wide_dtype(fake), context), gone)
    return descriptor


def _why_not_product(reduction: Reduction, affine: Affine, product: MatMul, context: RewriteContext) -> str | None:
    right, result = fake_of(product.b), fake_of(reduction.node)
    if right is None or result is None or right.dim() != 2:
        return "the reduced product has a batch of right operands"
    if reduction.count < _LEAST_SAVING:
        return f"the reduction is over {reduction.count} elements alone"
    return _why_not_movable(reduction, affine, context)


def _why_not_movable(reduction: Reduction, affine: Affine, context: RewriteContext) -> str | None:
    result = fake_of(reduction.node)
    if len(affine.base.users) != 1:
        return "something else reads what is reduced"
    if result is None or not result.is_contiguous():
        return "the result is not contiguous"
    written = mutated_roots(context.graph_module.graph)
    shifts = [shift for _, shift in affine.shifts if isinstance(shift, fx.Node)]
    used = [affine.base, *affine.base.all_input_nodes, *affine.steps, *shifts]
    if any(memory_root(value) in written for value in used):
        return "the graph writes to what is reduced, or to what it is made of"
    return None


def _emit_summed_columns(reduction: Reduction, product: MatMul, dtype: torch.dtype, context: RewriteContext) -> fx.Node:
    """Emit sum over k of x[k] * (sum over n of W[n, k]), over the reduced rows as well, plus the sum of the bias."""
    node, axis = reduction.node, 0 if product.is_b_transposed else 1

    def build_sum(weight: Tensor) -> Tensor:
        return weight.to(dtype).sum(axis)

    def build_bias(bias: Tensor) -> Tensor:
        return bias.to(dtype).sum()

    summed = _weight("columns", product.b, build_sum, node, context, (axis, str(dtype)))
    wide = emit(context, node, "to", product.a, dtype)
    base = emit(context, node, "sum", emit(context, node, torch.mul, wide, summed), reduction.dims, keepdim=True)
    if product.bias is not None:
        total = _weight("bias_sum", product.bias, build_bias, node, context, (str(dtype),))
        if reduction.count != product.num_n:
            total = emit(context, node, torch.mul, total, reduction.count // product.num_n)
        base = emit(context, node, torch.add, base, total)
    return emit(context, node, torch.mul, base, 1.0 / reduction.count) if reduction.is_mean else base


def _emit_reduced_rows(reduction: Reduction, product: MatMul, dtype: torch.dtype, context: RewriteContext) -> fx.Node:
    """Emit (reduced x) W^T + b in the wide dtype: eager's errors average out over rows, so ours must be smaller."""
    node, is_transposed = reduction.node, product.is_b_transposed

    def build_wide(weight: Tensor) -> Tensor:
        return (weight.t() if is_transposed else weight).to(dtype)

    wide = emit(context, node, "to", product.a, dtype)
    rows = emit(context, node, "mean" if reduction.is_mean else "sum", wide, reduction.dims, keepdim=True)
    weight = _weight("wide", product.b, build_wide, node, context, (is_transposed, str(dtype)))
    base = emit(context, node, torch.matmul, rows, weight)
    if product.bias is None:
        return base
    bias = emit(context, node, "to", product.bias, dtype)
    if not reduction.is_mean:
        bias = emit(context, node, torch.mul, bias, reduction.count)
    return emit(context, node, torch.add, base, bias)


def _apply_reduced_convolution(node: fx.Node, context: RewriteContext) -> PatchDescriptor | None:
    reduction = match_reduction(node)
    affine = match_affine(reduction) if reduction is not None else None
    conv = match_convolution(affine.base) if affine is not None else None
    if reduction is None or affine is None or conv is None:
        return None
    problem = conv if isinstance(conv, str) else _why_not_convolution(reduction, affine, conv, context)
    if problem or isinstance(conv, str):
        context.refuse(ACTION, str(problem))
        return None
    fake = fake_of(conv.x)
    assert fake is not None
    dtype = wide_dtype(fake)
    gone = [conv.node, *reversed(affine.steps), node]
    descriptor = context.describe(ACTION, node, gone, "product with window sums", {"ranges": str(conv.ranges)})
    sums = emit(context, node, "flatten", sum_windows(context, conv, node, dtype), 1)
    variant = (conv.ranges, conv.is_transposed, str(dtype))
    weight = _weight("windows", conv.weight, weight_of_windows(conv, dtype), node, context, variant)
    base = emit(context, node, torch.matmul, sums, weight)
    if conv.bias is not None:
        bias = emit(context, node, torch.mul, emit(context, node, "to", conv.bias, dtype), conv.num_positions)
        base = emit(context, node, torch.add, base, bias)
    if reduction.is_mean:
        base = emit(context, node, torch.mul, base, 1.0 / conv.num_positions)
    base = emit(context, node, "reshape", base, (*(int(size) for size in fake.shape[:1]), -1, *[1] * len(conv.ranges)))
    _replace(node, _with_affine(base, reduction, affine, dtype, context), gone)
    return descriptor


def _why_not_convolution(
    reduction: Reduction, affine: Affine, conv: Convolution, context: RewriteContext
) -> str | None:
    if reduction.dims != tuple(range(2, 2 + len(conv.ranges))):
        return "the reduction is not over all positions of the convolution"
    if not context.is_weight(conv.weight) or why_not_derivable([context.real_tensor(conv.weight)]):
        return "the convolution's weight is computed in the graph, or no copy of it can be kept"
    return _why_not_movable(reduction, affine, context)


def _weight(
    name: str,
    source: fx.Node,
    build: Callable[[Tensor], Tensor],
    before: fx.Node,
    context: RewriteContext,
    variant: tuple[Any, ...],
) -> fx.Node:
    """Emit what is built from a weight: ahead of the calls where a copy can be kept, in the graph otherwise."""
    if context.is_weight(source) and not why_not_derivable([context.real_tensor(source)]):
        return context.derive(f"{ACTION}_{name}", [source], build, before, variant)
    return emit(context, before, build, source)


def _with_affine(
    base: fx.Node, reduction: Reduction, affine: Affine, dtype: torch.dtype, context: RewriteContext
) -> fx.Node:
    """Emit scale * base + the reduced shifts, and what the reduction gives in shape and dtype.

    `base` has the reduced dimensions, with size 1.
    """
    node, value = reduction.node, base
    if affine.scale != 1.0:
        value = emit(context, node, torch.mul, value, affine.scale)
    whole = fake_of(reduction.value)
    assert whole is not None
    for factor, shift in affine.shifts:
        if not isinstance(shift, fx.Node):
            value = emit(
                context, node, torch.add, value, factor * shift * (1 if reduction.is_mean else reduction.count)
            )
            continue
        wide = emit(context, node, "to", shift, dtype)
        wide = emit(context, node, "expand", wide, tuple(int(size) for size in whole.shape))
        reduced = emit(context, node, "mean" if reduction.is_mean else "sum", wide, reduction.dims, keepdim=True)
        value = emit(context, node, torch.add, value, emit(context, node, torch.mul, reduced, factor))
    return _finish(value, () if reduction.has_kept_dims else reduction.dims, node, context)


def _finish(value: fx.Node, gone: tuple[int, ...], node: fx.Node, context: RewriteContext) -> fx.Node:
    """Emit the value without the dimensions that go, in the dtype of the node that it replaces."""
    result = fake_of(node)
    assert result is not None
    if gone:
        value = emit(context, node, torch.squeeze, value, gone)
    return emit(context, node, "to", value, result.dtype)


def _replace(node: fx.Node, value: fx.Node, gone: Sequence[fx.Node]) -> None:
    node.replace_all_uses_with(value)
    erase_unused(gone)
