"""The magics: %%agnitra_profile, %agnitra_optimize, %agnitra_workbench, %agnitra_compare, %agnitra_report,
%agnitra_rollback, %agnitra_runs, and the switch %agnitra_display.

Each reads its line, calls the loop, shows a card, and leaves its result in the user's namespace.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand, output_can_be_silenced
from IPython.core.magic_arguments import argument, magic_arguments

from agnitra_lab.contracts.report import Checkpoint
from agnitra_lab.errors import UsageError
from agnitra_lab.notebook import arguments, completion
from agnitra_lab.notebook.failures import one_line
from agnitra_lab.notebook.loop_options import ARTIFACTS, loop_options, settings_of
from agnitra_lab.notebook.show import Display, send_report
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from agnitra_lab.loop import Result

TELEMETRY_NAME = "agnitra_telemetry"
RESULT_NAME = "agnitra_result"
WORKBENCH_NAME = "agnitra_workbench"
MAX_EVENTS = 2_000_000


@magics_class
class AgnitraMagics(Magics):
    """The loop's magics."""

    shell: InteractiveShell

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.display = Display(shell)
        parsers = {name: method.parser for name, method in _methods(self).items()}
        self.matcher = completion.line_matcher(parsers, lambda: shell.user_ns)

    @output_can_be_silenced
    @magic_arguments()
    @argument("--name", default="cell", help="What the card and the run call the cell.")
    @argument("--workload", help="A Workload variable or a TARGET: what one run of the cell stands for.")
    @argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="Run the body N times, side effects included; times are those of one run, in ms. Default 1.",
    )
    @argument(
        "--max-events",
        type=int,
        default=MAX_EVENTS,
        metavar="N",
        help="Keep the first N events of the profiler and count the others, so that a long cell does not fill the "
        f"memory. Default {MAX_EVENTS:,}.",
    )
    @argument(
        "--memory",
        action="store_true",
        help="Record every allocation and free too, in bytes: costs about as much again as the profile itself.",
    )
    @argument("--trace", metavar="PATH", help="Write a Chrome trace, for Perfetto: JSON, times in microseconds.")
    @argument("--out", metavar="FOLDER", help="Write telemetry.json and events.parquet into this folder too.")
    @argument("--artifacts", metavar="FOLDER", default=ARTIFACTS, help="Folder of the runs. Default artifacts.")
    @cell_magic
    def agnitra_profile(self, line: str, cell: str) -> Any:
        """Profile the cell: where its time goes, down to the graph node. The cell behaves as without the magic.

        The telemetry is in `agnitra_telemetry` afterwards, also when the cell fails or is interrupted; every run that
        ends is filed under artifacts/profiles. A cell of more than 2 s shows for how long it has been running.
        """
        __tracebackhide__ = True
        from agnitra_lab.notebook.profiling import CellProfile

        with one_line():
            options = self._options("agnitra_profile", line, prefix="%%")
            profile = CellProfile(self.shell, self.display, cell, options, command=f"%%agnitra_profile {line}".strip())
        return profile.run(TELEMETRY_NAME)

    @no_var_expand
    @output_can_be_silenced
    @magic_arguments()
    @loop_options
    @line_magic
    def agnitra_optimize(self, line: str) -> Result:
        """Run the whole loop on a model and its inputs, show the report card, and return the result.

        `result = %agnitra_optimize model (x, mask) --budget 60`; then result.model is the drop-in. The result is in
        `agnitra_result` as well.
        """
        with one_line():
            model, inputs, given = self._model_and_options("agnitra_optimize", line)
            from agnitra_lab.loop import optimize

            result = optimize(
                model,
                inputs,
                name=given.name,
                on_checkpoint=_print_checkpoint,
                **settings_of(given, f"%agnitra_optimize {line}"),
            )
        self.shell.user_ns[RESULT_NAME] = result
        self.display.card_of(result)
        return result

    @no_var_expand
    @output_can_be_silenced
    @magic_arguments()
    @loop_options
    @argument("--deadline", type=float, default=1800.0, help="Seconds after which a step is cancelled.")
    @line_magic
    def agnitra_workbench(self, line: str) -> Any:
        """Step through the loop: seven steps with buttons, options and what each of them found.

        Nothing runs before a button is pressed, or a method called: the workbench is in `agnitra_workbench`, with
        run_next(), run_all(), redo(), cancel() and rollback().
        """
        with one_line():
            model, inputs, given = self._model_and_options("agnitra_workbench", line)
            from agnitra_lab.notebook.workbench import Workbench

            made = Workbench(
                model,
                inputs,
                name=given.name,
                deadline_s=given.deadline,
                **settings_of(given, f"%agnitra_workbench {line}"),
            )
        self.shell.user_ns[WORKBENCH_NAME] = made
        self.display.card_of(made)
        return made

    @no_var_expand
    @output_can_be_silenced
    @magic_arguments()
    @argument("expressions", nargs="*", help="BASELINE CANDIDATE INPUTS as Python expressions, or RUN RUN.")
    @argument("--name", help="What the card calls the workload.")
    @argument("--budget", type=float, default=6.0, help="Seconds of interleaved timing.")
    @argument("--artifacts", default=ARTIFACTS, help="Folder of the runs.")
    @line_magic
    def agnitra_compare(self, line: str) -> Any:
        """Compare two callables on the same inputs, or two runs: is it really faster, and still right?

        `%agnitra_compare model candidate inputs` times them interleaved and checks the outputs; `%agnitra_compare RUN
        RUN` holds the figures of two finished runs against each other, the known-good one first.
        """
        from agnitra_lab.notebook import comparing

        with one_line():
            code, options = arguments.split_options(arguments.pieces_of(line))
            given = arguments.parse(self.agnitra_compare.parser, options, "%agnitra_compare")
            if len(code) == 2 and all(map(comparing.is_run, code)):
                found: Any = comparing.two_runs(given.artifacts, *code)
            else:
                baseline, candidate, inputs = arguments.three_expressions(code)
                from agnitra_lab.loop import compare

                found = compare(
                    arguments.model_of(self.shell, baseline),
                    arguments.value_of(self.shell, candidate),
                    arguments.value_of(self.shell, inputs) if inputs is not None else None,
                    name=given.name,
                    budget_s=given.budget,
                )
        self.display.card_of(found)
        return found

    @magic_arguments()
    @argument("run_id", nargs="?", help="Id of a finished run; by default the newest.")
    @argument("--artifacts", default=ARTIFACTS, help="Folder of the runs.")
    @line_magic
    def agnitra_report(self, line: str) -> None:
        """Show the card of a finished run again."""
        from agnitra_lab.runs.read import find_report

        with one_line():
            given = self._options("agnitra_report", line)
            send_report(find_report(given.artifacts, given.run_id)[1], given.artifacts, self.display.has_controls)

    @output_can_be_silenced
    @magic_arguments()
    @argument("--artifacts", default=ARTIFACTS, help="Folder of the runs.")
    @line_magic
    def agnitra_runs(self, line: str) -> Any:
        """List the runs as a DataFrame, newest first."""
        from agnitra_lab.notebook.filing import runs_frame

        with one_line():
            return runs_frame(self._options("agnitra_runs", line).artifacts)

    @magic_arguments()
    @argument("artifacts", nargs="?", default=ARTIFACTS, help="Folder of the runs. Default artifacts.")
    @argument("--out", metavar="FILE", help="Write the whole dashboard as one HTML file too.")
    @argument("--static", action="store_true", help="Show the card alone: it needs no kernel.")
    @argument("--live", action="store_true", help="Show the live dashboard alone, as for Voila.")
    @line_magic
    def agnitra_dashboard(self, line: str) -> None:
        """Show all runs: figures, drill-down, comparison of any two, regressions, the suite."""
        from agnitra_lab.notebook.dashboard import show_dashboard

        with one_line():
            show_dashboard(self._options("agnitra_dashboard", line))

    @no_var_expand
    @output_can_be_silenced
    @magic_arguments()
    @argument("result", nargs="?", help="What %%agnitra_optimize returned; by default agnitra_result, the last one.")
    @line_magic
    def agnitra_rollback(self, line: str) -> Any:
        """Restore the original of a result, and show and return the proof."""
        with one_line():
            expression = line.strip() or RESULT_NAME
            result = arguments.value_of(self.shell, expression)
            if not hasattr(result, "rollback"):
                raise UsageError(
                    f"{expression!r} is a {type(result).__name__}.", hint="Expected what %agnitra_optimize returned."
                )
            proof = result.rollback()
        self.display.card_of(proof)
        return proof

    @line_magic
    def agnitra_display(self, line: str) -> None:
        """Turn cards that show themselves `on` or `off`, or on without buttons: `static`, for pages to be published.

        %agnitra_report shows a card in either case.
        """
        with one_line():
            self.display.switch(line.strip().lower())

    def _model_and_options(self, name: str, line: str) -> tuple[Any, Any, Any]:
        code, options = arguments.split_options(arguments.pieces_of(line))
        given = arguments.parse(getattr(self, name).parser, options, f"%{name}")
        model_code, inputs_code = arguments.two_expressions(code)
        model = arguments.model_of(self.shell, model_code)
        return model, arguments.value_of(self.shell, inputs_code) if inputs_code is not None else None, given

    def _options(self, name: str, line: str, *, prefix: str = "%") -> Any:
        return arguments.parse(getattr(self, name).parser, arguments.pieces_of(line), f"{prefix}{name}")


