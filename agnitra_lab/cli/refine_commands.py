"""`agnitra refine`: search a kernel template's configs, on the GPU that is here or on a recording of one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.errors import UsageError

_MAX_EDGE = 2**40


class Where(StrEnum):
    """Where configs are measured."""

    AUTO = "auto"
    GPU = "gpu"
    RECORDED = "recorded"


@app.command()
def refine(
    template: Annotated[str, typer.Argument(help="Kernel template, such as rms_norm.")] = "",
    shape: Annotated[
        str | None, typer.Option(help="Extents with an x between them, such as 4096x2048; default: as recorded.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    sampler: Annotated[str, typer.Option(help="How to choose; `--list` shows what there is.")] = "rl",
    max_trials: Annotated[int, typer.Option("--budget", "--trials", min=1, help="Configs to measure.")] = 24,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds after which no config is begun.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    ledger: Annotated[
        Path | None, typer.Option(help="File of every step; a search that was killed goes on from it.")
    ] = None,
    on: Annotated[Where, typer.Option(help="auto: the GPU where there is one, else a recording.")] = Where.AUTO,
    is_warm: Annotated[
        bool, typer.Option("--siblings/--cold", help="Begin with what recordings of other shapes and devices say.")
    ] = True,
    is_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List the samplers with their measured ranks.")] = False,
) -> int:
    """Search a kernel template's configs, on this GPU or on recorded measurements of one."""
    from agnitra_lab.cli import console
    from agnitra_lab.loop.template_search import Request, search_template
    from agnitra_lab.refine.sampler import info

    if is_list:
        console.print_samplers()
        return 0
    if not template:
        raise UsageError("Missing argument: the kernel template.", hint="Such as rms_norm; --list names the samplers.")
    info(sampler)
    found = search_template(
        Request(
            template=template, shape=_shape(shape), dtype=dtype, sampler=sampler, max_trials=max_trials,
            budget_s=seconds, seed=seed, ledger=ledger, on=on.value, is_warm=is_warm,
        ),
        on_trial=None if is_json else console.print_trial,
    )  # fmt: skip
    console.print_search(found.result, found.optimum_ms, is_json=is_json)
    return 0


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(edge) for edge in text.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"Not a shape: {text!r}.", hint="Expected ROWSxCOLUMNS, such as 4096x2048.") from error
    if not all(1 <= edge <= _MAX_EDGE for edge in shape):
        raise UsageError(f"Not a shape: {text!r}.", hint="Extents are at least 1.")
    return shape
