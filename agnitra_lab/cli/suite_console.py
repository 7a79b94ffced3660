"""What the suite's commands print: tables over its results, no computation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.measurement import Ratio
from agnitra_lab.contracts.suite import SuiteFigures, SuiteResult, SuiteSide
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from agnitra_lab.loop.suite import SuiteRun
    from agnitra_lab.loop.suite_table import Filed, Group

# Figures are compared along their row, so that no cell may be broken, however narrow the screen.
_MIN_WIDTH = 160


def print_start(device: DeviceInfo, directory: Path, names: Sequence[str]) -> None:
    """Say what runs where."""
    versions = f"torch {device.torch_version}" + (f", triton {device.triton_version}" if device.triton_version else "")
    _line(f"{len(names)} workloads on {device.name} ({versions}) -> {directory}")


def print_result(result: SuiteResult) -> None:
    """One line a finished workload."""
    times = f"{result.wall_s:.0f} s" + (f", {result.waited_s:.0f} s of it waiting" if result.waited_s >= 1 else "")
    if result.status == "failed":
        _line(f"failed  {result.workload} ({times}): {result.error}")
        return
    sides = [f"{side.name} {_ms(side)}" for side in _sides(result)]
    best = f"{result.best_baseline}{_flaw(result)}"
    verdict = f"{_ratio(result.speedup_vs_best)} of {best}, {_ratio(result.speedup_vs_eager)} of eager"
    _line(f"done    {result.workload} ({times}): {', '.join(sides)} ms; {verdict}; {result.winner}{_doubts(result)}")


def print_run(run: SuiteRun) -> None:
    """The figures of a run, where it is, and what is left of it."""
    from agnitra_lab.loop.suite_table import group_results

    for group in group_results(run.filed):
        _print_group(group)
    _line(f"Run: {run.directory}")
    if run.left:
        _line(f"Left, for want of time: {', '.join(run.left)}. Go on: add --resume {run.directory.name}")


def print_groups(groups: Sequence[Group], *, is_json: bool) -> None:
    """A table and its figures for each device and scale."""
    if not is_json:
        for group in groups:
            _print_group(group)
        return
    from agnitra_lab.loop.suite_table import row

    found = [
        {
            "device": group.device,
            "scale": group.scale,
            **group.figures.model_dump(mode="json"),
            "workloads": [row(filed) for filed in group.filed],
        }
        for group in groups
    ]
    sys.stdout.write(json.dumps({"groups": found}, indent=2) + "\n")


def print_warnings(warnings: Sequence[str]) -> None:
    """Name what was left out, apart from the results."""
    for text in warnings:
        sys.stderr.write(f"agnitra: {redact_text(text)}\n")


def _print_group(group: Group) -> None:
    names = list(dict.fromkeys(side.name for filed in group.filed for side in filed.result.baselines))
    table = Table(title=f"{escape(group.device)}, scale {group.scale}: ms a call", title_justify="left")
    table.add_column("workload", no_wrap=True)
    for name in (*names, "agnitra", "over eager", "over best"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("interval", "best", "winner"):
        table.add_column(name, no_wrap=True)
    for filed in group.filed:
        _add_row(table, filed, names)
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, _MIN_WIDTH)).print(table)
    for filed in group.filed:
        for note in _notes(filed.result):
            _line(f"{filed.result.workload}: {note}")
    for line in _sentences(group.figures):
        _line(line)


def _add_row(table: Table, filed: Filed, names: Sequence[str]) -> None:
    result = filed.result
    sides = {side.name: side for side in result.baselines}
    speedup = result.speedup_vs_best
    table.add_row(
        escape(result.workload),
        *(_ms(sides.get(name)) for name in names),
        _ms(result.candidate),
        _ratio(result.speedup_vs_eager),
        _ratio(speedup),
        f"{speedup.low:.3f} to {speedup.high:.3f}" if speedup else "-",
        f"{result.best_baseline or '-'}{_flaw(result)}",
        escape(f"{result.winner or result.status}{_doubts(result)}"),
    )


def _notes(result: SuiteResult) -> list[str]:
    notes = [f"failed: {result.error}"] if result.status == "failed" else []
    notes += [f"{side.name} failed and is not in the contest: {side.error}" for side in result.baselines if side.error]
    checked = result.candidate.equivalence if result.candidate else None
    if checked is not None and not checked.is_equivalent:
        notes.append(f"not equivalent: {'; '.join(checked.problems)}")
    notes += [
        f"{side.name} is not equivalent: {'; '.join(side.equivalence.problems)}"
        for side in (result.baselines if _flaw(result) else ())
        if side.equivalence is not None and not side.equivalence.is_equivalent
    ]
    if result.num_guard_misses:
        notes.append(f"the drop-in ran the original in {result.num_guard_misses} calls")
    return [note[:400] for note in notes]


def _sentences(figures: SuiteFigures) -> list[str]:
    counts = f"{figures.num_done} of {figures.num_workloads} workloads done, {figures.num_failed} failed"
    lines = [f"{counts}, {figures.num_not_equivalent} not equivalent, {figures.num_failed_baselines} baselines failed."]
    if figures.speedup_vs_best_geomean is None or figures.speedup_vs_best_worst is None:
        return lines
    lines.append(
        f"Over the best baseline: worst {figures.speedup_vs_best_worst:.3f}x ({figures.worst_workload}), "
        f"{figures.num_below_0_98} below 0.98 ({figures.num_surely_below_0_98} by the whole interval), "
        f"geometric mean {figures.speedup_vs_best_geomean:.3f}x "
        f"(algebra capped at 10: {figures.speedup_vs_best_geomean_capped:.3f}x), "
        f"{figures.num_at_least_1_15} at least 1.15x ({figures.share_at_least_1_15:.0%})."
    )
    if figures.num_inexact_best:
        lines.append(
            f"{figures.num_inexact_best} of these best baselines give other values than eager (marked *). Over the "
            f"best that do not: worst {figures.speedup_vs_best_exact_worst:.3f}x, {figures.num_exact_below_0_98} below "
            f"0.98, geometric mean {figures.speedup_vs_best_exact_geomean:.3f}x."
        )
    lines.append(
        f"Over eager: geometric mean {figures.speedup_vs_eager_geomean:.3f}x "
        f"(algebra capped at 10: {figures.speedup_vs_eager_geomean_capped:.3f}x)."
    )
    return lines


def _sides(result: SuiteResult) -> list[SuiteSide]:
    return [*result.baselines, *([result.candidate] if result.candidate else [])]


def _doubts(result: SuiteResult) -> str:
    return ", NOT EQUIVALENT" if result.status == "done" and not result.is_equivalent else ""


def _flaw(result: SuiteResult) -> str:
    """Mark a best baseline whose values fail the check that the candidate's have to pass."""
    from agnitra_lab.loop.suite_table import is_best_inexact

    return " *" if is_best_inexact(result) else ""


def _ms(side: SuiteSide | None) -> str:
    if side is None or side.latency is None:
        return "failed" if side is not None and side.error else "-"
    return f"{side.latency.latency_ms_p50:.4g}"


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.median:.3f}x" if ratio else "-"


def _line(text: str) -> None:
    sys.stdout.write(f"{redact_text(text)}\n")
    sys.stdout.flush()
