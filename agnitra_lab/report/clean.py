"""The report as it may be shown: redacted before anything renders it."""

from __future__ import annotations

import json

from agnitra_lab.contracts.report import Report
from agnitra_lab.redact import redact


def redacted_report(report: Report) -> Report:
    """Give the same report with every string redacted; numbers are untouched."""
    value = report.model_dump(mode="json")
    redacted = redact(value)
    return report if redacted == value else Report.from_json(json.dumps(redacted))
