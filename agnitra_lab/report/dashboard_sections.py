"""What the dashboard says, as text: its tiles, and each table's cells. Nothing here is markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from agnitra_lab.report import numbers
from agnitra_lab.report.dashboard_record import Dashboard, RunRow, SearchCurve, SuiteGroup
from agnitra_lab.report.sections import VERDICT_WORDS

SLOWER, WORTH_IT = 0.98, 1.15
_RANK = ("reports", "bench", "perf", "profiles", "cmaes", "certs")


@dataclass(frozen=True)
class Tile:
    """One hero figure."""

    label: str
    value: str
    note: str
    state: Literal["better", "unchanged", "worse"] = "unchanged"


@dataclass(frozen=True)
class RunGroup:
    """One run with all directories that it wrote: one optimisation writes six.

    Attributes:
        run_id: its id.
        rows: its directories, the one that says most first.
    """

    run_id: str
    rows: tuple[RunRow, ...]

    @property
    def lead(self) -> RunRow:
        """The directory that says most."""
        return self.rows[0]

    @property
    def status(self) -> str:
        """The worst status of its directories."""
        statuses = {row.status for row in self.rows}
        return next(status for status in ("damaged", "incomplete", "complete") if status in statuses)

    @property
    def figure(self) -> str:
        """The figure that tells most of it, in words."""
        return next((text for row in self.rows if (text := key_figure(row.figures))), "")


def run_groups(runs: Sequence[RunRow]) -> list[RunGroup]:
    """Put the directories of each run together, keeping the order."""
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in runs:
        groups.setdefault((row.run_id, row.topic), []).append(row)
    return [RunGroup(run_id, tuple(sorted(rows, key=_rank))) for (run_id, _), rows in groups.items()]


def key_figure(figures: Mapping[str, Any]) -> str:
    """The figure of a run that tells most, in words; empty when none is known."""
    speedup, low, high = (_number(figures, name) for name in ("speedup", "speedup_low", "speedup_high"))
    if speedup is not None and low is not None and high is not None:
        against = f" over {figures['baseline']}" if "baseline" in figures else ""
        verdict = VERDICT_WORDS.get(figures.get("verdict", ""), "")
        words = f", {verdict.lower()}" if verdict else ""
        return f"{numbers.times(speedup)} {numbers.interval(low, high)}{against}{words}"
    mean = _number(figures, "speedup_vs_best_geomean")
    if mean is not None:
        counted = figures.get("num_done", 0) - figures.get("num_not_equivalent", 0)
        return f"{numbers.times(mean)} over the best baseline, geometric mean of {counted:.0f}"
    latency = _number(figures, "latency_ms")
    if latency is not None:
        return f"{numbers.milliseconds(latency)} a call"
    searches = _number(figures, "num_searches")
    if searches is not None:
        return f"{searches:.0f} kernel searches"
    count = sum(_number(figures, name) is not None for name in figures)
    return f"{count} figures" if count else ""


def tiles(record: Dashboard) -> list[Tile]:
    """The hero figures."""
    return [
        tile
        for tile in (
            _latest_tile(record), _suite_tile(record), _regressions_tile(record), _savings_tile(record),
            _checks_tile(record), _runs_tile(record),
        )
        if tile is not None
    ]  # fmt: skip


def short_time(row: RunRow) -> str:
    """When a run was made: "2026-11-26 17:01", from its summary or from its name."""
    if row.generated_at:
        return row.generated_at[:16].replace("T", " ")
    stamp = row.run_id
    if len(stamp) >= 13 and stamp[:8].isdigit():
        return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}"
    return ""


def general(value: float | None) -> str:
    """A figure of two compared runs, as `agnitra regressions` prints it."""
    return "missing" if value is None else f"{value:.6g}"


def microseconds(value_ms: float | None) -> str:
    """A kernel's time, as `agnitra refine` prints it."""
    return "none" if value_ms is None else f"{value_ms * 1e3:.2f} us"


def best_so_far(search: SearchCurve) -> list[float | None]:
    """The fastest config after each measurement."""
    best: float | None = None
    found = []
    for latency in search.latencies_ms:
        best = latency if best is None or (latency is not None and latency < best) else best
        found.append(best)
    return found


def suite_sentences(group: SuiteGroup) -> str:
    """What a group of the suite comes to."""
    figures = group.figures
    counts = (
        f"{figures.num_done} of {figures.num_workloads} workloads done, {figures.num_failed} failed, "
        f"{figures.num_not_equivalent} not equivalent, {figures.num_failed_baselines} baselines failed."
    )
    if figures.speedup_vs_best_geomean is None or figures.speedup_vs_best_worst is None:
        return counts
    over_eager = figures.speedup_vs_eager_geomean
    eager = f"; over eager {over_eager:.3f}x" if over_eager is not None else ""
    return (
        f"{counts} Over the best baseline: geometric mean {figures.speedup_vs_best_geomean:.3f}x, worst "
        f"{figures.speedup_vs_best_worst:.3f}x ({figures.worst_workload}), {figures.num_below_0_98} below {SLOWER}, "
        f"{figures.num_at_least_1_15} at least {WORTH_IT}x{eager}."
    )


