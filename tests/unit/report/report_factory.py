"""Reports of plausible runs, for tests that need every part of one."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

from agnitra_lab.contracts import (
    AgentNotes,
    Behavior,
    Bottleneck,
    CandidateResult,
    Checkpoint,
    Comparison,
    DeviceInfo,
    DevicePeaks,
    Equivalence,
    Fallback,
    GpuSample,
    GpuTelemetry,
    KernelConfig,
    KernelEvent,
    Latency,
    MemoryTelemetry,
    OpEvent,
    PatchDescriptor,
    PatchLog,
    Proposal,
    Ratio,
    Refusal,
    Report,
    RollbackProof,
    SearchResult,
    Suggestion,
    TelemetryRecord,
    Trial,
    UsageEvent,
)
from agnitra_lab.contracts.measurement import Verdict

Device = Literal["cuda", "cpu"]

OPS = (
    ("aten::linear", 0.512, "layers.0.mlp.gate_proj"),
    ("aten::scaled_dot_product_attention", 0.171, "layers.0.attention"),
    ("aten::mul", 0.094, "layers.0.mlp"),
    ("aten::rsqrt", 0.066, "layers.0.input_norm"),
    ("aten::silu", 0.058, "layers.0.mlp"),
    ("aten::copy_", 0.041, None),
    ("aten::embedding", 0.021, "embedding"),
    ("aten::add", 0.019, "layers.0"),
    ("aten::cat", 0.018, "layers.0.attention"),
)


def make_report(
    device: Device = "cpu",
    verdict: Verdict = "faster",
    *,
    has_fallback: bool = False,
    rationale: str = "One read of the activations serves both projections, so the GEMM is larger and launched once.",
    **changes: Any,
) -> Report:
    """A finished run of a small decoder, with the given outcome."""
    base_ms = 24.4 if device == "cuda" else 61.8
    factor = {"faster": 1.62, "no_change": 1.006, "slower": 0.91, "not_equivalent": 1.85}[verdict]
    winner = "compile+qkv_concat+gate_up_concat" if verdict == "faster" else "eager"
    comparison = make_comparison(base_ms, factor, verdict, is_cuda=device == "cuda")
    values: dict[str, Any] = {
        "run_id": "20260114_093012_llama-prefill_3fa9",
        "title": "demo:llama-prefill",
        "workload": "demo:llama-prefill",
        "generated_at": "2026-01-14T09:30:58Z",
        "device": make_device(device),
        "peaks": DevicePeaks(copy_bandwidth_gb_per_s=4310.0, gemm_tflop_per_s=791.2, gemm_dtype="bfloat16")
        if device == "cuda"
        else DevicePeaks(copy_bandwidth_gb_per_s=18.4, gemm_tflop_per_s=0.212, gemm_dtype="float32"),
        "winner": winner,
        "headline": {
            "faster": f"{winner} is 1.62x faster than eager (95% interval 1.58 to 1.66).",
            "no_change": "No candidate is faster than eager: the differences are within the noise.",
            "slower": "Every candidate is slower than eager, so eager is kept.",
            "not_equivalent": "The fastest candidate does not compute the same function, so eager is kept.",
        }[verdict],
        "comparison": comparison,
        "candidates": make_candidates(base_ms, comparison, device),
        "telemetry": make_telemetry(device, base_ms),
        "proposal": make_proposal(has_fallback, rationale),
        "searches": (make_search(device),),
        "patch": make_patch(),
        "usage": make_usage(comparison, verdict),
        "notes": AgentNotes(
            is_rl_enabled=True,
            sampler="tpe",
            suggestion_source="preset" if has_fallback else "llm:local-coder",
            applied=("qkv_concat", "gate_up_concat") if verdict == "faster" else (),
            banner="Suggestions come from heuristic presets: no answer within 8 s" if has_fallback else None,
            measured_on=None if device == "cuda" else "recorded: NVIDIA H200",
        ),
        "checkpoints": make_checkpoints(has_fallback),
        "price_per_gpu_hour": 2.5,
    }
    return Report(**{**values, **changes})


def make_device(device: Device) -> DeviceInfo:
    if device == "cuda":
        return DeviceInfo(
            type="cuda", name="NVIDIA H200", arch="sm90", num_multiprocessors=132, total_memory_bytes=150_754_820_096,
            torch_version="2.11.0", triton_version="3.6.0", cuda_version="13.0", python_version="3.12.3",
        )  # fmt: skip
    return DeviceInfo(
        type="cpu", name="AMD EPYC 9B14", arch="AVX512", num_threads=2, torch_version="2.13.0", python_version="3.11.7"
    )


def make_comparison(base_ms: float, factor: float, verdict: Verdict, *, is_cuda: bool, name: str = "") -> Comparison:
    equivalent = verdict != "not_equivalent"
    return Comparison(
        workload="demo:llama-prefill",
        baseline="eager",
        candidate=name or "compile+qkv_concat+gate_up_concat",
        baseline_latency=make_latency(base_ms, is_cuda),
        candidate_latency=make_latency(base_ms / factor, is_cuda),
        speedup=Ratio(median=factor, low=factor * 0.976, high=factor * 1.027),
        noise=Ratio(median=1.001, low=0.985, high=1.018),
        baseline_items_per_second=128_000.0 / base_ms,
        candidate_items_per_second=128_000.0 * factor / base_ms,
        item_unit="tokens",
        equivalence=Equivalence(
            is_equivalent=equivalent,
            match_share=0.99998 if equivalent else 0.8123,
            required_share=0.999,
            rtol=1e-4,
            num_seeds=3,
            num_elements=4_096_000,
            max_abs_error=3.1e-6,
            error_vs_fp64=2.4e-7,
            baseline_error_vs_fp64=2.5e-7,
            error_ratio=0.96,
            top1_agreement=1.0 if equivalent else 0.71,
            problems=() if equivalent else ("only 81.23% of the elements match, 99.9% are required",),
        ),
        verdict=verdict,
        floor_ms=11.4 if is_cuda else None,
        floor_reason="matmul FLOPs over the measured GEMM peak" if is_cuda else None,
        seeds=(0, 1, 2),
    )


def make_latency(median_ms: float, is_cuda: bool) -> Latency:
    return Latency(
        latency_ms_p50=median_ms,
        latency_ms_p20=median_ms * 0.981,
        latency_ms_p80=median_ms * 1.034,
        num_samples=84,
        device_ms_p50=median_ms * 0.97 if is_cuda else None,
    )


def make_candidates(base_ms: float, comparison: Comparison, device: Device) -> tuple[CandidateResult, ...]:
    is_cuda = device == "cuda"

    def measured(name: str, factor: float, verdict: Verdict) -> Comparison:
        return make_comparison(base_ms, factor, verdict, is_cuda=is_cuda, name=name)

    is_kept = comparison.verdict == "faster"
    return (
        CandidateResult(
            name=comparison.candidate,
            status="kept" if is_kept else "rejected",
            reason="fastest, and equivalent" if is_kept else "not kept: see the verdict",
            compile_s=14.2,
            comparison=comparison,
        ),
        CandidateResult(
            name="compile:default", status="rejected", reason="slower than the winner", compile_s=11.9,
            comparison=measured("compile:default", min(comparison.speedup.median, 1.31), "faster")
            if is_kept
            else measured("compile:default", 0.998, "no_change"),
        ),
        CandidateResult(
            name="compile:max-autotune", status="failed", reason="CppCompileError: g++ ended with 1", compile_s=3.1
        ),
        CandidateResult(
            name="freezing", status="rejected", reason="not equivalent: 98.1% of the elements match", compile_s=18.0,
            comparison=measured("freezing", 1.71, "not_equivalent"),
        ),
        CandidateResult(name="cuda_graph", status="skipped", reason="no gain" if is_cuda else "needs a CUDA device"),
    )  # fmt: skip


def make_telemetry(device: Device, wall_ms: float) -> TelemetryRecord:
    is_cuda = device == "cuda"
    events = tuple(
        OpEvent(
            op=op,
            latency_ms=round(wall_ms * share, 4),
            cpu_ms=round(wall_ms * share, 4),
            device_ms=round(wall_ms * share, 4) if is_cuda else None,
            num_calls=22,
            share=share,
            shape=(1, 128, 512),
            node=op.removeprefix("aten::") if path else None,
            module_path=path,
            method="fx_node" if path else "outside_graph",
        )
        for op, share, path in OPS
    )
    return TelemetryRecord(
        bottleneck=Bottleneck(
            op="aten::linear", latency_ms=events[0].latency_ms, shape=(1, 128, 512), node="linear_4",
            module_path="layers.0.mlp.gate_proj", source="model.py:118", share=0.512, num_calls=22, confidence=0.98,
        ),
        events=events,
        gpu=GpuTelemetry(
            gpu_utilisation=0.71, busy_ms=17.3, sample_period_ms=100.0,
            samples=tuple(GpuSample(time_ms=100.0 * i, gpu_utilisation=70.0 + i, power_w=512.0) for i in range(6)),
        )
        if is_cuda
        else GpuTelemetry(reason="no GPU on this machine"),
        behavior=Behavior(gpu_util_mean=0.68, power_w_mean=512.0)
        if is_cuda
        else Behavior(reason="no GPU on this machine", cpu_utilisation=1.86),
        workload="demo:llama-prefill",
        phase="prefill",
        wall_ms=wall_ms,
        items_per_call=128,
        item_unit="tokens",
        tokens_per_second=128_000.0 / wall_ms,
        total_self_ms=wall_ms,
        attributed_share=0.959,
        kernels=(KernelEvent(kernel="sm90_xmma_gemm_bf16", device_ms=9.1, num_launches=66, op="aten::linear"),)
        if is_cuda
        else (),
        memory=MemoryTelemetry(peak_memory_bytes=412_000_000, parameter_bytes=301_000_000, source="rss"),
        num_events=412,
        num_graph_nodes=188,
    )  # fmt: skip


def make_proposal(has_fallback: bool, rationale: str) -> Proposal:
    source = "preset:shared_input_linears" if has_fallback else "llm:local-coder"
    shared = {"unroll_factor": None, "target_latency_ms": 40.0, "source": source}
    return Proposal(
        suggestions=(
            Suggestion(
                action="qkv_concat", block_size=None, tile_shape=None, expected_latency_ms=52.0, rationale=rationale,
                **shared,
            ),
            Suggestion(
                action="gate_up_concat", block_size=None, tile_shape=None, expected_latency_ms=47.5,
                rationale=rationale, **shared,
            ),
            Suggestion(
                action="rms_norm", block_size=1024, tile_shape=(1, 1024), expected_latency_ms=46.0,
                rationale="The norm is bound by memory; fusing the residual add saves one pass.",
                num_warps=4, num_stages=2, **shared,
            ),
        ),
        source="preset" if has_fallback else "llm",
        model=None if has_fallback else "local-coder",
        fallback=Fallback(reason="timeout", detail="no answer within 8 s", wall_ms=8003.1) if has_fallback else None,
    )  # fmt: skip


def make_search(device: Device) -> SearchResult:
    latencies = (0.0412, 0.0399, None, 0.0371, 0.0384, 0.0338, 0.0351, 0.0336, 0.0340, 0.0336)
    trials = tuple(
        Trial(
            index=index,
            config=KernelConfig(template="rms_norm", params={"BLOCK_N": 512 << index % 3, "num_warps": 1 << index % 4}),
            latency_ms=latency,
            status="ok" if latency else "failed",
            detail=None if latency else "out of shared memory",
            elapsed_s=0.2 * index,
        )
        for index, latency in enumerate(latencies)
    )
    return SearchResult(
        space_template="rms_norm", shape=(4096, 2048), dtype="bfloat16", sampler="tpe", seed=0,
        measured_on="NVIDIA H200" if device == "cuda" else "recorded: NVIDIA H200",
        trials=trials, best=trials[7], num_configs=24, stopped_because="budget",
    )  # fmt: skip


def make_patch() -> PatchLog:
    return PatchLog(
        candidate="compile+qkv_concat+gate_up_concat",
        descriptors=tuple(
            PatchDescriptor(
                name=f"{action}__layers.{layer}.{path}__0",
                action=action,
                kind="rewrite",
                node=f"linear_{layer * 7}",
                module_path=f"layers.{layer}.{path}",
                source="model.py:118",
                replaced=("aten::linear",) * count,
                replacement="aten::linear, split",
                config={"num_merged": count},
            )
            for layer in range(2)
            for action, path, count in (("qkv_concat", "attention", 3), ("gate_up_concat", "mlp", 2))
        ),
        refusals=(Refusal(action="rms_norm", reason="needs a CUDA device"),),
        num_graphs=1,
        compile_s=14.2,
        rollback=RollbackProof(
            is_restored=True, attributes_equal=True, hooks_equal=True, parameters_equal=True, outputs_equal=True,
            num_parameters=12_812_800, state_sha256="9f" * 32,
        ),
        covered_share=0.82,
    )  # fmt: skip


def make_usage(comparison: Comparison, verdict: Verdict) -> UsageEvent:
    before, after = Decimal("0.0231"), Decimal("0.0143") if verdict == "faster" else Decimal("0.0231")
    cost_before, cost_after = Decimal("0.0578"), Decimal("0.0357") if verdict == "faster" else Decimal("0.0578")
    fee = Decimal("0.0044") if verdict == "faster" else Decimal("0.0000")
    return UsageEvent(
        project_id="demo",
        model_name="llama-prefill",
        tokens_processed=262144,
        baseline_latency_ms=Decimal(str(round(comparison.baseline_latency.latency_ms_p50, 1))),
        optimized_latency_ms=Decimal(str(round(comparison.candidate_latency.latency_ms_p50, 1))),
        baseline_tokens_per_sec=Decimal(str(round(comparison.baseline_items_per_second, 1))),
        optimized_tokens_per_sec=Decimal(str(round(comparison.candidate_items_per_second, 1))),
        gpu_hours_before=before,
        gpu_hours_after=after,
        gpu_hours_saved=before - after,
        performance_uplift_pct=Decimal("62.0") if verdict == "faster" else Decimal("0.0"),
        cost_before=cost_before,
        cost_after=cost_after,
        cost_savings=cost_before - cost_after,
        usage_charge=cost_after,
        success_fee=fee,
        total_billable=cost_after + fee,
        currency="USD",
        metadata={"stage_notes": "baseline_vs_optimized"},
    )


def make_checkpoints(has_fallback: bool) -> tuple[Checkpoint, ...]:
    return (
        Checkpoint(stage="profile", status="done", headline="aten::linear takes 51.2% of the time.", wall_s=4.31),
        Checkpoint(
            stage="suggest",
            status="fallback" if has_fallback else "done",
            headline="Three suggestions from presets." if has_fallback else "Three suggestions from local-coder.",
            wall_s=8.02,
        ),
        Checkpoint(stage="refine", status="done", headline="rms_norm: 10 of 24 configs, best 0.0336 ms.", wall_s=2.4),
        Checkpoint(stage="generate", status="done", headline="One Triton kernel, rms_norm_9f31c2aa01de.", wall_s=0.3),
        Checkpoint(stage="patch", status="done", headline="Four changes in one graph.", wall_s=14.2),
        Checkpoint(
            stage="benchmark", status="done", headline="Five candidates, 84 interleaved pairs each.", wall_s=31.7
        ),
        Checkpoint(stage="report", status="done", headline="Report card written.", wall_s=0.4),
    )
