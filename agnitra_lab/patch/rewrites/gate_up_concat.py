"""The gate and up projections of a gated MLP become one linear with a concatenated weight.

Trigger: two products with weights on the same input whose results meet directly in act(gate) * up, where act is silu,
gelu or x * sigmoid(x).
Algebra and guard: as in `qkv_concat`.
Source: GLU variants (Shazeer, arXiv 2002.05202, section 2); horizontal GEMM fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.linears import find_gated_pair, merge, shared_input_groups, why_not_mergeable

ACTION = "gate_up_concat"


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Merge each gate and up pair.

    Returns:
        One descriptor per merged pair.
    """
    descriptors = []
    num_pairs = 0
    for group in shared_input_groups(context):
        pair = find_gated_pair(group)
        if pair is None:
            continue
        num_pairs += 1
        in_order = [linear for linear in group if linear in pair]
        problem = why_not_mergeable(in_order, context)
        if problem:
            context.refuse(ACTION, problem)
            continue
        descriptors.append(merge(ACTION, in_order, context))
    if not num_pairs:
        context.refuse(ACTION, "no two linears with a shared input meet in act(gate) * up")
    return descriptors
