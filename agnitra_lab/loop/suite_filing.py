"""The suite's folder, `artifacts/perf/suite/<run_id>/`: one file a workload as it finishes, the summary at the end."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.run import Category, Results
from agnitra_lab.contracts.suite import SuiteResult
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import suite_table
from agnitra_lab.loop.suite_table import RESULTS_FOLDER, TOPIC, Filed
from agnitra_lab.runs import layout, provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import Run, RunStore
from agnitra_lab.workloads.target import OWN

CATEGORY: Category = "perf"
LATEST = "latest"


def open_run(
    store: RunStore, resume: str | None, scale: str, device: DeviceInfo, *, is_retrying: bool = False
) -> tuple[Run, set[str]]:
    """Begin a run of the suite, or go on with one.

    Args:
        store: the artifacts folder.
        resume: a run id, "latest", or None for a new run.
        scale, device: of this invocation; a run holds results of one scale and device.
        is_retrying: what failed is to run again.

    Returns:
        The run, and the workloads that need no second run.

    Raises:
        UsageError: there is no such run, or it was made at another scale or on another device; it is left as it is.
        RunStoreError: the folder cannot be written.
    """
    if resume is None:
        return store.create(TOPIC, TOPIC, category=CATEGORY), set()
    directory = _directory_of(store.root, resume)
    results = [filed.result for filed in suite_table.read_results(directory, [])]
    for result in results:
        name = result.device.name if result.device else "an unknown device"
        if (result.scale if result.scale != OWN else scale, name) != (scale, device.name):
            raise UsageError(
                f"Run {directory.name} holds results of scale {result.scale} on {name}; this is {scale} on "
                f"{device.name}.",
                hint="Start another run: leave out --resume.",
            )
    done = {result.workload for result in results if result.status == "done" or not is_retrying}
    return store.reopen(directory.name, TOPIC, category=CATEGORY), done


def file_result(run: Run, result: SuiteResult) -> Path:
    """Write one workload's result, whole or not at all."""
    return run.write_json(CATEGORY, f"{RESULTS_FOLDER}/{_file_stem(result.workload)}.json", result)


def file_log(run: Run, workload: str, text: str) -> Path:
    """Write the last words of a process that failed."""
    return run.write_text(CATEGORY, f"logs/{_file_stem(workload)}.txt", text)


def _file_stem(workload: str) -> str:
    return re.sub(r"[^\w.-]+", "-", workload)


def finish(
    run: Run, filed: Sequence[Filed], left: Sequence[str], *, device: DeviceInfo, command: str,
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write summary.json, run.md and the manifest over all results that the run holds.

    Args:
        run: the run.
        filed: its results.
        left: workloads that were chosen and are not among them.
        device: where they ran.
        command, config: of the last invocation.
    """
    meta = provenance.meta(
        run.run_id, "perf", TOPIC, command=command, argv=sys.argv, seed=0, device=device, config=config
    )  # fmt: skip
    figures = suite_table.figures([entry.result for entry in filed]).model_dump(mode="json", exclude_none=True)
    figures |= {"num_left": len(left), "workloads": [suite_table.row(entry) for entry in filed]}
    found = summary.summarise(meta, Results(**figures))
    why = "The optimiser's result against eager and torch.compile's modes, raw and in one loop, for each workload."
    run.finish(CATEGORY, found, run_markdown(found, why))


def _directory_of(root: Path, resume: str) -> Path:
    """Find the run to go on with; "latest" takes the newest, finished or not."""
    folder = root / CATEGORY / TOPIC
    names = [path.name for path in folder.glob("*") if path.is_dir() and layout.is_run_id(path.name)]
    if resume == LATEST and names:
        return folder / max(names)
    if resume not in names:
        raise UsageError(f"No run {resume!r} of the suite under {folder}.", hint="Start one: agnitra suite run")
    return folder / resume
