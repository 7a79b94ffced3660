"""What the shell prints: Rich tables over contracts, no computation. `--json` prints the contract itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.contracts.report import Checkpoint, Report
from agnitra_lab.contracts.search import SearchResult, Trial
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from agnitra_lab.loop import Result
    from agnitra_lab.profiler.telemetry import Telemetry
    from agnitra_lab.runs.read import RunEntry
    from agnitra_lab.runs.regressions import Regressions

_console = Console(highlight=False, soft_wrap=True)
TEAL, ORANGE, MUTED = "#2EE6D6", "#E69F00", "bright_black"
_MARKS = {
    "done": f"[{TEAL}]done[/]",
    "skipped": f"[{MUTED}]skipped[/]",
    "fallback": f"[{ORANGE}]fallback[/]",
    "failed": "[red]failed[/]",
}


def print_start(workload: Workload, device: DeviceInfo) -> None:
    """Say what runs where."""
    versions = f"torch {device.torch_version}" + (f", triton {device.triton_version}" if device.triton_version else "")
    _line(f"[bold]{escape(workload.name)}[/] on {escape(device.name)} ({versions})")


def print_checkpoint(point: Checkpoint) -> None:
    """One line a finished stage."""
    mark = _MARKS[point.status]
    _line(f"{mark} [bold]{point.stage:<9}[/] [{MUTED}]{point.wall_s:5.1f} s[/]  {escape(redact_text(point.headline))}")


def print_result(result: Result) -> None:
    """The summary of a finished loop, ending with the paths of the card and the JSON."""
    print_report(result.report, result.card_path, result.json_path)


def print_report(report: Report, card_path: Path, json_path: Path) -> None:
    """Every candidate, the receipt, the verdict, and the paths."""
    _print_candidates(report)
    _print_receipt(report)
    print_comparison(report, is_json=False, paths=())
    _line(f"Report card: {card_path}")
    _line(f"JSON:        {json_path}")


def print_comparison(report: Report, *, is_json: bool, paths: Sequence[Path]) -> None:
    """Baseline against candidate: latency, items/s, speed-up with its interval, equivalence, what to do next."""
    from agnitra_lab.report.assemble import guidance
    from agnitra_lab.report.sections import break_even

    comparison = report.comparison
    if is_json:
        _print_json(comparison)
        return
    unit = comparison.item_unit
    table = Table("", comparison.baseline, comparison.candidate, title=escape(report.title), title_justify="left")
    before, after = comparison.baseline_latency, comparison.candidate_latency
    table.add_row("latency p50", f"{before.latency_ms_p50:.3f} ms", f"{after.latency_ms_p50:.3f} ms")
    table.add_row(
        "p20 to p80",
        f"{before.latency_ms_p20:.3f} to {before.latency_ms_p80:.3f}",
        f"{after.latency_ms_p20:.3f} to {after.latency_ms_p80:.3f}",
    )
    table.add_row(
        f"{unit}/s", f"{comparison.baseline_items_per_second:,.1f}", f"{comparison.candidate_items_per_second:,.1f}"
    )
    speedup, noise, equivalence = comparison.speedup, comparison.noise, comparison.equivalence
    table.add_row("speed-up", "1", f"{speedup.median:.3f}x  [{speedup.low:.3f}, {speedup.high:.3f}]")
    table.add_row("noise (A/A)", f"[{noise.low:.3f}, {noise.high:.3f}]", "")
    table.add_row(
        "equivalence", "reference", f"{equivalence.match_share:.4%} of elements ({equivalence.num_seeds} seeds)"
    )
    if equivalence.error_vs_fp64 is not None and equivalence.baseline_error_vs_fp64 is not None:
        table.add_row("error vs fp64", f"{equivalence.baseline_error_vs_fp64:.2e}", f"{equivalence.error_vs_fp64:.2e}")
    _console.print(table)
    _line(f"[bold]{escape(report.headline)}[/]")
    if report.against_best is not None:
        rival = report.against_best
        _line(
            f"Head to head with {rival.baseline}: {rival.speedup.median:.3f}x "
            f"[{rival.speedup.low:.3f}, {rival.speedup.high:.3f}], {rival.verdict.replace('_', ' ')}."
        )
    cost = break_even(report)
    if cost is not None:
        _line(f"Pays for itself {escape(cost)}.")
    for problem in equivalence.problems:
        _line(f"[{ORANGE}]{escape(problem)}[/]")
    _line(escape(guidance(report)))
    for path in paths:
        _line(f"JSON: {path}")


def print_telemetry(telemetry: Telemetry, directory: Path, target: str, *, is_json: bool) -> None:
    """The node table, who spent the time, the bottleneck, and the next step."""
    record = telemetry.record
    if is_json:
        _print_json(record)
        return
    table = Table(
        "node", "module", "ms", "share", "calls", title=f"Where the time goes: {escape(record.name or target)}"
    )
    for node in record.nodes[:12]:
        name = f"{node.node.split(' + ')[0]} +{node.num_nodes - 1}" if node.node and node.num_nodes > 1 else node.node
        table.add_row(
            escape(name or node.op or "-"), escape(node.module_path or "-"), f"{node.latency_ms:.3f}",
            f"{node.share:.1%}", str(node.num_calls),
        )  # fmt: skip
    _console.print(table)
    spent: dict[str, float] = {}
    for spot in record.hotspots:
        place = f"{spot.place} x{spot.num_places}" if spot.num_places > 1 else spot.place
        spent[place] = spent.get(place, 0.0) + spot.share
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:6]
    _line(f"By layer: {escape(', '.join(f'{place} {share:.1%}' for place, share in ranked))}")
    if record.owners is not None:
        owners = record.owners
        _line(
            f"graph nodes {owners.fx_node:.1%} (exact {owners.exact_node:.1%}), parameter gradients "
            f"{owners.param_grad:.1%}, optimiser {owners.optimizer:.1%}, outside the graph {owners.outside_graph:.1%}, "
            f"residual {owners.residual:.1%}"
        )
    if record.gpu.idle is not None and record.gpu.idle.launch_bound_share is not None:
        _line(f"The GPU waited for the host {record.gpu.idle.launch_bound_share:.0%} of the profiled time.")
    for note in (record.gpu.reason, record.graph_note, *record.notes):
        if note:
            _line(f"[{MUTED}]{escape(note)}[/]")
    _line(escape(repr(telemetry)))
    _line(f"Telemetry: {directory / 'telemetry.json'}")
    _line(f"Next: agnitra benchmark {escape(target)}")


def print_trial(trial: Trial) -> None:
    """One line a measurement, as it ends."""
    shown = f"{trial.latency_ms * 1e3:9.2f} us" if trial.latency_ms else f"[{ORANGE}]{trial.failure or 'failed':>12}[/]"
    _line(f"[{MUTED}]{trial.index + 1:4}[/] {shown}  {escape(trial.config.key())}")


def print_search(result: SearchResult, optimum_ms: float | None, *, is_json: bool) -> None:
    """How a search went, against the optimum of the space where it is known."""
    if is_json:
        _print_json(result)
        return
    num_failed = sum(trial.status == "failed" for trial in result.trials)
    _line(
        f"{result.space_template}, {result.measured_on}: {len(result.trials)} of {result.num_configs} configs measured "
        f"by {result.sampler}, {num_failed} failed, ended by {result.stopped_because}."
    )
    for name, share in result.trust.items():
        _line(f"[{MUTED}]trust[/] {share:6.1%}  {escape(name)}")
    if result.best and result.best.latency_ms:
        above = (
            "" if optimum_ms is None else f", {result.best.latency_ms / optimum_ms - 1:.1%} above the recorded optimum"
        )
        _line(f"[bold]Best {result.best.latency_ms * 1e3:.2f} us[/]{above}: {escape(result.best.config.key())}")


def print_samplers() -> None:
    """What can be searched with, best first."""
    from agnitra_lab.refine.sampler import SAMPLERS

    table = Table("sampler", "what it does", "median measurements to 2%: with siblings / cold", "needs")
    for name, info in SAMPLERS.items():
        table.add_row(name, info.summary, info.rank, f"agnitra-lab[{info.extra}]" if info.extra else "")
    _console.print(table)


def print_runs(entries: Sequence[RunEntry], artifacts: Path, *, is_json: bool) -> None:
    """One line a run directory."""
    if is_json:
        rows = [
            {"run_id": e.run_id, "category": e.category, "topic": e.topic, "status": e.status, "path": str(e.path)}
            for e in entries
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    if not entries:
        _line(f"No runs under {artifacts}. Make one: agnitra demo")
        return
    table = Table("run", "category", "topic", "status")
    for entry in entries:
        table.add_row(escape(entry.run_id), escape(entry.category), escape(entry.topic), entry.status)
    _console.print(table)


def print_regressions(found: Regressions, *, is_json: bool) -> None:
    """One row a figure, and the verdict."""
    if is_json:
        _print_json(found)
        return
    table = Table("figure", "baseline", "candidate", "change", "verdict")
    for change in found.metrics:
        table.add_row(
            change.metric, _figure(change.baseline), _figure(change.candidate),
            "-" if change.relative_change is None else f"{change.relative_change:+.1%}", change.verdict,
        )  # fmt: skip
    _console.print(table)
    _line(f"[bold]{found.verdict}[/] {escape(found.note or '')}")


def _print_candidates(report: Report) -> None:
    table = Table(
        "candidate", "verdict", "compile s", "latency ms", "speed-up", title="Candidates", title_justify="left"
    )
    for result in report.candidates:
        comparison = result.comparison
        table.add_row(
            escape(result.name),
            _verdict(result),
            "-" if result.compile_s is None else f"{result.compile_s:.1f}",
            f"{comparison.candidate_latency.latency_ms_p50:.3f}" if comparison else "-",
            f"{comparison.speedup.median:.2f}x" if comparison else escape(result.reason[:60]),
        )
    _console.print(table)


def _verdict(result: CandidateResult) -> str:
    """The word that explains the row: a candidate may be faster and still not be the one that is kept."""
    if result.status == "rejected" and result.comparison is not None:
        return result.comparison.verdict.replace("_", " ")
    return result.status


def _print_receipt(report: Report) -> None:
    usage = report.usage
    _line(
        f"Receipt for {usage.tokens_processed:,} {report.comparison.item_unit} at {report.price_per_gpu_hour:.2f} "
        f"{usage.currency}/h: {usage.gpu_hours_before} -> {usage.gpu_hours_after} hours, saves {usage.cost_savings} "
        f"{usage.currency}; bills {usage.total_billable} {usage.currency}."
    )


def _figure(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


def _print_json(contract: Any) -> None:
    sys.stdout.write(contract.to_json() + "\n")


def _line(text: str) -> None:
    _console.print(text)
