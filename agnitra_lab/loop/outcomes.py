"""What became of an earlier run's rewrites, in a few words each: measured feedback for the next question."""

from __future__ import annotations

from pathlib import Path

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.contracts.report import Report
from agnitra_lab.errors import UsageError

_REPORT = "report.json"
_WITHOUT, _WITH = "agnitra-", "agnitra:"


def read_report(path: str | Path) -> Report:
    """Read the report of a finished run.

    Args:
        path: its report.json, or the folder that holds it.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    file = Path(path)
    file = file / _REPORT if file.is_dir() else file
    try:
        return Report.from_json(file.read_bytes())
    except OSError as error:
        raise UsageError(
            f"The report {file.name} of the earlier run cannot be read: {error.strerror or error}.",
            hint="Give artifacts/reports/TOPIC/RUN, or its report.json.",
        ) from error


def of_actions(report: Report) -> dict[str, str]:
    """Say what was measured of each action: in the kept candidate, without it, or as a candidate of its own.

    Args:
        report: a finished run of the same workload.
    """
    outcomes: dict[str, str] = {}
    candidates = {result.name: result for result in report.candidates}
    whole = candidates.get(report.winner)
    for action in report.notes.applied:
        outcomes[action] = f"kept, in a candidate of {_speedup(whole)}"
    for suggestion in report.proposal.suggestions:
        outcomes.setdefault(suggestion.action, "tried or found to change nothing; not kept")
    for result in report.candidates:
        action = result.name.removeprefix(_WITHOUT)
        if action != result.name and action in ACTIONS and result.comparison is not None:
            outcomes[action] = f"{outcomes.get(action, 'tried')}; without it {_speedup(result)}"
        own = result.name.removeprefix(_WITH).replace("-", "_")
        if own in ACTIONS and result.status != "skipped":
            outcomes[own] = f"{result.status}, {_speedup(result)}"
    return outcomes


def _speedup(result: CandidateResult | None) -> str:
    if result is None or result.comparison is None:
        return "no measured speedup"
    return f"{result.comparison.speedup.median:.3f}x of {result.comparison.baseline} ({result.comparison.verdict})"