def install(shell: InteractiveShell) -> None:
    """Register the magics, the completion and the formatters on a shell; a second time changes nothing."""
    if _installed(shell) is not None:
        return
    made = AgnitraMagics(shell)
    shell.register_magics(made)
    made.display.register()
    shell.Completer.custom_matchers.append(made.matcher)


def uninstall(shell: InteractiveShell) -> None:
    """Take away what `install` registered."""
    made = _installed(shell)
    if made is None:
        return
    for kind, names in made.magics.items():
        for name in names:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop(AgnitraMagics.__name__, None)
    made.display.unregister()
    if made.matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(made.matcher)


def _installed(shell: InteractiveShell) -> AgnitraMagics | None:
    found = shell.magics_manager.registry.get(AgnitraMagics.__name__)
    return found if isinstance(found, AgnitraMagics) else None


def _methods(magics: AgnitraMagics) -> dict[str, Any]:
    names = [name for kind in magics.magics.values() for name in kind]
    return {name: method for name in names if hasattr(method := getattr(magics, name), "parser")}


def _print_checkpoint(point: Checkpoint) -> None:
    sys.stdout.write(f"{point.stage:<10}{point.status:<9}{point.wall_s:6.1f} s  {redact_text(point.headline)}\n")
    sys.stdout.flush()
