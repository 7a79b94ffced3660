"""One profiled cell, from its options to its card: check -> run the body once -> file -> show."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.notebook import arguments, filing
from agnitra_lab.notebook.cell import CellBody, user_traceback
from agnitra_lab.notebook.progress import Progress
from agnitra_lab.notebook.show import Bundle, Display, profile_bundle
from agnitra_lab.profiler.capture import CaptureBlock, capture_block
from agnitra_lab.profiler.trace import SUFFIXES
from agnitra_lab.redact import redact_text
from agnitra_lab.runs.store import RunStore

if TYPE_CHECKING:
    from argparse import Namespace

    from IPython.core.interactiveshell import InteractiveShell

    from agnitra_lab.contracts.telemetry import TelemetryRecord
    from agnitra_lab.contracts.workload import Workload
    from agnitra_lab.profiler.telemetry import Telemetry

MAGIC = "%%agnitra_profile"
_RECORDED_OPTIONS = ("name", "workload", "repeat", "max_events", "memory", "out", "trace")


class CellProfile:
    """A cell that is about to be profiled: everything that can be known before its body runs is checked here.

    Raises:
        UsageError: an option that does not fit, or a body that awaits.
        RunStoreError: a folder that cannot be written.
        SyntaxError: in the body.
    """

    def __init__(
        self, shell: InteractiveShell, display: Display, cell: str, options: Namespace, *, command: str
    ) -> None:
        for name in ("repeat", "max_events"):
            if (value := getattr(options, name)) < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is {value}.", hint="Expected a whole number from 1 on.")
        self._out, self._trace = _path(options.out), _path(options.trace)
        if self._trace is not None and (self._trace.is_dir() or not self._trace.name.endswith(SUFFIXES)):
            raise UsageError(f"--trace is {options.trace!r}.", hint="Expected a file, such as trace.json or t.json.gz.")
        for folder in filter(None, (options.artifacts, self._out, self._trace and self._trace.parent)):
            RunStore(folder).check_writable()
        self._shell, self._display, self._options, self._command = shell, display, options, command
        self._workload: Workload | None = arguments.workload_of(shell, options.workload) if options.workload else None
        try:
            self._body = CellBody(shell, cell, MAGIC)
        except SyntaxError as error:
            # The place is in the error itself; the frames of the parser say nothing about it.
            raise error.with_traceback(None) from None

    def run(self, variable: str) -> Any:
        """Run the body and return its value; what it raises passes unchanged, after the card.

        Args:
            variable: name that the telemetry gets in the user's namespace; None when there is none.
        """
        __tracebackhide__ = True
        options, shown = self._options, None
        with Progress(self._shell.display_pub, is_on=self._display.is_on) as progress:
            block = capture_block(
                name=options.name,
                max_events=options.max_events,
                has_memory=options.memory,
                on_progress=progress.tell,
            )
            try:
                failure = self._capture(block, progress)
            finally:
                telemetry = self._shell.user_ns[variable] = block.telemetry
            if telemetry is not None:
                progress.tell("writing the files")
                with _harmless(failure):
                    telemetry.record = self._described(telemetry.record, failure)
                    filed = self._write(telemetry, has_failed=failure is not None)
                    shown = profile_bundle(telemetry.record, filed), filed
        with _harmless(failure):
            self._show(*(shown or (None, None)))
        if failure is None:
            return block.value
        raise failure.with_traceback(user_traceback(failure.__traceback__))

    def _capture(self, block: CaptureBlock, progress: Progress) -> BaseException | None:
        """Run the body in the block, and return what it raised."""
        __tracebackhide__ = True
        failure: BaseException | None = None
        has_begun = False
        try:
            with block:
                has_begun = True
                try:
                    self._run_body(block, progress)
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as problem:
            if not has_begun:
                raise
            if problem is not failure:
                with _harmless(failure):
                    raise
        return failure

    def _run_body(self, block: CaptureBlock, progress: Progress) -> None:
        __tracebackhide__ = True
        repeat = self._options.repeat
        for number in range(1, repeat + 1):
            if repeat > 1:
                progress.tell(f"run {number} of {repeat}")
            block.num_calls, block.value = number, None
            block.value = self._body()

    def _described(self, record: TelemetryRecord, failure: BaseException | None) -> TelemetryRecord:
        """The record with what the magic knows beside it: what one run of the cell stands for."""
        if self._workload is not None:
            # Items are those of a whole run: a part of one has no rate.
            record = _counted(record, self._workload, has_rate=failure is None)
        if self._body.is_empty:
            notes = (*record.notes, "The cell holds no code, so there was nothing to profile.")
            record = record.model_copy(update={"notes": notes})
        return record

    def _write(self, telemetry: Telemetry, *, has_failed: bool) -> str | None:
        """Write the run and the files that were asked for, and tell in one line what is where.

        A cell that failed is no run, but its files are written: they hold what ran.
        """
        lines = [] if has_failed else [_written("Telemetry", lambda: self._file(telemetry) / "telemetry.json")]
        if (out := self._out) is not None:
            lines.append(_written("A copy" if lines else "Telemetry", lambda: telemetry.save(out)[0]))
        if (trace := self._trace) is not None:
            lines.append(_written("Chrome trace", lambda: telemetry.export_trace(trace)))
        return "; ".join(lines) or None

    def _file(self, telemetry: Telemetry) -> Path:
        config = {name: getattr(self._options, name) for name in _RECORDED_OPTIONS}
        return filing.file_profile(telemetry, artifacts=self._options.artifacts, command=self._command, config=config)

    def _show(self, bundle: Bundle | None, filed: str | None) -> None:
        if bundle is not None:
            self._display.card(bundle)
        if filed and not self._display.is_on:
            sys.stdout.write(f"{filed}\n")


@contextlib.contextmanager
def _harmless(failure: BaseException | None) -> Iterator[None]:
    """Keep a problem of ours from hiding what the body raised, and from taking the value of a body that has run.

    An interrupt passes, unless the body has an exception of its own to show.
    """
    try:
        yield
    except BaseException as problem:
        if failure is None and not isinstance(problem, Exception):
            raise
        frames = traceback.extract_tb(problem.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        message = redact_text(f"{type(problem).__name__}: {problem}{place}")
        sys.stderr.write(f"Agnitra Lab has no complete profile of this cell, which itself ran: {message}\n")


def _written(label: str, write: Callable[[], Path]) -> str:
    try:
        return f"{label}: {write()}"
    except (AgnitraError, OSError) as error:
        # The cell has run: its value is worth more than a file.
        return f"{label} not written: {error}"


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text is not None else None


def _counted(record: TelemetryRecord, workload: Workload, *, has_rate: bool) -> TelemetryRecord:
    """The record with what one run of the cell stands for."""
    wall_ms = record.wall_ms or record.profiled_ms
    has_rate = has_rate and workload.item_unit == "tokens" and bool(wall_ms)
    return record.model_copy(
        update={
            "workload": workload.name,
            "phase": workload.phase,
            "items_per_call": workload.items_per_call,
            "item_unit": workload.item_unit,
            "tokens_per_second": workload.items_per_call / (wall_ms / 1e3) if has_rate and wall_ms else None,
        }
    )
