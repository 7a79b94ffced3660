"""Graph rewrites, one a file: Dynamo-level graph and inputs -> the same graph, changed, and patch descriptors."""

_ORDER = (
    # What makes the graph smaller comes first; weights that were computed are weights for all others.
    "fold_weights",
    "conv_bn_fold",
    "last_token_head",
    "linear_algebra",
    # Steps that torch keeps in one call are there for all that follows.
    "open_layers",
    "attention_by_hand",
    "capped_attention",
    # Gate and up pair off before the other shared linears merge.
    "gate_up_concat",
    "qkv_concat",
    # What shares an input has merged by now.
    "batched_linears",
    # It takes the norms of query and key heads along, before those become kernels of their own.
    "cached_attention",
    # Products of few rows take the norm before them and the gate after them before those become kernels of their own.
    "skinny_gemm",
    # Norms then read the stream that products have been added to, and add nothing.
    "residual_gemm",
    "activation_gemm",
    "rms_norm",
    "layer_norm",
    "channel_norm",
    "group_norm",
    "swiglu",
    "decode_attention",
    "sdpa_backend",
    # Products that no rewrite above has taken.
    "split_gemm",
    # A loss takes its head along where that pays, and its log-softmax before softmaxes are looked for.
    "linear_cross_entropy",
    "cross_entropy",
    "softmax",
    "cumsum",
    # Some convolutions are products, and their results have their channels innermost.
    "patch_conv",
    # Groups that become convolutions of their own have a layout too.
    "grouped_conv",
    # Layouts last, around what the convolutions have become.
    "channels_last",
    # In the layout that they have now.
    "pointwise_conv",
    "depthwise_conv",
    # Products that are still torch's own.
    "padded_linear",
    "keep_eager",
)

REWRITES: dict[str, str] = {name: f"agnitra_lab.patch.rewrites.{name}" for name in _ORDER}
"""Action -> module path, in the order of application."""
