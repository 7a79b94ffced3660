"""The dashboard from the shell: one HTML file over the artifacts folder, or its numbers as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import Json

DASHBOARD_FILE = Path("dashboard.html")


@app.command()
def dashboard(
    artifacts: Annotated[Path, typer.Argument(help="Folder of the runs.")] = Path("artifacts"),
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = DASHBOARD_FILE,
    is_opening: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    is_json: Json = False,
) -> int:
    """Put all runs on one page: figures, drill-down, comparisons, regressions, the suite. One file, offline."""
    from agnitra_lab.loop.dashboard import collect_dashboard, write_dashboard

    record = collect_dashboard(artifacts)
    if is_json:
        sys.stdout.write(record.to_json() + "\n")
        return 0
    path = write_dashboard(record, out)
    bad = sum(row.status != "complete" for row in record.runs)
    sys.stdout.write(
        f"Dashboard: {path} ({path.stat().st_size / 1e6:.2f} MB; {len(record.runs)} run directories, {bad} of them "
        "incomplete or damaged)\n"
    )
    if is_opening:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0
