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
            is_measured=True,
            summary="run scaled_dot_product_attention without a mask that is just causal, sliding windows in kernels "
            "that skip what they hide, and on CUDA on the backend that measures fastest",
        ),
        Action(
            name="open_layers",
            kind="rewrite",
            summary="write nn.MultiheadAttention and nn.TransformerEncoderLayer, one call each, as steps that fuse",
        ),
        Action(
            name="attention_by_hand",
            kind="rewrite",
            summary="replace softmax(q k^T) v written as single steps by scaled_dot_product_attention",
        ),
        Action(
            name="capped_attention",
            kind="rewrite",
            summary="run attention whose scores are capped by a tanh as one flex-attention kernel",
        ),
        Action(
            name="qkv_concat",
            kind="rewrite",
            summary="merge linears that share one input (query, key, value) into one GEMM",
        ),
        Action(
            name="batched_linears",
            kind="rewrite",
            summary="run small independent linears of one shape, such as towers, as one batched product",
        ),
        Action(
            name="gate_up_concat",
            kind="rewrite",
            summary="merge the gate and up projections of a gated MLP into one GEMM",
        ),
        Action(
            name="fold_weights",
            kind="rewrite",
            summary="compute once what the model makes of its weights alone at each call",
        ),
        Action(name="conv_bn_fold", kind="rewrite", summary="fold an eval-mode batch norm into the layer before it"),
        Action(
            name="channels_last",
            kind="rewrite",
            is_measured=True,
            summary="run convolutions with the channels innermost where that measures faster, weights laid out once",
        ),
        Action(
            name="patch_conv",
            kind="rewrite",
            is_measured=True,
            summary="run convolutions over patches as one product of gathered windows where that measures faster",
        ),
        Action(
            name="grouped_conv",
            kind="rewrite",
            is_measured=True,
            summary="run a convolution's groups as convolutions or products of their own where that measures faster",
        ),
        Action(
            name="pointwise_conv",
            kind="rewrite",
            is_measured=True,
            summary="run convolutions with a single tap as matrix products where that measures faster",
        ),
        Action(
            name="padded_linear",
            kind="rewrite",
            needs_cuda=True,
            is_measured=True,
            summary="pad half-precision weights of odd widths to what tensor cores take, where that measures faster",
        ),
        Action(
            name="residual_gemm",
            kind="rewrite",
            needs_cuda=True,
            is_measured=True,
            summary="let products add themselves to their residual, in place, where that measures faster",
        ),
        Action(
            name="activation_gemm",
            kind="rewrite",
            needs_cuda=True,
            is_measured=True,
            summary="let the matrix library apply ReLU and GELU after a product, where that measures faster",
        ),
        Action(
            name="keep_eager",
            kind="rewrite",
            summary="keep recurrent layers, and convolutions that compile badly, on their own library kernel in the "
            "compiled graph",
        ),
        Action(
            name="rms_norm", kind="template", needs_cuda=True, summary="one Triton kernel for residual add and RMSNorm"
        ),
        Action(
            name="layer_norm",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for residual add and LayerNorm, two for very long rows",
        ),
        Action(
            name="channel_norm",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for a norm over a middle dimension, such as the channels of images",
        ),
        Action(
            name="group_norm",
            kind="template",
            needs_cuda=True,
            summary="Triton kernels for GroupNorm or InstanceNorm and the SiLU after it",
        ),
        Action(
            name="depthwise_conv",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for a convolution of each channel by itself, with its bias and activation",
        ),
        Action(name="swiglu", kind="template", needs_cuda=True, summary="one Triton kernel for act(gate) * up"),
        Action(
            name="skinny_gemm",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for a product of at most 16 rows with its norm, gate, activation and residual",
        ),
        Action(
            name="cached_attention",
            kind="template",
            needs_cuda=True,
            summary="rotation of at most 4 new tokens, their write into a cache and attention over it, in one or two "
            "Triton kernels",
        ),
        Action(
            name="decode_attention",
            kind="template",
            needs_cuda=True,
            summary="attention of at most 4 queries, split over the keys, in one or two Triton kernels",
        ),
        Action(
            name="softmax",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for softmax or log-softmax over the last dimension",
        ),
        Action(
            name="cross_entropy",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for the loss of each token, which reads each logit once",
        ),
        Action(
            name="linear_cross_entropy",
            kind="template",
            needs_cuda=True,
            summary="two Triton kernels for a head and the loss of its logits, which are never in memory",
        ),
        Action(
            name="cumsum",
            kind="template",
            needs_cuda=True,
            summary="one Triton kernel for running sums over the last dimension",
        ),
        Action(
            name="split_gemm",
            kind="template",
            needs_cuda=True,
            summary="large fp32 matrix products on the tensor cores in fp16 parts, at the error of fp32",
        ),
        Action(
            name="linear_algebra",
            kind="rewrite",
            summary="sums and means taken before a linear or convolution instead of after it; diagonal products",
        ),
        Action(
            name="last_token_head",
            kind="rewrite",
            summary="compute only those rows of a head's output that are used",
        ),
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
        Action(
            name="combo_kernels",
            kind="options",
            needs_cuda=True,
            summary="launch independent small kernels together, as Inductor's combo kernels",
        ),
        Action(
            name="as_laid_out",
            kind="options",
            summary="leave convolutions in the layout that eager has, where another one costs digits",
        ),
        Action(name="max_autotune", kind="options", summary="let Inductor benchmark its GEMM and convolution choices"),
    )
}
