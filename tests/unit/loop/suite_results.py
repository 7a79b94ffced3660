"""Results of the suite, as the tests of its table file them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.measurement import Equivalence, Latency, Ratio
from agnitra_lab.contracts.suite import SuiteResult, SuiteSide
from agnitra_lab.loop import suite_filing
from agnitra_lab.loop.suite_table import read_results
from agnitra_lab.runs.store import RunStore

H200 = DeviceInfo(type="cuda", name="NVIDIA H200")
EPYC = DeviceInfo(type="cpu", name="AMD EPYC")


def ratio(median: float) -> Ratio:
    """A ratio with an interval of one percent."""
    return Ratio(median=median, low=median * 0.99, high=median * 1.01)


def side(name: str, latency_ms: float | None, *, is_equivalent: bool | None = None) -> SuiteSide:
    """A contestant; one without a time has failed."""
    equivalence = None
    if is_equivalent is not None:
        equivalence = Equivalence(
            is_equivalent=is_equivalent, match_share=1.0 if is_equivalent else 0.5, required_share=0.999, rtol=1e-4,
            num_seeds=3, num_elements=100, max_abs_error=0.0, error_vs_fp64=1e-7, baseline_error_vs_fp64=1e-7,
            error_ratio=1.0, problems=() if is_equivalent else ("half of it is zero",),
        )  # fmt: skip
    if latency_ms is None:
        return SuiteSide(name=name, error="OutOfMemoryError: too large", equivalence=equivalence)
    latency = Latency(latency_ms_p50=latency_ms, latency_ms_p20=latency_ms, latency_ms_p80=latency_ms, num_samples=12)
    return SuiteSide(name=name, latency=latency, compile_s=3.0, equivalence=equivalence)


def done(
    workload: str, vs_best: float, *, vs_eager: float = 2.0, is_equivalent: bool = True, failed_mode: bool = False,
    **more: Any,
) -> SuiteResult:  # fmt: skip
    """A workload whose candidate takes 1 ms."""
    rivals = (side("eager", vs_eager), side("default", vs_best), side("max-autotune", None if failed_mode else 9.0))
    given = {"baselines": rivals, "scale": "full", "device": H200, "generated_at": "2026-11-26T12:00:00Z", **more}
    return SuiteResult(
        workload=workload, family="language", status="done", best_baseline="default",
        candidate=side("agnitra", 1.0, is_equivalent=is_equivalent), speedup_vs_best=ratio(vs_best),
        speedup_vs_eager=ratio(vs_eager), noise=ratio(1.0), winner="agnitra", **given,
    )  # fmt: skip


def inexact(workload: str) -> SuiteResult:
    """A workload whose fastest baseline takes half of the candidate's time and gives other values."""
    return done(workload, 0.5, baselines=(side("eager", 2.0), side("default", 0.5, is_equivalent=False)))


def failed(workload: str, **more: Any) -> SuiteResult:
    """A workload whose process crashed."""
    given = {"scale": "full", "device": H200, "generated_at": "2026-11-26T12:00:00Z", **more}
    return SuiteResult(workload=workload, family="language", status="failed", error="crash: SIGSEGV", **given)


def file_run(artifacts: Path, *results: SuiteResult, is_finished: bool = True) -> Path:
    """File results as a run of the suite."""
    run, _ = suite_filing.open_run(RunStore(artifacts), None, "full", H200)
    for result in results:
        suite_filing.file_result(run, result)
    directory = run.directory("perf")
    if is_finished:
        filed = read_results(directory, [])
        suite_filing.finish(run, filed, (), device=H200, command="agnitra suite run", config={})
    return directory
