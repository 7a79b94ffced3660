"""The options of the magics that run the loop, and what they are called in its settings: one list for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.magic_arguments import argument

from agnitra_lab.notebook.steps import SAMPLER_CHOICES

if TYPE_CHECKING:
    from argparse import Namespace

ARTIFACTS = "artifacts"
Magic = TypeVar("Magic", bound=Callable[..., Any])

_OPTIONS = (
    argument("expressions", nargs="*", help="MODEL INPUTS as Python expressions, a Workload, or a TARGET."),
    argument("--name", help="What the artifacts call the model."),
    argument("--suggest", choices=("auto", "llm", "preset"), default="auto", help="Where suggestions come from."),
    argument("--sampler", choices=SAMPLER_CHOICES, default="rl", help="How kernel configs are searched."),
    argument("--budget", type=float, default=300.0, help="Seconds for compiling candidates."),
    argument("--timing", type=float, default=4.0, help="Seconds of interleaved timing a candidate."),
    argument("--artifacts", default=ARTIFACTS, help="Folder of the runs."),
)


def loop_options(magic: Magic) -> Magic:
    """Give a magic the loop's options; it stands below `@magic_arguments()`, as an `@argument` does."""
    for option in reversed(_OPTIONS):
        magic = option(magic)
    return magic


def settings_of(given: Namespace, command: str) -> dict[str, Any]:
    """The fields of `Settings` that a line asks for.

    Args:
        given: its options.
        command: the line, for the record.
    """
    return {
        "suggest": given.suggest,
        "sampler": None if given.sampler == "none" else given.sampler,
        "budget_s": given.budget,
        "timing_s": given.timing,
        "artifacts": given.artifacts,
        "command": command.strip(),
    }
