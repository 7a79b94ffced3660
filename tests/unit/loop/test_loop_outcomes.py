"""What an earlier run measured of its rewrites, as the language model is told it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import outcomes

ROOT = Path(__file__).parents[3]
REPORTS = sorted((ROOT / "artifacts" / "reports").glob("*/*/report.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_every_committed_run_says_what_became_of_its_actions(path: Path) -> None:
    report = outcomes.read_report(path.parent)
    told = outcomes.of_actions(report)
    assert set(told) <= set(ACTIONS)
    assert {suggestion.action for suggestion in report.proposal.suggestions} <= set(told)
    assert all(told[action].startswith("kept") for action in report.notes.applied if action != "cuda_graph")
    assert all(text.isprintable() and len(text) < 200 for text in told.values())


def test_what_the_candidate_was_without_an_action_is_told_beside_it() -> None:
    document = json.loads(REPORTS[-1].read_text())
    whole = next(row for row in document["candidates"] if row["comparison"])
    applied = next(name for name in ACTIONS if ACTIONS[name].kind == "rewrite")
    document["notes"]["applied"] = [applied]
    document["candidates"] = [{**whole, "name": "agnitra"}, {**whole, "name": f"agnitra-{applied}"}]
    document["winner"] = "agnitra"
    told = outcomes.of_actions(outcomes.Report.from_json(json.dumps(document)))
    speedup = f"{whole['comparison']['speedup']['median']:.3f}x"
    assert told[applied].count(speedup) == 2
    assert "without it" in told[applied]


def test_a_report_that_is_not_there_is_a_usage_error_with_the_way(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.json.*artifacts/reports"):
        outcomes.read_report(tmp_path)


def test_a_file_that_is_no_report_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="Not a valid Report"):
        outcomes.read_report(tmp_path)
