"""What the landscape commands print: tables over summaries, no computation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from agnitra_lab.refine.landscape_summary import Summary
    from agnitra_lab.refine.replay import Landscape

_MIN_WIDTH = 160
_NUM_BEST = 8


def print_json(summaries: Sequence[Summary]) -> None:
    """The figures of each landscape."""
    rows = [{**asdict(summary), "worst_over_best": summary.worst_over_best} for summary in summaries]
    sys.stdout.write(json.dumps(rows, indent=2) + "\n")


def print_list(summaries: Sequence[Summary]) -> None:
    """One line a landscape."""
    table = Table()
    table.add_column("landscape", no_wrap=True)
    for heading in ("configs", "failed", "best us", "eager us", "copy us", "within 2%", "5%", "10%", "worst/best"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        near = [f"{share:.1%}" for share in summary.within_percent.values()]
        table.add_row(
            "/".join(summary.name.split("__")[:3]), str(summary.num_configs), str(summary.num_configs - summary.num_ok),
            f"{summary.best_us:.2f}", *(_us(summary, name) for name in ("eager", "copy")), *near,
            f"{summary.worst_over_best:.1f}",
        )  # fmt: skip
    console = _console()
    console.print(table)
    for measured_on in sorted({summary.measured_on for summary in summaries}):
        console.print(f"All times: {measured_on}. copy: a device copy of as many bytes.", markup=False)


def print_one(landscape: Landscape, summary: Summary) -> None:
    """How one landscape lies."""
    console, recorded = _console(), landscape.recorded
    about = recorded.about
    title = f"{about.template} {'x'.join(map(str, about.shape))} {about.dtype}, {summary.measured_on}"
    facts = Table(title=title, show_header=False)
    for name, value in _facts(summary):
        facts.add_row(name, value)
    console.print(facts)
    best = Table(title=f"The {_NUM_BEST} best by median")
    for heading in ("us", "again us", "compile s", "registers", "spills", "shared bytes", "config"):
        best.add_column(heading, justify="left" if heading == "config" else "right", no_wrap=True)
    for index in landscape.latency_ms.argsort()[:_NUM_BEST].tolist():
        again = recorded.again_us(index)
        known = (recorded.known(name, index) for name in ("compile_s", "n_regs", "n_spills", "shared_bytes"))
        best.add_row(
            f"{1000 * landscape.latency_ms[index]:.2f}", f"{again.mean():.2f}" if len(again) else "-",
            *("-" if value is None else f"{value:g}" if value >= 10 or value == int(value) else f"{value:.2f}"
              for value in known),
            " ".join(f"{name}={value}" for name, value in recorded.params_of(index).items()),
        )  # fmt: skip
    console.print(best)
    console.print(f"{about.timing}. {about.command}", markup=False)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    again = "" if summary.best_again_us is None else f"; {summary.best_again_us:.2f} us in a fresh process"
    failures = ", ".join(f"{count} {name}" for name, count in summary.failures.items()) or "none"
    ordered = sorted(summary.importance.items(), key=lambda pair: -pair[1])
    facts = [
        ("optimum", " ".join(f"{name}={value}" for name, value in summary.optimum.items())),
        ("", f"{summary.best_us:.2f} us{again}"),
        ("configs", f"{summary.num_configs}, {summary.num_early_cut} of them cut early; {summary.num_samples} samples"),
        ("failures", failures),
        ("quantiles", ", ".join(f"{share:.0%} {us:.2f} us" for share, us in summary.quantiles_us.items())),
        ("near the optimum", ", ".join(f"{share:.2%} within {p}%" for p, share in summary.within_percent.items())),
        ("draws by chance", ", ".join(f"{draws:.0f} to {p}%" for p, draws in summary.expected_draws.items())),
        ("importance", ", ".join(f"{name} {share:.0%}" for name, share in ordered)),
    ]
    for name, us in summary.baselines_us.items():
        facts.append((name, f"{us:.2f} us, {us / summary.best_us:.2f} of the optimum's"))
    if summary.compile_s is not None and summary.measure_s is not None:
        facts.append(("took", f"{summary.compile_s:.0f} s of compiling, {summary.measure_s:.1f} s of measuring"))
    return facts


def _us(summary: Summary, name: str) -> str:
    return f"{summary.baselines_us[name]:.2f}" if name in summary.baselines_us else "-"


def _console() -> Console:
    return Console(highlight=False, width=max(Console().width, _MIN_WIDTH))
