"""Commands around the loop: report, runs, regressions, schemas."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import Artifacts, Json
from agnitra_lab.errors import RunStoreError, UsageError

RunPath = Annotated[Path, typer.Argument(help="A run directory, or its summary.json.")]


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="Run id or directory; by default the newest.")] = None,
    is_json: Json = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Show a finished run again, and where its card and JSON are."""
    from agnitra_lab.cli import console
    from agnitra_lab.runs.read import find_report

    entry, found = find_report(artifacts, run)
    if is_json:
        sys.stdout.write(found.to_json() + "\n")
    else:
        console.print_report(found, entry.path / "report.html", entry.path / "report.json")
    return 0


@app.command()
def runs(is_json: Json = False, artifacts: Artifacts = Path("artifacts")) -> int:
    """List the runs under the artifacts folder, with what is incomplete or damaged."""
    from agnitra_lab.cli import console
    from agnitra_lab.runs.read import list_runs

    console.print_runs(list_runs(artifacts), artifacts, is_json=is_json)
    return 0


@app.command()
def regressions(
    baseline: Annotated[Path, typer.Option("-b", "--baseline", help="Known-good run directory or summary.json.")],
    candidate: Annotated[Path, typer.Option("-c", "--candidate", help="New run directory or summary.json.")],
    throughput_rel: Annotated[float, typer.Option(min=0.0)] = 0.05,
    latency_rel: Annotated[float, typer.Option(min=0.0)] = 0.05,
    tflops_rel: Annotated[float, typer.Option(min=0.0)] = 0.05,
    memory_rel: Annotated[float, typer.Option(min=0.0)] = 0.05,
    loss_abs: Annotated[float | None, typer.Option(min=0.0)] = None,
    loss_rel: Annotated[float, typer.Option(min=0.0)] = 0.05,
    is_failing: Annotated[bool, typer.Option("--fail-on-regression", help="Exit 1 on a regression.")] = False,
    is_missing_failure: Annotated[bool, typer.Option("--fail-on-missing", help="A missing figure counts too.")] = False,
    is_json: Json = False,
) -> int:
    """Compare a new run with a known-good one."""
    from agnitra_lab.cli import console
    from agnitra_lab.runs.read import load_summary
    from agnitra_lab.runs.regressions import compare_runs

    found = compare_runs(
        load_summary(baseline), load_summary(candidate), latency_rel=latency_rel, throughput_rel=throughput_rel,
        tflops_rel=tflops_rel, memory_rel=memory_rel, loss_abs=loss_abs, loss_rel=loss_rel,
        is_missing_failure=is_missing_failure,
    )  # fmt: skip
    console.print_regressions(found, is_json=is_json)
    return 1 if is_failing and found.is_failure else 0


@app.command()
def schemas(
    out: Annotated[Path | None, typer.Option(help="Write one file a contract into this folder.")] = None,
    name: Annotated[str | None, typer.Argument(help="One contract; by default all.")] = None,
) -> int:
    """Export the JSON Schemas of the published contracts."""
    from agnitra_lab.contracts import PUBLISHED

    if name is not None and name not in PUBLISHED:
        raise UsageError(f"Unknown contract {name!r}.", hint=f"Known: {', '.join(PUBLISHED)}.")
    chosen = {name: PUBLISHED[name]} if name else PUBLISHED
    exported = {key: contract.model_json_schema() for key, contract in chosen.items()}
    if out is None:
        sys.stdout.write(json.dumps(exported[name] if name else exported, indent=2) + "\n")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, schema in exported.items():
            (out / f"{key}.schema.json").write_text(json.dumps(schema, indent=2) + "\n")
    except OSError as error:
        raise RunStoreError(
            f"{out} cannot be written ({error.strerror}).", hint="Choose another folder with --out."
        ) from error
    sys.stdout.write(f"{len(exported)} schemas in {out}\n")
    return 0
