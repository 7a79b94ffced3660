"""Reading the suite's results back: the newest of each workload and device, as rows and as the figures they come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.measurement import MAX_ERROR_RATIO, Equivalence, Ratio
from agnitra_lab.contracts.run import Manifest
from agnitra_lab.contracts.suite import EAGER, SuiteFigures, SuiteResult, SuiteSide
from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.runs import layout
from agnitra_lab.runs.read import load_manifest
from agnitra_lab.runs.store import describe_file
from agnitra_lab.workloads.suite import SUITE

TOPIC = "suite"
RESULTS_FOLDER = "workloads"
SLOWER, WORTH_IT, MOST_OF_ALGEBRA = 0.98, 1.15, 10.0
"""Below the first the optimiser made it slower; from the second on it is worth a change; algebra counts up to the
third."""


@dataclass(frozen=True)
class Filed:
    """A result and the run that it was read from."""

    run_id: str
    result: SuiteResult


@dataclass(frozen=True)
class Group:
    """The results of one device at one scale: ratios of different devices have no mean.

    Attributes:
        device: its name.
        scale: of the workloads.
        filed: in the suite's order.
        figures: what they come to.
    """

    device: str
    scale: str
    filed: tuple[Filed, ...]
    figures: SuiteFigures


def collect(
    artifacts: Path | str, runs: Sequence[str] = (), *, device: str | None = None
) -> tuple[list[Group], list[str]]:
    """Read the suite's runs.

    Args:
        artifacts: folder of the runs.
        runs: run ids or directories; by default all runs of the suite.
        device: keep devices of this type ("cpu", "cuda") or with this text in their name.

    Returns:
        The newest result of each workload on each device at each scale, grouped; and warnings that name each file or
        run that is damaged or incomplete.

    Raises:
        UsageError: a run that was named is not there.
    """
    newest: dict[tuple[str, str, str], Filed] = {}
    warnings: list[str] = []
    for directory in _directories(Path(artifacts), runs):
        for filed in read_results(directory, warnings):
            result = filed.result
            if _is_on(result, device):
                key = (_device_name(result), result.scale, result.workload)
                newest[key] = max(newest.get(key, filed), filed, key=_age)
    return group_results(newest.values()), warnings


def group_results(filed: Iterable[Filed]) -> list[Group]:
    """Group results by device and scale, each group in the suite's order."""
    places = {name: place for place, name in enumerate(SUITE)}
    groups: dict[tuple[str, str], list[Filed]] = {}
    for entry in sorted(filed, key=lambda entry: places.get(entry.result.workload, len(places))):
        groups.setdefault((_device_name(entry.result), entry.result.scale), []).append(entry)
    return [
        Group(name, scale, tuple(rows), figures([row.result for row in rows]))
        for (name, scale), rows in sorted(groups.items())
    ]


def read_results(directory: Path, warnings: list[str]) -> list[Filed]:
    """Read the results of one run; what cannot be trusted is left out and named in `warnings`."""
    manifest: Manifest | None = None
    if (directory / layout.MANIFEST_FILE).exists():
        try:
            manifest = load_manifest(directory)
        except AgnitraError as error:
            warnings.append(f"{directory} is damaged and skipped: {error.message}")
            return []
    found = []
    for path in sorted((directory / RESULTS_FOLDER).glob("*.json")):
        try:
            problem = _changed(path, directory, manifest)
            result = SuiteResult.from_json(path.read_bytes())
        except (AgnitraError, OSError) as error:
            problem, result = getattr(error, "message", str(error)), None
        if problem or result is None:
            warnings.append(f"{path} is damaged and skipped: {problem}")
        else:
            found.append(Filed(directory.name, result))
    if manifest is None:
        what = f"its {len(found)} finished workloads count" if found else "no workload of it is finished"
        warnings.append(f"{directory} has no manifest (cut short, or still going on): {what}")
    return found


def figures(results: Sequence[SuiteResult]) -> SuiteFigures:
    """Reduce results of one device to the figures that the optimiser is judged by."""
    counted = [result for result in results if result.status == "done" and result.is_equivalent]
    vs_best = [(result, result.speedup_vs_best) for result in counted if result.speedup_vs_best is not None]
    vs_eager = [(result, result.speedup_vs_eager) for result in counted if result.speedup_vs_eager is not None]
    worst = min(vs_best, key=lambda pair: pair[1].median, default=None)
    num_worth_it = sum(ratio.median >= WORTH_IT for _, ratio in vs_best)
    of_best = [(result, ratio.median) for result, ratio in vs_best]
    of_eager = [(result, ratio.median) for result, ratio in vs_eager]
    of_exact = [_vs_best_exact(result, ratio) for result, ratio in vs_best]
    return SuiteFigures(
        num_workloads=len(results),
        num_done=sum(result.status == "done" for result in results),
        num_failed=sum(result.status == "failed" for result in results),
        num_not_equivalent=sum(result.status == "done" and not result.is_equivalent for result in results),
        num_failed_baselines=sum(side.latency is None for result in results for side in result.baselines),
        speedup_vs_best_worst=worst[1].median if worst else None,
        worst_workload=worst[0].workload if worst else None,
        num_below_0_98=sum(ratio.median < SLOWER for _, ratio in vs_best),
        num_surely_below_0_98=sum(ratio.high < SLOWER for _, ratio in vs_best),
        num_at_least_1_15=num_worth_it,
        share_at_least_1_15=num_worth_it / len(results) if results else None,
        num_inexact_best=sum(is_best_inexact(result) for result, _ in vs_best),
        speedup_vs_best_exact_worst=min(of_exact, default=None),
        num_exact_below_0_98=sum(ratio < SLOWER for ratio in of_exact),
        speedup_vs_best_exact_geomean=_geomean(of_exact),
        speedup_vs_best_geomean=_geomean([ratio for _, ratio in of_best]),
        speedup_vs_eager_geomean=_geomean([ratio for _, ratio in of_eager]),
        speedup_vs_best_geomean_capped=_geomean([_capped(*pair) for pair in of_best]),
        speedup_vs_eager_geomean_capped=_geomean([_capped(*pair) for pair in of_eager]),
    )


