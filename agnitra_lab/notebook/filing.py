"""A profiled cell as a run of its own, and finished runs found again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.read import RunEntry, list_runs
from agnitra_lab.runs.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

    from agnitra_lab.profiler.telemetry import Telemetry

RUN_COLUMNS = ("run_id", "category", "topic", "status", "generated_at", "path")


def file_profile(telemetry: Telemetry, *, artifacts: Path | str, command: str, config: Mapping[str, Any]) -> Path:
    """File a finished profile under profiles/.

    Args:
        telemetry: of the cell.
        artifacts: folder of the runs.
        command: the magic's line, for the record.
        config: the magic's options, for the record.

    Returns:
        The run's directory, with telemetry.json, events.parquet, summary.json and run.md.

    Raises:
        RunStoreError: when it cannot be written.
    """
    topic = telemetry.record.name or "cell"
    run = RunStore(artifacts).create("profile", topic, category="profiles")
    telemetry.save(run.directory("profiles"))
    meta = provenance.meta(
        run.run_id, "profile", topic, command=command, argv=sys.argv, seed=0, device=telemetry.record.device,
        config=config,
    )  # fmt: skip
    filed = summary.summarise(meta, summary.profile_results(telemetry.record))
    run.finish("profiles", filed, run_markdown(filed, f"Profile of the cell {topic}: where its time goes."))
    return run.directory("profiles")


def runs_frame(artifacts: Path | str) -> pd.DataFrame:
    """List the runs as a frame, newest first. Columns: `RUN_COLUMNS`."""
    import pandas as pd

    entries: list[RunEntry] = list_runs(artifacts)
    rows = [[str(getattr(entry, name) or "") for name in RUN_COLUMNS] for entry in entries]
    return pd.DataFrame(rows, columns=list(RUN_COLUMNS))
