"""summary.json from contracts: the figures of each category by names that end in their unit.

One optimisation is six summaries, one for each place where the layout promises it; `optimization_summaries` builds them
all from the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence
from agnitra_lab.contracts.report import Report
from agnitra_lab.contracts.run import SUMMARY_SCHEMA_VERSION, Budget, Category, Kind, Meta, Results, RunSummary
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.runs.layout import KINDS
from agnitra_lab.runs.markdown import run_markdown

BYTES_PER_GB = 10**9


def summarise(meta: Meta, results: Results, budget: Budget | None = None) -> RunSummary:
    """Put the three parts of summary.json together."""
    return RunSummary(schema_version=SUMMARY_SCHEMA_VERSION, meta=meta, budget=budget or Budget(), results=results)


def profile_results(telemetry: TelemetryRecord) -> Results:
    """Figures of a profile."""
    bottleneck = telemetry.bottleneck
    return Results(
        tokens_per_second=telemetry.tokens_per_second,
        peak_memory_allocated_gb=_peak_memory_gb(telemetry),
        **_present(
            latency_ms=telemetry.wall_ms,
            total_self_ms=telemetry.total_self_ms,
            bottleneck_op=bottleneck.op if bottleneck else None,
            bottleneck_latency_ms=bottleneck.latency_ms if bottleneck else None,
            bottleneck_share=bottleneck.share if bottleneck else None,
            attributed_share=telemetry.attributed_share,
            gpu_utilisation=telemetry.gpu.gpu_utilisation,
            num_events=telemetry.num_events,
            num_graph_nodes=telemetry.num_graph_nodes,
        ),
    )


def bench_results(comparison: Comparison, telemetry: TelemetryRecord | None = None) -> Results:
    """Figures of an A/B comparison: the candidate's own, and the baseline's beside them."""
    is_in_tokens = comparison.item_unit == "tokens"
    return Results(
        tokens_per_second=comparison.candidate_items_per_second if is_in_tokens else None,
        peak_memory_allocated_gb=_peak_memory_gb(telemetry) if telemetry else None,
        **_present(
            latency_ms_p50=comparison.candidate_latency.latency_ms_p50,
            latency_ms_p20=comparison.candidate_latency.latency_ms_p20,
            latency_ms_p80=comparison.candidate_latency.latency_ms_p80,
            device_ms_p50=comparison.candidate_latency.device_ms_p50,
            baseline_latency_ms_p50=comparison.baseline_latency.latency_ms_p50,
            baseline_device_ms_p50=comparison.baseline_latency.device_ms_p50,
            items_per_second=comparison.candidate_items_per_second,
            baseline_items_per_second=comparison.baseline_items_per_second,
            item_unit=comparison.item_unit,
            speedup=comparison.speedup.median,
            speedup_low=comparison.speedup.low,
            speedup_high=comparison.speedup.high,
            noise_low=comparison.noise.low,
            noise_high=comparison.noise.high,
            floor_ms=comparison.floor_ms,
            verdict=comparison.verdict,
            is_equivalent=comparison.equivalence.is_equivalent,
            match_share=comparison.equivalence.match_share,
            baseline=comparison.baseline,
            candidate=comparison.candidate,
        ),
    )


def certs_results(equivalence: Equivalence) -> Results:
    """Figures of an equivalence check."""
    return Results(**_present(**equivalence.model_dump(mode="json")))


def search_results(searches: Iterable[SearchResult]) -> Results:
    """Figures of kernel searches, one object for each."""
    rows = [
        _present(
            template=search.space_template,
            shape=list(search.shape),
            dtype=search.dtype,
            sampler=search.sampler,
            seed=search.seed,
            measured_on=search.measured_on,
            num_trials=len(search.trials),
            num_failed_trials=sum(trial.status == "failed" for trial in search.trials),
            num_configs=search.num_configs,
            best_config=search.best.config.key() if search.best else None,
            best_latency_ms=search.best.latency_ms if search.best else None,
            stopped_because=search.stopped_because,
        )
        for search in searches
    ]
    return Results(**_present(num_searches=len(rows), searches=rows))


def candidate_results(candidates: Iterable[CandidateResult]) -> Results:
    """Figures of every candidate that was tried, one object for each."""
    return Results(**_present(candidates=[_candidate_row(candidate) for candidate in candidates]))


def report_results(report: Report) -> Results:
    """Headline figures of a whole run: the benchmark's, and what they are worth."""
    usage = report.usage.model_dump(mode="json")
    money = {
        name: usage[name]
        for name in (
            "gpu_hours_before",
            "gpu_hours_after",
            "gpu_hours_saved",
            "cost_savings",
            "total_billable",
            "currency",
        )
    }
    bench = bench_results(report.comparison, report.telemetry).model_dump(mode="json", exclude_none=True)
    return Results(**{"winner": report.winner, "headline": report.headline, **bench, **money})


def optimization_summaries(
    report: Report, make_meta: Callable[[Kind], Meta], *, budget: Budget | None = None
) -> dict[Category, tuple[RunSummary, str]]:
    """Build everything that `Run.finish_all` files for one optimisation.

    Args:
        report: the finished run.
        make_meta: kind -> provenance; asked once, for it asks git: the places differ in their kind alone.
        budget: what was intended.

    Returns:
        Category -> (summary, text of run.md): profiles, perf, certs, bench, reports, and cmaes where kernels were
        searched.
    """
    filed: dict[Category, tuple[str, Results]] = {
        "profiles": (f"Profile of {report.workload}: where its time goes.", profile_results(report.telemetry)),
        "perf": (f"Every candidate for {report.workload}, each against eager.", candidate_results(report.candidates)),
        "certs": (
            f"Whether {report.comparison.candidate} computes what {report.comparison.baseline} computes.",
            certs_results(report.comparison.equivalence),
        ),
        "bench": (
            f"{report.comparison.candidate} against {report.comparison.baseline}, interleaved.",
            bench_results(report.comparison, report.telemetry),
        ),
        "reports": (report.headline, report_results(report)),
    }
    if report.searches:
        filed["cmaes"] = (f"Kernel searches for {report.workload}.", search_results(report.searches))
    summaries: dict[Category, tuple[RunSummary, str]] = {}
    meta = make_meta(KINDS["reports"])
    for category, (why, results) in filed.items():
        summary = summarise(meta.model_copy(update={"kind": KINDS[category]}), results, budget)
        summaries[category] = (summary, run_markdown(summary, why))
    return summaries


def _candidate_row(candidate: CandidateResult) -> dict[str, Any]:
    comparison = candidate.comparison
    return _present(
        name=candidate.name,
        status=candidate.status,
        reason=candidate.reason,
        compile_s=candidate.compile_s,
        latency_ms_p50=comparison.candidate_latency.latency_ms_p50 if comparison else None,
        baseline_latency_ms_p50=comparison.baseline_latency.latency_ms_p50 if comparison else None,
        speedup=comparison.speedup.median if comparison else None,
        speedup_low=comparison.speedup.low if comparison else None,
        speedup_high=comparison.speedup.high if comparison else None,
        verdict=comparison.verdict if comparison else None,
        match_share=comparison.equivalence.match_share if comparison else None,
    )


def _peak_memory_gb(telemetry: TelemetryRecord) -> float | None:
    peak = telemetry.memory.peak_memory_bytes if telemetry.memory else None
    return None if peak is None else peak / BYTES_PER_GB


def _present(**figures: Any) -> dict[str, Any]:
    """Leave out what is not there: an absent figure is no key, never 0."""
    return {name: value for name, value in figures.items() if value is not None}
