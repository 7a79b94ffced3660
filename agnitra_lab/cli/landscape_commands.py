"""Commands of recorded landscapes: record, pack, show, export."""

from __future__ import annotations

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.cli.loop_commands import Json
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.errors import UsageError

landscape_app = typer.Typer(
    name="landscape", help="What every config of a kernel costs, recorded once on a GPU.", no_args_is_help=True
)
app.add_typer(landscape_app)


class Format(StrEnum):
    """What other tuners read."""

    T4 = "t4"
    KERNEL_TUNER = "kernel_tuner"


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


@landscape_app.command("pack")
def pack(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the landscapes.")] = Path("fixtures/landscapes"),
    is_replacing: Annotated[
        bool, typer.Option("--replace", help="Put the new ones in the place of others of the same name.")
    ] = False,
) -> int:
    """Make the small files that are kept of finished recordings; exit code 1 when one is not finished."""
    from agnitra_lab.refine.landscape_pack import pack as pack_recording
    from agnitra_lab.refine.landscape_recording import read
    from agnitra_lab.runs.atomic import write_atomically

    paths = [path for given in recordings for path in (sorted(given.glob("*.jsonl")) if given.is_dir() else [given])]
    if not paths:
        raise UsageError(f"No recording (*.jsonl) in {', '.join(map(str, recordings))}.")
    num_skipped = 0
    for path in paths:
        recording = read(path)
        if not recording.is_done:
            num_skipped += 1
            _say(f"not finished, left out: {path} ({len(recording.ready)} of {recording.num_configs} configs)")
            continue
        landscape = pack_recording(recording)
        content, target = landscape.to_bytes(), out / landscape.file_name()
        if target.exists() and target.read_bytes() != content and not is_replacing:
            raise UsageError(f"There is another landscape {target} already.", hint="Give --replace, or another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
        _say(f"{target}: {len(landscape)} configs, {len(content)} bytes")
    return 1 if num_skipped else 0


@landscape_app.command("show")
def show(
    name: Annotated[
        str | None, typer.Argument(help="A template, a site such as rms_norm/4096x8192/bfloat16, or a file.")
    ] = None,
    is_json: Json = False,
) -> int:
    """List the recorded landscapes, or show how one lies: optimum, spread, failures, which parameters matter."""
    from agnitra_lab.cli import landscape_console
    from agnitra_lab.refine import replay
    from agnitra_lab.refine.landscape_summary import summarise

    landscapes = [replay.load(path) for path in _paths(name)]
    summaries = [summarise(landscape) for landscape in landscapes]
    if is_json:
        landscape_console.print_json(summaries)
    elif name is not None and len(landscapes) == 1:
        landscape_console.print_one(landscapes[0], summaries[0])
    else:
        landscape_console.print_list(summaries)
    return 0


@landscape_app.command("export")
def export(
    name: Annotated[str, typer.Argument(help="A site such as rms_norm/4096x8192/bfloat16, or a file.")],
    format_: Annotated[
        Format,
        typer.Option("--format", help="t4: results for exchange; kernel_tuner: a cache for its simulation mode."),
    ] = Format.T4,
    out: Annotated[Path | None, typer.Option(help="File to write; by default it is printed.")] = None,
) -> int:
    """Write a landscape as other tuners read it."""
    from agnitra_lab.refine import replay
    from agnitra_lab.refine.landscape_export import FORMATS
    from agnitra_lab.runs.atomic import write_atomically

    paths = _paths(name)
    if len(paths) > 1:
        names = ", ".join(path.stem for path in paths)
        raise UsageError(f"{len(paths)} landscapes match {name!r}: {names}.", hint="Name one of them.")
    text = FORMATS[format_.value](replay.load(paths[0]))
    if out is None:
        sys.stdout.write(text + "\n")
        return 0
    write_atomically(out, text.encode())
    _say(f"{out}: {len(text)} bytes")
    return 0


def _paths(name: str | None) -> list[Path]:
    """Return the files that a name means: all of them without one."""
    from agnitra_lab.refine import replay

    if name is not None and (name.endswith(".npz") or Path(name).is_file()):
        return [Path(name)]
    paths = replay.every()
    wanted = "" if name is None else name.replace("/", "__")
    found = [path for path in paths if not wanted or f"{path.stem}__".startswith(f"{wanted}__")]
    if not found:
        known = ", ".join(sorted({"/".join(path.stem.split("__")[:3]) for path in paths})) or "none"
        raise UsageError(f"No recorded landscape {name or ''!r}.", hint=f"Recorded: {known}.")
    return found


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
