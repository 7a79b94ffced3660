"""What each stage files, and the finished loop -> its report, its bill and its provenance."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.kernel import Kernel, Site
from agnitra_lab.contracts.measurement import CandidateResult, Comparison
from agnitra_lab.contracts.patch import PatchLog, Refusal
from agnitra_lab.contracts.report import AgentNotes, Checkpoint, Payback, Region, Report
from agnitra_lab.contracts.run import Budget, Kind, Meta
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.contracts.usage import UsageEvent
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import RollbackError
from agnitra_lab.loop.settings import Settings
from agnitra_lab.metering.usage import usage_event
from agnitra_lab.patch.install import Patch
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.report import assemble
from agnitra_lab.runs import provenance
from agnitra_lab.runs.store import Run


def file_profile(run: Run, telemetry: Telemetry) -> None:
    """Write the telemetry of the profile stage."""
    telemetry.save(run.directory("profiles"))


def file_proposal(run: Run, proposal: Proposal) -> None:
    """Write the suggestions."""
    run.write_json("reports", "suggestions.json", proposal)


def file_searches(run: Run, searches: Sequence[SearchResult], ledgers: Mapping[Site, bytes]) -> None:
    """Write every trial of each search, and its ledger where it has one."""
    for result in searches:
        site = Site(result.space_template, result.shape, result.dtype)
        stem = site.key().replace("/", "__")
        run.write_json("cmaes", f"trials/{stem}.json", result)
        if site in ledgers:
            run.write_bytes("cmaes", f"ledgers/{stem}.jsonl", ledgers[site])


def file_kernels(run: Run, kernels: Sequence[Kernel]) -> None:
    """Write the rendered sources."""
    for kernel in kernels:
        run.write_text("perf", f"kernels/{kernel.name}.py", kernel.source)


def file_patches(run: Run, patches: Mapping[str, Patch]) -> None:
    """Write the patch log of each candidate that may still win."""
    for name, patch in patches.items():
        run.write_json("perf", f"patches/{_file_stem(name)}.json", patch.log())


def file_comparisons(run: Run, results: Sequence[CandidateResult]) -> None:
    """Write what was measured of each candidate."""
    for result in results:
        if result.comparison is not None:
            run.write_json("bench", f"comparisons/{_file_stem(result.name)}.json", result.comparison)


def file_certificate(run: Run, comparison: Comparison, winner: Patch | None) -> None:
    """Write the proof that the winner computes the same, and that the original is as it was.

    Raises:
        RollbackError: when it is not.
    """
    run.write_json("certs", "equivalence.json", comparison.equivalence)
    if winner is None:
        return
    proof = winner.prove_rollback()
    run.write_json("certs", "rollback.json", proof)
    if not proof.is_restored:
        raise RollbackError(f"{winner.name} changed the original model: {proof.detail}.")


def refusals_of(patches: Mapping[str, Patch], winner: str) -> tuple[Refusal, ...]:
    """Return what all changes together left as it was, where no candidate of ours is kept to say so itself."""
    ours = {name: patch for name, patch in patches.items() if name.startswith("agnitra")}
    if not ours or winner in ours:
        return ()
    return ours.get("agnitra", next(iter(ours.values()))).log().refusals


def build_report(
    *,
    run_id: str,
    workload: Workload,
    settings: Settings,
    device: DeviceInfo,
    peaks: DevicePeaks | None,
    winner: str,
    comparison: Comparison,
    results: Sequence[CandidateResult],
    telemetry: TelemetryRecord,
    proposal: Proposal,
    searches: Sequence[SearchResult],
    log: PatchLog | None,
    refusals: Sequence[Refusal],
    checkpoints: Sequence[Checkpoint],
    against_best: Comparison | None,
    regions: Sequence[Region] = (),
) -> Report:
    """Put everything that a report card shows into one record."""
    return Report(
        run_id=run_id,
        title=f"{workload.name} on {device.name}",
        workload=workload.name,
        generated_at=provenance.utc_now(),
        device=device,
        peaks=peaks,
        winner=winner,
        headline=assemble.headline(comparison, winner),
        comparison=comparison,
        candidates=tuple(results),
        telemetry=telemetry,
        proposal=proposal,
        searches=tuple(searches),
        patch=log,
        refusals=tuple(refusals),
        usage=_usage(run_id, workload, settings, device, winner, comparison),
        notes=_notes(settings, proposal, searches, log),
        checkpoints=tuple(checkpoints),
        price_per_gpu_hour=float(settings.price_per_gpu_hour),
        against_best=against_best,
        payback=_payback(comparison, checkpoints) if winner != comparison.baseline else None,
        regions=tuple(regions),
    )


def _payback(comparison: Comparison, checkpoints: Sequence[Checkpoint]) -> Payback | None:
    saved_ms = comparison.baseline_latency.latency_ms_p50 - comparison.candidate_latency.latency_ms_p50
    spent_s = sum(point.wall_s for point in checkpoints)
    if saved_ms <= 0:
        return None
    searched_s = sum(point.wall_s for point in checkpoints if point.stage == "refine")
    num_calls = math.ceil(spent_s * 1e3 / saved_ms)
    return Payback(num_calls=num_calls, spent_s=spent_s, searched_s=searched_s, saved_ms=saved_ms)


def budget(workload: Workload, settings: Settings, profile: WorkloadProfile) -> Budget:
    """What the run intended, in the layout's names."""
    flops, items = profile.total_flops, workload.items_per_call
    return Budget(
        tokens_per_step_global=items,
        flops_per_step_est=flops,
        flops_per_token_est=flops / items if flops and items else None,
        budget_s=settings.budget_s,
    )


