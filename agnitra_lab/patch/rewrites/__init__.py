"""Graph rewrites, one a file: Dynamo-level graph and inputs -> the same graph, changed, and patch descriptors."""

REWRITES: dict[str, str] = {
    "conv_bn_fold": "agnitra_lab.patch.rewrites.conv_bn_fold",
    "rms_norm": "agnitra_lab.patch.rewrites.rms_norm",
    "gate_up_concat": "agnitra_lab.patch.rewrites.gate_up_concat",
    "swiglu": "agnitra_lab.patch.rewrites.swiglu",
    "qkv_concat": "agnitra_lab.patch.rewrites.qkv_concat",
    "sdpa_backend": "agnitra_lab.patch.rewrites.sdpa_backend",
}
"""Action -> module path, in the order of application: gate and up pair off before the other shared linears merge."""
