"""Profiles as a machine would give them: a decode step and a training step on an H200, and one on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks, GpuSample
from agnitra_lab.contracts.telemetry import (
    Behavior,
    Bottleneck,
    GpmMetrics,
    GpuTelemetry,
    IdleTime,
    KernelEvent,
    MemoryShare,
    MemoryTelemetry,
    NodeEvent,
    OpEvent,
    Overhead,
    OwnerShares,
    PhaseTime,
    TelemetryRecord,
    Timeline,
)

H200 = DeviceInfo(type="cuda", name="NVIDIA H200", arch="sm90", torch_version="2.11.0")
PEAKS = DevicePeaks(copy_bandwidth_gb_per_s=4120.0, gemm_tflop_per_s=712.0, gemm_dtype="bfloat16")
NUM_LAYERS, MAX_ROWS = 8, 50

_SDPA = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0"
_ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)"
)


@dataclass(frozen=True)
class _Step:
    """One op of one decoder layer: microseconds, FLOPs and bytes of a call."""

    node: str
    module: str
    op: str
    kernel: str
    us: float
    flops: float | None = None
    num_bytes: float | None = None
    line: int = 0


_LAYER = (
    _Step("linear_q", "self_attn.q_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNN", 3.6, 8.4e6, 8.4e6, 61),
    _Step("linear_k", "self_attn.k_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_1x4_h_bz_TNN", 2.4, 1.0e6, 1.1e6, 62),
    _Step("linear_v", "self_attn.v_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_1x4_h_bz_TNN", 2.4, 1.0e6, 1.1e6, 63),
    _Step("sdpa", "self_attn", "aten::_scaled_dot_product_cudnn_attention", _SDPA, 6.3, 4.2e6, 1.1e6, 70),
    _Step("linear_o", "self_attn.o_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNN", 3.6, 8.4e6, 8.4e6, 74),
    _Step("linear_gate", "mlp.gate_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", 7.7, 23e6, 23.1e6, 88),
    _Step("linear_up", "mlp.up_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", 7.6, 23e6, 23.1e6, 88),
    _Step("silu + mul", "mlp", "triton_poi_fused_mul_silu_3", "triton_poi_fused_mul_silu_3", 2.1, 4e4, 3.4e4, 88),
    _Step("linear_down", "mlp.down_proj", "aten::mm", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", 8.1, 23e6, 23.1e6, 88),
    _Step(
        "to + pow + mean + add + rsqrt + mul", "input_layernorm", "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", 2.9, 1e4, 1.6e4, 31,
    ),
    _Step("add", "", "aten::add", _ELEMENTWISE, 1.9, 2e3, 1.2e4, 103),
)  # fmt: skip
_HEAD = _Step(
    "linear_head", "lm_head", "aten::mm", "nvjet_sm90_tst_128x8_64x12_2x1_v_bz_TNT", 33.4, 131e6, 131.1e6, 140
)


def decode_record(**changes: object) -> TelemetryRecord:
    """One decode step of an eight-layer decoder on an H200, launch-bound, with every field that a profile can have."""
    steps = sorted(_placed_steps(), key=lambda step: -step.us)
    total_us = sum(step.us for step in steps)
    nodes = tuple(_node(step, total_us) for step in steps)
    given: dict[str, object] = {
        "schema_version": "agnitra.telemetry.v2",
        "bottleneck": Bottleneck(
            op="aten::mm", latency_ms=0.0334, shape=(1, 2048), node="linear_head", module_path="lm_head",
            source="decoder.py:140", share=33.4 / total_us, num_calls=1, confidence=1.0,
        ),
        "events": tuple(_op(step, total_us) for step in steps)[:MAX_ROWS],
        "nodes": nodes[:MAX_ROWS],
        "kernels": tuple(_kernel(step) for step in steps)[:MAX_ROWS],
        "gpu": GpuTelemetry(
            gpu_utilisation=0.214, busy_ms=total_us / 1e3, sample_period_ms=100.0, num_samples=12,
            samples=(GpuSample(time_ms=0.0, gpu_utilisation=21.0, power_w=214.0),), energy_j=271.4,
            throttle=("power cap by software",),
            gpm=GpmMetrics(sm_utilisation=0.19, sm_occupancy=0.08, tensor_utilisation=0.021,
                           dram_bandwidth_utilisation=0.162, reason="fp32 has no counter in this driver"),
            idle=IdleTime(idle_ms=1.553, host_wait_ms=1.502, kernel_wait_ms=0.044, unknown_ms=0.007,
                          launch_bound_share=0.76, num_gaps=89),
        ),
        "behavior": Behavior(gpu_util_mean=0.21, power_w_mean=214.0, cpu_utilisation=1.02),
        "name": "decode step", "workload": "llama-decode", "phase": "decode",
        "wall_ms": 1.976, "profiled_ms": 2.31, "num_repeats": 20, "items_per_call": 1, "item_unit": "tokens",
        "tokens_per_second": 506.1, "total_self_ms": total_us / 1e3, "attributed_share": 0.9942,
        "memory": MemoryTelemetry(
            peak_memory_bytes=1_912_602_624, parameter_bytes=1_700_000_000,
            peak_nodes=(MemoryShare(node="linear_head", module_path="lm_head", num_bytes=262_144_000),
                        MemoryShare(node="sdpa_3", module_path="layers.3.self_attn", num_bytes=33_554_432),
                        MemoryShare(node=None, module_path="layers.5.mlp", num_bytes=11_534_336)),
        ),
        "device": H200,
        "owners": OwnerShares(fx_node=0.9703, param_grad=0.0, optimizer=0.0, outside_graph=0.0239, residual=0.0058,
                              exact_node=0.9561),
        "phases": (PhaseTime(phase="prefill", num_calls=1, wall_ms=14.21, latency_ms=11.02, num_tokens=2048,
                             tokens_per_second=144_124.0),
                   PhaseTime(phase="decode", num_calls=64, wall_ms=126.5, latency_ms=27.1, num_tokens=64,
                             tokens_per_second=506.1)),
        "timeline": _timeline(),
        "overhead": Overhead(marker_us=1.1, num_markers=97, event_us=0.88, marker_ms=0.107, share=0.041, read_ms=212.0,
                             graph_ms=41.0),
        "num_events": 48_112, "num_dropped_events": 1204, "num_graph_nodes": 412,
        "notes": ("Shapes come from one more call without timing.",),
    }  # fmt: skip
    return TelemetryRecord(**{**given, **changes})  # type: ignore[arg-type]


def training_record(**changes: object) -> TelemetryRecord:
    """One training step on a CPU: parameter gradients, an optimiser, and a loss outside of the graph."""
    rows = (
        ("linear_3", "blocks.0.mlp.fc", "aten::addmm", 4.12, "fx_node", "order"),
        ("linear_5", "blocks.1.mlp.fc", "aten::mm", 3.77, "fx_node", "sequence_number"),
        ("linear_4", "blocks.0.mlp.out", "aten::addmm", 3.51, "fx_node", "order"),
        ("scaled_dot_product_attention", "blocks.0.attn",
         "aten::_scaled_dot_product_flash_attention_for_cpu", 2.96, "fx_node", "partial_order"),
        ("optimizer:AdamW", None, "aten::_foreach_addcdiv_", 2.2, "optimizer", "range"),
        ("param_grad:blocks.0.mlp.fc.weight", "blocks.0.mlp.fc", "aten::add_", 1.31, "param_grad", "hook"),
        (None, "blocks.1.attn", "aten::bmm", 1.12, "fx_node", "module"),
        (None, None, "aten::cross_entropy_loss", 0.61, "outside_graph", "outside_graph"),
        (None, None, "aten::empty_strided", 0.22, None, None),
    )  # fmt: skip
    total_ms = sum(row[3] for row in rows)
    ops = tuple(
        OpEvent(op=op, latency_ms=ms, cpu_ms=ms, device_ms=None, num_calls=2, share=ms / total_ms, node=node,
                module_path=module, owner=owner, method=method)
        for node, module, op, ms, owner, method in rows
    )  # fmt: skip
    nodes = tuple(
        NodeEvent(node=node, op=op, latency_ms=ms, cpu_ms=ms, device_ms=None, num_calls=2, share=ms / total_ms,
                  owner=owner, method=method, module_path=module, source="model.py:19" if owner == "fx_node" else None)
        for node, module, op, ms, owner, method in rows
    )  # fmt: skip

    def owned(owner: str | None) -> float:
        return sum(ms for *_, ms, found, _ in rows if found == owner) / total_ms

    given: dict[str, object] = {
        "bottleneck": Bottleneck(op="aten::addmm", latency_ms=4.12, shape=(256, 1024), node="linear_3",
                                 module_path="blocks.0.mlp.fc", source="model.py:19", share=4.12 / total_ms),
        "events": ops, "nodes": nodes,
        "gpu": GpuTelemetry(reason="no CUDA device: GPU metrics are not available on this machine"),
        "behavior": Behavior(cpu_utilisation=1.9),
        "name": "training step", "wall_ms": 24.1, "profiled_ms": 24.1, "total_self_ms": total_ms,
        "attributed_share": 0.989, "memory": MemoryTelemetry(parameter_bytes=2_400_000),
        "device": DeviceInfo(type="cpu", name="AMD EPYC 9554"),
        "owners": OwnerShares(fx_node=owned("fx_node"), param_grad=owned("param_grad"), optimizer=owned("optimizer"),
                              outside_graph=owned("outside_graph"), residual=owned(None), exact_node=0.62),
        "overhead": Overhead(marker_us=1.4, num_markers=37, event_us=0.9, share=0.004, read_ms=31.0),
        "timeline": Timeline(bin_ms=0.2, host_busy=tuple(0.9 if i % 9 else 0.4 for i in range(120))),
    }  # fmt: skip
    return TelemetryRecord(**{**given, **changes})  # type: ignore[arg-type]


def _placed_steps() -> list[_Step]:
    placed = [_HEAD]
    for layer in range(NUM_LAYERS):
        for step in _LAYER:
            node = " + ".join(f"{name}_{layer}" for name in step.node.split(" + "))
            module = f"layers.{layer}.{step.module}" if step.module else f"layers.{layer}"
            # Equal layers do not take equal times.
            us = step.us * (1 + 0.01 * ((layer * 7 + len(step.node)) % 5))
            placed.append(_Step(node, module, step.op, step.kernel, us, step.flops, step.num_bytes, step.line))
    return placed


def _node(step: _Step, total_us: float) -> NodeEvent:
    assert step.flops is not None and step.num_bytes is not None
    ideal_us = max(step.num_bytes / 4120e3, step.flops / 712e6)
    num_nodes = step.node.count(" + ") + 1
    is_fused = step.kernel.startswith("triton")
    return NodeEvent(
        node=step.node, op=step.op, latency_ms=step.us / 1e3, cpu_ms=0.011, device_ms=step.us / 1e3,
        share=step.us / total_us, num_calls=1, num_nodes=num_nodes, owner="fx_node",
        method="provenance" if is_fused else "order", confidence=1.0, module_path=step.module,
        source=f"decoder.py:{step.line}", phase="decode", shape=(1, 2048), dtype="bfloat16", flops=step.flops,
        bytes_moved=step.num_bytes, intensity_flop_per_byte=step.flops / step.num_bytes,
        tflop_per_s=step.flops / step.us / 1e6, gb_per_s=step.num_bytes / step.us / 1e3,
        roofline_share=ideal_us / step.us,
    )  # fmt: skip


def _op(step: _Step, total_us: float) -> OpEvent:
    return OpEvent(
        op=step.op, latency_ms=step.us / 1e3, cpu_ms=0.011, device_ms=step.us / 1e3, num_calls=1,
        share=step.us / total_us, node=step.node, module_path=step.module, method="order", owner="fx_node",
    )  # fmt: skip


def _kernel(step: _Step) -> KernelEvent:
    op = None if step.kernel.startswith("triton") else step.op
    return KernelEvent(
        kernel=step.kernel, device_ms=step.us / 1e3, num_launches=1, op=op, node=step.node, module_path=step.module,
        owner="fx_node", method="order",
    )  # fmt: skip


def _timeline() -> Timeline:
    host = tuple(0.62 + 0.3 * ((index * 37) % 11) / 11 for index in range(200))
    device = tuple(0.12 + 0.2 * ((index * 29) % 13) / 13 if index < 190 else 0.83 for index in range(200))
    return Timeline(bin_ms=0.0099, host_busy=host, device_busy=device)