def meta(run_id: str, kind: Kind, workload: Workload, settings: Settings, device: DeviceInfo | None) -> Meta:
    """Provenance of one of the run's directories."""
    config: dict[str, Any] = {**settings.public(), "workload": dict(workload.settings)}
    return provenance.meta(
        run_id, kind, workload.name, command=settings.command, argv=sys.argv,
        seed=settings.seed, device=device, config=config,
    )  # fmt: skip


def _notes(
    settings: Settings, proposal: Proposal, searches: Sequence[SearchResult], log: PatchLog | None
) -> AgentNotes:
    return AgentNotes(
        is_rl_enabled=settings.sampler == "rl" and bool(searches),
        sampler=settings.sampler if searches else None,
        suggestion_source=f"llm:{proposal.model}" if proposal.source == "llm" else "preset",
        applied=tuple(sorted({descriptor.action for descriptor in log.descriptors})) if log else (),
        banner=proposal.fallback.banner if proposal.fallback else None,
        measured_on="; ".join(sorted({found.measured_on for found in searches})) or None,
    )


def _usage(
    run_id: str, workload: Workload, settings: Settings, device: DeviceInfo, winner: str, comparison: Comparison
) -> UsageEvent:
    # Nothing installed means nothing saved: the same rate before and after.
    is_kept = winner != comparison.baseline
    baseline_rate = comparison.baseline_items_per_second
    baseline_ms = comparison.baseline_latency.latency_ms_p50
    return usage_event(
        project_id=settings.project_id,
        model_name=workload.name,
        tokens_processed=settings.tokens_processed,
        baseline_tokens_per_sec=baseline_rate,
        optimized_tokens_per_sec=comparison.candidate_items_per_second if is_kept else baseline_rate,
        baseline_latency_ms=baseline_ms,
        optimized_latency_ms=comparison.candidate_latency.latency_ms_p50 if is_kept else baseline_ms,
        price_per_gpu_hour=Decimal(settings.price_per_gpu_hour),
        success_fee_rate=Decimal(settings.success_fee_rate),
        metadata={
            "stage_notes": "baseline_vs_optimized",
            "run_id": run_id,
            "device": device.name,
            "item_unit": comparison.item_unit,
            "candidate": winner,
        },
    )


def _file_stem(candidate: str) -> str:
    return candidate.replace(":", "-")
