"""Profiles of small workloads, as facts: what the suggest stage is given in these tests."""

from __future__ import annotations

from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import MatchedPattern, WorkloadProfile, WorkloadType
from agnitra_lab.contracts.telemetry import Behavior, Bottleneck, GpuTelemetry, OpEvent, TelemetryRecord

CPU = DeviceInfo(type="cpu", name="A CPU", arch="AVX2", num_threads=2)
CUDA = DeviceInfo(type="cuda", name="NVIDIA H200", arch="sm90", num_multiprocessors=132)


def event(op: str, share: float, *, node: str | None = None, shape: tuple[int, ...] = (), **fields: Any) -> OpEvent:
    latency_ms = share * 10.0
    values = {"cpu_ms": latency_ms, "device_ms": None, "num_calls": 2, **fields}
    return OpEvent(op=op, latency_ms=latency_ms, share=share, node=node, shape=shape, **values)


def record(
    *events: OpEvent, wall_ms: float | None = 10.0, utilisation: float | None = None, **fields
) -> TelemetryRecord:
    top = max(events, key=lambda item: item.share, default=None)
    bottleneck = Bottleneck(op=top.op, latency_ms=top.latency_ms, shape=top.shape, node=top.node) if top else None
    return TelemetryRecord(
        **{"bottleneck": bottleneck, **fields},
        events=events,
        gpu=GpuTelemetry(gpu_utilisation=utilisation),
        behavior=Behavior(),
        wall_ms=wall_ms,
    )


def profile(*patterns: MatchedPattern, kind: WorkloadType = WorkloadType.UNKNOWN, **fields: Any) -> WorkloadProfile:
    return WorkloadProfile(workload_type=kind, patterns=patterns, confidence=0.9, **fields)


def pattern(name: str, *nodes: str, actions: list[str] | None = None) -> MatchedPattern:
    hints = {"actions": actions} if actions is not None else {}
    return MatchedPattern(pattern_name=name, confidence=1.0, subgraph=nodes, optimization_hints=hints)


def decoder_record(**fields: Any) -> TelemetryRecord:
    return record(
        event("aten::addmm", 0.4, node="q_proj", shape=(1, 2048)),
        event("aten::addmm", 0.3, node="gate_proj", shape=(1, 2048)),
        event("aten::mul", 0.1, node="norm_mul", shape=(1, 2048)),
        event("aten::silu", 0.05, node="act", shape=(1, 5632)),
        event("aten::mul", 0.05, node="act_mul", shape=(1, 5632)),
        event("aten::scaled_dot_product_attention", 0.1, node="sdpa", shape=(1, 32, 1, 64)),
        **fields,
    )


def decoder_profile() -> WorkloadProfile:
    return profile(
        pattern("transformer_attention", "q_proj", "sdpa"),
        pattern("gated_mlp", "gate_proj", "act", "act_mul"),
        pattern("rms_norm", "norm_mul"),
        kind=WorkloadType.LLM,
        phase="decode",
    )


def suggestion_json(action: Any = "freezing", **changes: Any) -> dict[str, Any]:
    return {
        "action": action,
        "block_size": None,
        "tile_shape": None,
        "unroll_factor": None,
        "num_warps": None,
        "num_stages": None,
        "target_latency_ms": 8.5,
        "expected_latency_ms": 9.0,
        "rationale": "aten::addmm takes 70% of the call.",
        **changes,
    }
