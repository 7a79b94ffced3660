"""The closed list of what a suggestion may ask for. A language model chooses from it and cannot add to it."""

from __future__ import annotations

from typing import Literal

from agnitra_lab.contracts.base import Contract


class Action(Contract):
    """One change that `patch` knows how to make."""

    name: str
    kind: Literal["rewrite", "template", "options"]
    """rewrite: a graph change right by algebra; template: a Triton kernel; options: how the graph is compiled."""
    summary: str
    needs_cuda: bool = False
    is_measured: bool = False
    """It times its choices on the device while it rewrites."""


ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        Action(
            name="sdpa_backend",
            kind="rewrite",
            needs_cuda=True,
            is_measured=True,
            summary="run scaled_dot_product_attention on the backend that measures fastest for its shape",
        ),
        Action(
            name="qkv_concat",
            kind="rewrite",
            summary="merge linears that share one input (query, key, value) into one GEMM",
        ),
        Action(
            name="gate_up_concat",
            kind="rewrite",
            summary="merge the gate and up projections of a gated MLP into one GEMM",
        ),
        Action(
            name="conv_bn_fold", kind="rewrite", summary="fold an eval-mode batch norm into the convolution before it"
        ),
        Action(
            name="rms_norm", kind="template", needs_cuda=True, summary="one Triton kernel for residual add and RMSNorm"
        ),
        Action(name="swiglu", kind="template", needs_cuda=True, summary="one Triton kernel for silu(gate) * up"),
        Action(
            name="freezing",
            kind="options",
            summary="treat weights as constants: folded, and packed for the matrix library of the CPU",
        ),
        Action(
            name="cuda_graph",
            kind="options",
            needs_cuda=True,
            summary="replay the whole call as one CUDA graph to remove launch gaps",
        ),
        Action(name="max_autotune", kind="options", summary="let Inductor benchmark its GEMM and convolution choices"),
    )
}
