"""Linears that read one input become one linear with a concatenated weight.

Trigger: two or more products with weights (linear, `x @ W`, addmm, einsum) on the same input node, less the gate and up
pair of a gated MLP.
Algebra: x @ A.T and x @ B.T are the column blocks of x @ concat(A, B).T; each output element is the same dot product.
Guard: weights are Parameters with version counters, of one dtype, and neither they nor the input are written in
between; the concatenated copy follows updates of its sources. One without a bias among others has zeros.
Source: horizontal GEMM fusion, as in fused QKV projections (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.linears import find_gated_pair, merge, shared_input_groups, why_not_mergeable

ACTION = "qkv_concat"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Merge each group of linears that share an input.

    Returns:
        One descriptor per merged group.
    """
    descriptors = []
    num_groups = 0
    for group in shared_input_groups(context):
        pair = find_gated_pair(group)
        rest = [linear for linear in group if pair is None or linear not in pair]
        if len(rest) < 2:
            continue
        num_groups += 1
        problem = why_not_mergeable(rest, context)
        if problem:
            context.refuse(ACTION, problem)
            continue
        descriptors.append(merge(ACTION, rest, context))
    if not num_groups:
        context.refuse(ACTION, "no two linears share an input")
    return descriptors
