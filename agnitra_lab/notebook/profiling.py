"""One profiled cell, from its options to its card: check -> run the body once -> file -> show."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.notebook import arguments, filing
from agnitra_lab.notebook.cell import CellBody
from agnitra_lab.notebook.show import Display, profile_bundle
from agnitra_lab.profiler.capture import capture_block, profile
from agnitra_lab.runs.store import RunStore

if TYPE_CHECKING:
    from argparse import Namespace

    from IPython.core.interactiveshell import InteractiveShell

    from agnitra_lab.contracts.workload import Workload
    from agnitra_lab.profiler.telemetry import Telemetry


class CellProfile:
    """A cell that is about to be profiled: everything that can be known before its body runs is checked here.

    Raises:
        UsageError: an option that does not fit, or a body that awaits.
        RunStoreError: a folder that cannot be written.
    """

    def __init__(
        self, shell: InteractiveShell, display: Display, cell: str, options: Namespace, *, command: str
    ) -> None:
        if options.repeat < 1:
            raise UsageError(f"--repeat is {options.repeat}.", hint="Expected a whole number from 1 on.")
        for folder in filter(None, (options.artifacts, options.out)):
            RunStore(folder).check_writable()
        self._shell, self._display, self._options, self._command = shell, display, options, command
        self._workload: Workload | None = arguments.workload_of(shell, options.workload) if options.workload else None
        self._body = CellBody(shell, cell)

    def run(self, variable: str) -> Any:
        """Run the body and return its value; what it raises passes unchanged, after the card.

        Args:
            variable: name that the telemetry gets in the user's namespace.
        """
        __tracebackhide__ = True
        if self._options.repeat > 1:
            telemetry = profile(self._body, name=self._options.name, repeat=self._options.repeat, should_time=False)
            self._finish(telemetry, variable, has_failed=False)
            return telemetry.value
        block = capture_block(name=self._options.name)
        try:
            with block:
                block.value = self._body()
        except Exception:
            # What ran before the failure is shown above its traceback, and nothing may hide that traceback.
            if block.telemetry is not None:
                with contextlib.suppress(Exception):
                    self._finish(block.telemetry, variable, has_failed=True)
            raise
        if block.telemetry is not None:
            self._finish(block.telemetry, variable, has_failed=False)
        return block.value

    def _finish(self, telemetry: Telemetry, variable: str, *, has_failed: bool) -> None:
        if self._workload is not None:
            telemetry.record = _counted(telemetry, self._workload)
        self._shell.user_ns[variable] = telemetry
        filed = None if has_failed else self._file(telemetry)
        self._display.card(profile_bundle(telemetry.record, filed))
        if filed and not self._display.is_on:
            sys.stdout.write(f"{filed}\n")

    def _file(self, telemetry: Telemetry) -> str:
        options = self._options
        config = {"name": options.name, "workload": options.workload, "repeat": options.repeat}
        try:
            directory = filing.file_profile(
                telemetry, artifacts=options.artifacts, command=self._command, config=config
            )
            places = [directory / "telemetry.json", *(telemetry.save(Path(options.out))[:1] if options.out else ())]
        except AgnitraError as error:
            # The cell has run: its value is worth more than its file.
            return f"Not filed: {error}"
        return f"Telemetry: {' and '.join(map(str, places))}"


def _counted(telemetry: Telemetry, workload: Workload) -> Any:
    """The record with what one run of the cell stands for."""
    record = telemetry.record
    wall_ms = record.wall_ms or record.profiled_ms
    has_rate = workload.item_unit == "tokens" and bool(wall_ms)
    return record.model_copy(
        update={
            "workload": workload.name,
            "phase": workload.phase,
            "items_per_call": workload.items_per_call,
            "item_unit": workload.item_unit,
            "tokens_per_second": workload.items_per_call / (wall_ms / 1e3) if has_rate and wall_ms else None,
        }
    )