def _latest_tile(record: Dashboard) -> Tile | None:
    row = next((row for row in record.runs if row.category == "reports" and "winner" in row.figures), None)
    if row is None:
        num_bad = sum(row.category == "reports" and row.status != "complete" for row in record.runs)
        note = f"{_count(num_bad, 'report is', 'reports are')} incomplete or damaged." if num_bad else ""
        return Tile("Latest optimisation", "none", note or "Make one: agnitra demo")
    figures = row.figures
    place = f"{row.topic} on {row.device}, {short_time(row)}"
    if figures["winner"] == figures.get("baseline"):
        return Tile("Latest optimisation", "No change", f"{place}. The original was kept.")
    speedup = _number(figures, "speedup") or 1.0
    low, high = _number(figures, "speedup_low") or speedup, _number(figures, "speedup_high") or speedup
    note = f"{figures['winner']} over {figures.get('baseline')} {numbers.interval(low, high)}: {place}"
    return Tile("Latest optimisation", numbers.times(speedup), note, "better")


def _suite_tile(record: Dashboard) -> Tile | None:
    group = max(record.suite, key=lambda group: (group.scale == "full", group.figures.num_done), default=None)
    if group is None or group.figures.speedup_vs_best_geomean is None:
        return None
    figures, mean = group.figures, group.figures.speedup_vs_best_geomean
    note = (
        f"geometric mean of {figures.num_done - figures.num_not_equivalent} workloads on {group.device} "
        f"({group.scale}); "
        f"worst {numbers.times(figures.speedup_vs_best_worst or 0.0)}"
    )
    state: Literal["better", "worse", "unchanged"] = (
        "better" if mean > 1.0 else "worse" if mean < SLOWER else "unchanged"
    )
    return Tile("Suite, over the best baseline", numbers.times(mean), note, state)


def _regressions_tile(record: Dashboard) -> Tile:
    num_regressed = sum(pair.found.verdict == "regressed" for pair in record.pairs)
    if not record.pairs:
        return Tile("Regressions", "none to see", "No topic has two runs on one device yet.")
    note = f"of {_count(len(record.pairs), 'comparison')} of a topic's newest run with the one before it"
    return Tile("Regressions", str(num_regressed), note, "worse" if num_regressed else "better")


def _savings_tile(record: Dashboard) -> Tile | None:
    """What the newest receipt of each topic and device saves. A run that kept the original adds 0."""
    newest: dict[tuple[str, str | None], RunRow] = {}
    for row in record.runs:
        if row.category == "reports" and "cost_savings" in row.figures:
            newest.setdefault((row.topic, row.device), row)
    if not newest:
        return None
    rows = list(newest.values())
    currencies = {str(row.figures.get("currency", "")) for row in rows}
    hours = sum((Decimal(str(row.figures.get("gpu_hours_saved", 0))) for row in rows), Decimal())
    note = f"{numbers.hours(hours)} of device time, by the newest receipts of {_count(len(rows), 'workload')}"
    if len(currencies) != 1:
        return Tile("Saved", numbers.hours(hours), note)
    money = sum((Decimal(str(row.figures["cost_savings"])) for row in rows), Decimal())
    return Tile("Saved", numbers.money(money, currencies.pop()), note, "better" if money > 0 else "unchanged")


def _checks_tile(record: Dashboard) -> Tile | None:
    certs = [row for row in record.runs if row.category == "certs" and "is_equivalent" in row.figures]
    verdicts = [bool(row.figures["is_equivalent"]) for row in certs]
    # A workload that failed was not checked: it stands in the suite's counts.
    rows = [row for group in record.suite for row in group.workloads if row.get("status") == "done"]
    verdicts += [bool(row.get("is_equivalent")) for row in rows]
    if not verdicts:
        return None
    state: Literal["better", "worse"] = "better" if all(verdicts) else "worse"
    note = "certificates and suite workloads whose outputs are those of eager"
    return Tile("Outputs equivalent", f"{sum(verdicts)} of {len(verdicts)}", note, state)


def _runs_tile(record: Dashboard) -> Tile:
    counts = {status: sum(row.status == status for row in record.runs) for status in ("incomplete", "damaged")}
    bad = sum(counts.values())
    num_runs = len(run_groups(record.runs))
    note = (
        f"in {_count(len(record.runs), 'directory', 'directories')}; {counts['incomplete']} incomplete, "
        f"{counts['damaged']} damaged"
    )
    return Tile("Runs", str(num_runs), note, "worse" if bad else "unchanged")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    value = figures.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _rank(row: RunRow) -> int:
    return _RANK.index(row.category) if row.category in _RANK else len(_RANK)
