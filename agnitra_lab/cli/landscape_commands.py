"""Commands of recorded landscapes: record."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.errors import UsageError

landscape_app = typer.Typer(
    name="landscape", help="What every config of a kernel costs, recorded once on a GPU.", no_args_is_help=True
)
app.add_typer(landscape_app)


@landscape_app.callback()
def landscape() -> None:
    """What every config of a kernel costs, recorded once on a GPU."""


@landscape_app.command("record")
def record(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Families, or sites such as rms_norm/4096x2048/bfloat16; by default every family."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the recordings.")] = Path("landscapes"),
    device: Annotated[
        str, typer.Option(help="cuda; or cpu under TRITON_INTERPRET=1, which times nothing real.")
    ] = "cuda",
    limit_s: Annotated[float, typer.Option("--limit-s", min=1.0, help="When to stop; --resume goes on.")] = 520.0,
    num_processes: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that compile; by default all cores but two.")
    ] = None,
    is_resumed: Annotated[bool, typer.Option("--resume", help="Go on with the recordings in --out.")] = False,
    most: Annotated[int | None, typer.Option(min=1, help="Only so many configs of each, drawn by chance.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what Triton compiles; by default beside the recordings.")
    ] = None,
) -> int:
    """Measure every config of the wide grids: compiled in parallel, timed in rounds, the best once more."""
    from agnitra_lab.loop.landscape_record import RecordSettings
    from agnitra_lab.loop.landscape_record import record as record_landscapes

    settings = RecordSettings(
        out=out, device=device, limit_s=limit_s, num_processes=num_processes or max(1, (os.cpu_count() or 2) - 2),
        is_resumed=is_resumed, cache=(cache or out / "triton").resolve(), most_configs=most,
        command=shlex.join(["agnitra", *sys.argv[1:]]),
    )  # fmt: skip
    recordings = record_landscapes(_sites(what or []), settings, _say)
    figures = {
        recording.path.stem: {
            "is_done": recording.is_done, "num_configs": recording.num_configs, "num_ok": len(recording.ready),
            "num_failed": len(recording.failures),
        }
        for recording in recordings
    }  # fmt: skip
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if all(recording.ready or not recording.is_done for recording in recordings) else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _sites(names: list[str]) -> list[Site]:
    from agnitra_lab.loop.landscape_grids import PLAN

    sites: list[Site] = []
    for name in names or list(PLAN):
        if name in PLAN:
            sites.extend(PLAN[name])
            continue
        parts = name.split("/")
        try:
            template, extents, dtype = parts
            sites.append(Site(template, tuple(int(extent) for extent in extents.split("x")), dtype))
        except ValueError as error:
            raise UsageError(
                f"Not a family nor a site: {name!r}.",
                hint=f"Families: {', '.join(PLAN)}. A site reads template/shape/dtype, as rms_norm/4096x2048/bfloat16.",
            ) from error
    return sites
