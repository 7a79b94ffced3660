"""What a profile shows: how much of the call each kind of op takes, and which structures are there to act on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.telemetry import OpEvent, TelemetryRecord

LINEAR_OPS = frozenset(
    f"aten::{name}"
    for name in ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "mkldnn_linear", "_addmm_activation")
) | {"mkldnn::_linear_pointwise"}
CONV_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution",
        "thnn_conv2d", "_slow_conv2d_forward", "convolution_overrideable", "_conv_depthwise2d",
    )
)  # fmt: skip
ATTENTION_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_flash_attention_forward", "_efficient_attention_forward",
        "_cudnn_attention_forward",
    )
)  # fmt: skip
BATCH_NORM_OPS = frozenset(
    f"aten::{name}"
    for name in (
        "batch_norm", "_batch_norm_impl_index", "native_batch_norm", "cudnn_batch_norm", "_batch_norm_no_update",
        "_native_batch_norm_legit_no_training",
    )
)  # fmt: skip
RMS_NORM_OPS = frozenset(f"aten::{name}" for name in ("rms_norm", "_fused_rms_norm", "rsqrt", "pow", "mean"))
SOFTMAX_OPS = frozenset(f"aten::{name}" for name in ("softmax", "_softmax", "log_softmax", "_log_softmax", "exp"))
ATTENTION_BY_HAND_OPS = SOFTMAX_OPS | {"aten::matmul", "aten::bmm", "aten::baddbmm", "aten::masked_fill", "aten::add"}
LOSS_OPS = SOFTMAX_OPS | {"aten::cross_entropy_loss", "aten::nll_loss_nd", "aten::nll_loss_forward", "aten::_to_copy"}
SCAN_OPS = frozenset({"aten::cumsum"})
LAYER_NORM_OPS = frozenset({"aten::layer_norm", "aten::native_layer_norm"})
GROUP_NORM_OPS = frozenset({"aten::group_norm", "aten::native_group_norm"})
RNN_OPS = frozenset(
    f"aten::{name}" for name in ("lstm", "gru", "_cudnn_rnn", "mkldnn_rnn_layer", "_thnn_fused_lstm_cell")
)
SILU_OPS = frozenset(f"aten::{name}" for name in ("silu", "silu_"))

REQUIRED_PATTERN: dict[str, str] = {
    "sdpa_backend": "transformer_attention",
    "qkv_concat": "transformer_attention",
    "gate_up_concat": "gated_mlp",
    "swiglu": "gated_mlp",
    "rms_norm": "rms_norm",
    "conv_bn_fold": "conv_bn",
    "channels_last": "conv",
    "patch_conv": "conv",
    "grouped_conv": "conv",
    "pointwise_conv": "conv",
    "padded_linear": "linear",
    "residual_gemm": "linear",
    "activation_gemm": "linear",
}
"""The pattern that an action rewrites, for where nobody has tried the rewrites on the graph itself."""

_MAKES_WORK_FOR = {"sdpa_backend": ("attention_by_hand", "open_layers")}
"""Measured action -> those that make what it works on: attention by hand has no backend until it is one call."""


def share_of(record: TelemetryRecord, ops: frozenset[str]) -> float:
    """Return the share of the profile's self time that these ops take, 0 to 1.

    A lower bound: a record keeps the longest rows of the op table, so a deep model's short ops are not all there.
    """
    return min(sum(event.share for event in record.events if event.op in ops), 1.0)


def share_inside(
    record: TelemetryRecord,
    profile: WorkloadProfile,
    pattern: str,
    ops: frozenset[str],
    *,
    should_count_all: bool = False,
) -> float:
    """Return the share of self time that `ops` take inside a pattern's matched nodes, 0 to 1.

    Elementwise ops (mul, pow, mean) serve many structures, and only their node says which one. Where no row has a
    node (the code could not be traced) the share of `ops` anywhere stands in.

    Args:
        record: the measured profile.
        profile: whose matches name the nodes.
        pattern: which structure.
        ops: the ops that an action would touch.
        should_count_all: count every op inside the structure, not `ops` alone.
    """
    nodes = {node for match in profile.patterns if match.pattern_name == pattern for node in match.subgraph}
    inside = [event for event in record.events if event.node is not None and event.node in nodes]
    if not inside:
        return share_of(record, ops)
    return min(sum(event.share for event in inside if should_count_all or event.op in ops), 1.0)


def base_latency_ms(record: TelemetryRecord) -> float | None:
    """Return the time of one call that expectations start from, in ms, or None when the profile measured none.

    The wall time; where a record has none (the seed's four keys alone) its self time, then its bottleneck.
    """
    self_ms = record.total_self_ms or sum(event.latency_ms for event in record.events)
    bottleneck_ms = record.bottleneck.latency_ms if record.bottleneck else 0.0
    # The bounds of the contract: a suggestion's latencies are above 0 and at most an hour.
    measured_ms = record.wall_ms or self_ms or bottleneck_ms
    return min(max(measured_ms, 1e-6), 3_600_000.0) if measured_ms else None


def busy_share(record: TelemetryRecord, device: DeviceInfo) -> float:
    """Return the share of the wall time in which the device works: what op shares are shares of."""
    if device.type == "cpu" or record.gpu.gpu_utilisation is None:
        return 1.0
    return record.gpu.gpu_utilisation


def widest_row(record: TelemetryRecord, ops: frozenset[str]) -> int | None:
    """Return the largest last dimension among the shapes of these ops, or None when no shape was recorded."""
    widths = [event.shape[-1] for event in record.events if event.op in ops and event.shape]
    return max(widths, default=None)


def is_present(pattern: str, record: TelemetryRecord, profile: WorkloadProfile) -> bool:
    """Whether a structure is there: matched in the graph or, where no graph was analysed, betrayed by its ops."""
    seen = {event.op for event in record.events} or {record.bottleneck.op if record.bottleneck else ""}
    if pattern == "linear":
        # One op and no structure: the analysis does not list it.
        return bool(seen & LINEAR_OPS)
    if profile.patterns:
        return profile.has_pattern(pattern)
    betrayed_by = {
        "transformer_attention": bool(seen & ATTENTION_OPS),
        "gated_mlp": bool(seen & SILU_OPS) and "aten::mul" in seen and bool(seen & LINEAR_OPS),
        "rms_norm": bool(seen & {"aten::rms_norm", "aten::_fused_rms_norm"}) or {"aten::rsqrt", "aten::mean"} <= seen,
        "conv": bool(seen & CONV_OPS),
        "conv_bn": bool(seen & BATCH_NORM_OPS) and bool(seen & CONV_OPS),
    }
    return betrayed_by.get(pattern, False)


def possible_actions(
    record: TelemetryRecord,
    profile: WorkloadProfile,
    device: DeviceInfo,
    findable: Collection[str] | None = None,
) -> tuple[str, ...]:
    """Return the actions that can be tried here, in the order of the closed list.

    Those that need CUDA fall out on a CPU, and those that would change nothing: by `findable`, what the rewrites
    themselves found in the graph, or where nobody asked them by the pattern that each needs.
    """
    return tuple(
        name
        for name, action in ACTIONS.items()
        if (device.type == "cuda" or not action.needs_cuda)
        and (
            _has_target(name, record, profile)
            if findable is None
            else action.kind == "options"
            or name in findable
            or (action.is_measured and _has_target(name, record, profile))
            or any(maker in findable for maker in _MAKES_WORK_FOR.get(name, ()))
        )
    )


def _has_target(action: str, record: TelemetryRecord, profile: WorkloadProfile) -> bool:
    pattern = REQUIRED_PATTERN.get(action)
    if pattern is None:
        # Only the rewrites themselves know where it would apply.
        return ACTIONS[action].kind == "options"
    hinted = [match.optimization_hints.get("actions") for match in profile.patterns if match.pattern_name == pattern]
    if hinted and all(isinstance(names, list) for names in hinted):
        # The analysis knows which variant it matched: GeGLU is a gated MLP that the SwiGLU kernel cannot replace.
        return any(isinstance(names, list) and action in names for names in hinted)
    return is_present(pattern, record, profile)


@dataclass(frozen=True)
class OpTotal:
    """One kind of op, summed over the rows of the op table that name it."""

    op: str
    latency_ms: float
    share: float
    num_calls: int
    shape: tuple[int, ...]
    """Of its longest row."""


def totals_by_op(record: TelemetryRecord) -> list[OpTotal]:
    """Sum the op table, which has one row a graph node, over each kind of op; longest first."""
    rows: dict[str, list[OpEvent]] = {}
    for event in record.events:
        rows.setdefault(event.op, []).append(event)
    totals = [
        OpTotal(
            op=op,
            latency_ms=sum(event.latency_ms for event in events),
            share=min(sum(event.share for event in events), 1.0),
            num_calls=sum(event.num_calls for event in events),
            shape=max(events, key=lambda event: event.latency_ms).shape,
        )
        for op, events in rows.items()
    ]
    return sorted(totals, key=lambda total: (-total.latency_ms, total.op))
