"""Commands of the suite of workloads: list."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import Json

suite_app = typer.Typer(name="suite", help="The workloads that the optimiser is judged on.", no_args_is_help=True)
app.add_typer(suite_app)


@suite_app.callback()
def suite() -> None:
    """The workloads that the optimiser is judged on."""


@suite_app.command("list")
def list_suite(is_json: Json = False) -> int:
    """List the workloads with their family, phase, item unit, and parameters at scale full."""
    from agnitra_lab.workloads.suite import suite_rows

    rows = suite_rows()
    if is_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("name", "family", "phase", "items a call"):
        table.add_column(heading, no_wrap=True)
    table.add_column("parameters (full)", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, row.family, row.phase or "-", f"{row.items_per_call:,} {row.item_unit}",
            _short_count(row.num_parameters),
        )  # fmt: skip
    # Never narrower than the names, which are what one copies from it.
    console = Console(highlight=False, width=max(Console().width, 88))
    console.print(table)
    console.print("Use one as a target: agnitra optimize suite:NAME[@tiny|@small|@full]", markup=False)
    return 0


def _short_count(count: int) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{letter}"
    return str(count) if count else "-"
