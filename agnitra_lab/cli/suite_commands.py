"""Commands of the suite of workloads: list, run, table."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import Artifacts, Json
from agnitra_lab.errors import UsageError

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


@suite_app.command("run")
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Workloads of the suite, or your own as FILE.py:FUNCTION; by default all of the suite."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="tiny, small or full; by default full on CUDA, small on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default CUDA where there is one.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, as `agnitra suite list` names it.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: only the I-th of N parts.")] = "1/1",
    modes: Annotated[
        str | None,
        typer.Option(help="torch.compile modes to beat, with commas; by default those that differ on the device."),
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1.0, help="Compiling of one optimisation.")] = 60.0,
    timing_s: Annotated[float, typer.Option("--timing-s", min=0.1, help="Timing of one workload's sides.")] = 6.0,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1.0, help="When one workload is given up; its waiting is not counted.")
    ] = 240.0,
    limit_s: Annotated[float, typer.Option("--limit-s", min=1.0, help="When to stop; --resume goes on.")] = 520.0,
    num_jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Workloads at once on a device; they take turns at it to time.")
    ] = 1,
    num_devices: Annotated[
        int, typer.Option("--devices", min=1, help="CUDA devices of one kind to spread the workloads over.")
    ] = 1,
    warm_cache: Annotated[
        Path | None, typer.Option("--warm-cache", help="Keep compiled code in this folder; by default all is cold.")
    ] = None,
    is_controlled: Annotated[
        bool, typer.Option("--controls", help="Check all of torch.compile's modes against eager, not only the fastest.")
    ] = False,
    resume: Annotated[str | None, typer.Option(help="Run id, or latest: skip what that run has finished.")] = None,
    is_retrying: Annotated[bool, typer.Option("--retry", help="With --resume: run again what failed.")] = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Optimise workloads of the suite and time each against eager and torch.compile's modes, in one loop."""
    from agnitra_lab.cli import suite_console
    from agnitra_lab.loop.suite import SuiteSettings, run_suite

    settings = SuiteSettings(
        names=tuple(names or ()), family=family, shard=_shard(shard), scale=scale, device=device,
        modes=tuple(mode.strip() for mode in modes.split(",") if mode.strip()) if modes is not None else None,
        budget_s=budget_s, timing_s=timing_s, timeout_s=timeout_s, limit_s=limit_s, num_jobs=num_jobs,
        num_devices=num_devices, warm_cache=warm_cache, is_controlled=is_controlled, resume=resume,
        is_retrying=is_retrying, artifacts=artifacts, command=shlex.join(["agnitra", *sys.argv[1:]]),
    )  # fmt: skip
    done = run_suite(settings, on_start=suite_console.print_start, on_result=suite_console.print_result)
    suite_console.print_run(done)
    return 0


@suite_app.command("table")
def table(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Run ids; by default all.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, or a part of a device's name.")] = None,
    is_json: Json = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Show the newest result of each workload and device, and what they come to."""
    from agnitra_lab.cli import suite_console
    from agnitra_lab.loop import suite_table

    groups, warnings = suite_table.collect(artifacts, tuple(runs or ()), device=device)
    suite_console.print_warnings(warnings)
    if not groups:
        where = f" on {device!r}" if device else ""
        raise UsageError(f"No result of the suite{where} under {artifacts}.", hint="Make some: agnitra suite run")
    suite_console.print_groups(groups, is_json=is_json)
    return 0


def _shard(text: str) -> tuple[int, int]:
    try:
        part, num_parts = (int(number) for number in text.split("/"))
    except ValueError as error:
        raise UsageError(f"Not a shard: {text!r}.", hint="Expected I/N, such as 1/4.") from error
    return part, num_parts


def _short_count(count: int) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{letter}"
    return str(count) if count else "-"