def best_exact(sides: Sequence[SuiteSide]) -> SuiteSide | None:
    """Return the fastest baseline whose values are right; None where a faster one was not checked.

    That its result has other strides, or is overwritten by its next call, costs a baseline nothing here.
    """
    timed = [side for side in sides if side.latency is not None]
    for side in sorted(timed, key=lambda side: side.latency.latency_ms_p50 if side.latency else 0.0):
        if side.name == EAGER or (side.equivalence is not None and _has_right_values(side.equivalence)):
            return side
        if side.equivalence is None:
            return None
    return None


def _has_right_values(checked: Equivalence) -> bool:
    is_near = checked.error_ratio is None or checked.error_ratio <= MAX_ERROR_RATIO
    return checked.is_equivalent or (checked.match_share >= checked.required_share and is_near)


def is_best_inexact(result: SuiteResult) -> bool:
    """Whether the best baseline gives other values than eager, as far as that is known."""
    found = best_exact(result.baselines)
    return found is not None and found.name != result.best_baseline


def _vs_best_exact(result: SuiteResult, vs_best: Ratio) -> float:
    found, ours = best_exact(result.baselines), result.candidate.latency if result.candidate else None
    if not is_best_inexact(result) or found is None or found.latency is None or ours is None:
        return vs_best.median
    return found.latency.latency_ms_p50 / ours.latency_ms_p50


def row(filed: Filed) -> dict[str, Any]:
    """Flatten a result into figures by names that end in their unit; what is not known is no key."""
    result, sides = filed.result, {side.name: side for side in _sides(filed.result)}
    found: dict[str, Any] = {"workload": result.workload, "family": result.family, "status": result.status}
    for name, side in sides.items():
        key = name.replace("-", "_")
        if side.latency is not None:
            found[f"{key}_latency_ms_p50"] = side.latency.latency_ms_p50
            found[f"{key}_device_ms_p50"] = side.latency.device_ms_p50
        found[f"{key}_compile_s"] = side.compile_s
    for name in ("speedup_vs_eager", "speedup_vs_best", "noise"):
        ratio = getattr(result, name)
        if ratio is not None:
            found |= {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    checked = result.candidate.equivalence if result.candidate else None
    if checked is not None:
        found |= {"match_share": checked.match_share, "error_ratio": checked.error_ratio}
    exact = best_exact(result.baselines)
    found |= {
        "is_equivalent": result.is_equivalent,
        "best_baseline": result.best_baseline,
        "best_exact_baseline": exact.name if exact else None,
        "winner": result.winner,
        "floor_share": result.floor_share,
        "num_guard_misses": result.num_guard_misses,
        "error": result.error,
        "run_id": filed.run_id,
    }
    return {name: value for name, value in found.items() if value is not None}


def _directories(artifacts: Path, runs: Sequence[str]) -> Iterator[Path]:
    folder = artifacts / "perf" / TOPIC
    if not runs:
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.is_dir() and layout.is_run_id(path.name))
        return
    for run in runs:
        found = next((path for path in (folder / run, Path(run)) if (path / RESULTS_FOLDER).is_dir()), None)
        if found is None:
            raise UsageError(f"No run {run!r} of the suite under {folder}.", hint="List them: agnitra runs")
        yield found


def _changed(path: Path, directory: Path, manifest: Manifest | None) -> str | None:
    if manifest is None:
        return None
    have = describe_file(path, directory)
    return None if have in manifest.files else "it differs from the run's manifest"


def _sides(result: SuiteResult) -> list[SuiteSide]:
    return [*result.baselines, *([result.candidate] if result.candidate else [])]


def _is_on(result: SuiteResult, device: str | None) -> bool:
    if device is None:
        return True
    has_type = result.device is not None and result.device.type == device
    return has_type or device.lower() in _device_name(result).lower()


def _device_name(result: SuiteResult) -> str:
    return result.device.name if result.device else "unknown device"


def _age(filed: Filed) -> tuple[str, str]:
    return filed.result.generated_at, filed.run_id


def _capped(result: SuiteResult, ratio: float) -> float:
    return min(ratio, MOST_OF_ALGEBRA) if result.is_algebra else ratio


def _geomean(ratios: Sequence[float]) -> float | None:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None
