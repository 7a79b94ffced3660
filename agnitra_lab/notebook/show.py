"""What is displayed, once each: cards of profiles, results and rollbacks, with a switch to turn them off."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import UsageError
from agnitra_lab.redact import redact_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from agnitra_lab.contracts.measurement import Comparison
    from agnitra_lab.contracts.patch import RollbackProof
    from agnitra_lab.contracts.regressions import Regressions
    from agnitra_lab.contracts.report import Report
    from agnitra_lab.contracts.telemetry import TelemetryRecord
    from agnitra_lab.notebook.artifact_files import ArtifactFile
    from agnitra_lab.notebook.widget import Controls

SWITCH = "AGNITRA_DISPLAY"
# Whole objects by their classes' addresses, so that registering them imports nothing.
_RESULT = ("agnitra_lab.loop.result", "Result")
_WORKBENCH = ("agnitra_lab.notebook.workbench", "Workbench")
_COMPARISON = ("agnitra_lab.contracts.measurement", "Comparison")
_REGRESSIONS = ("agnitra_lab.contracts.regressions", "Regressions")
_PROOF = ("agnitra_lab.contracts.patch", "RollbackProof")
_TELEMETRY = ("agnitra_lab.profiler.telemetry", "Telemetry")

_VALUES = (_RESULT, _PROOF, _WORKBENCH, _COMPARISON, _REGRESSIONS)

Bundle = dict[str, Any]

# A trusted notebook that is opened again has its outputs but no widgets, and JupyterLab and Notebook write "Error
# displaying widget: model not found" where buttons were: a node of theirs without a single element in it. The card
# beside it says that buttons need the kernel. An untrusted notebook drops the rule, and shows the fallback instead.
NO_DEAD_BUTTONS = (
    '<style class="agn-card">.jp-OutputArea:has(style.agn-card) .jp-OutputArea-output.jupyter-widgets:not(:has(*))'
    "{display:none}</style>"
)


def profile_bundle(record: TelemetryRecord, filed: str | None = None) -> Bundle:
    """The profile card as one mime bundle."""
    from agnitra_lab.notebook.profile_card import profile_card_html, profile_card_text

    return {"text/html": profile_card_html(record, filed), "text/plain": profile_card_text(record, filed)}


def report_bundle(report: Report, files: Sequence[ArtifactFile] = ()) -> Bundle:
    """The report card as one mime bundle."""
    from agnitra_lab.report.card import card_html, card_text

    listed = [(file.name, redact_text(str(file.path)), file.size_bytes, file.sha256) for file in files]
    return {"text/html": card_html(report, listed), "text/plain": card_text(report, listed)}


def beside_buttons(bundle: Bundle) -> Bundle:
    """A card that has buttons in the same cell: without their kernel they leave nothing ugly."""
    return {**bundle, "text/html": bundle["text/html"] + NO_DEAD_BUTTONS}


def send_report(report: Report, artifacts: Path | str, has_controls: bool) -> None:
    """Show a finished run: its card, its chart, and buttons for its files where a page can have them."""
    from agnitra_lab.notebook.artifact_files import RunFiles

    files = RunFiles(Path(artifacts), report.workload, report.run_id)
    has_buttons = has_controls and has_front_end() and bool(files.all())
    card = report_bundle(report, files.all())
    send(beside_buttons(card) if has_buttons else card)
    send(chart_bundle(report))
    if has_buttons:
        from agnitra_lab.notebook.file_buttons import controls_of_run

        send_controls(controls_of_run(files, report.run_id), "Copy and Download")


def send_controls(controls: Controls, what: str) -> None:
    """Show buttons, with a line for where they cannot be."""
    data, metadata = controls.mime_bundle()
    fallback = f"{what}: run this cell in a live notebook to have the buttons."
    send({**data, "text/plain": fallback, "text/html": f"<p>{fallback}</p>"}, metadata=metadata)


def chart_bundle(report: Report) -> Bundle:
    """The A/B as a chart that can be explored, with the same as a picture for where nothing runs."""
    from agnitra_lab.report.figures import small_latency_bundle

    return small_latency_bundle(report)


def rollback_bundle(proof: RollbackProof) -> Bundle:
    """The rollback card as one mime bundle."""
    from agnitra_lab.notebook.rollback_card import rollback_card_html, rollback_card_text

    return {"text/html": rollback_card_html(proof), "text/plain": rollback_card_text(proof)}


class Display:
    """Shows cards. A magic shows its card and returns the object: the cell's value then shows nothing a second time.

    Attributes:
        is_on: whether cards are shown without being asked for; the environment's AGNITRA_DISPLAY=off turns it off.
        has_controls: whether buttons come with them; AGNITRA_DISPLAY=static leaves them out, for pages to be published.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        wanted = os.environ.get(SWITCH, "on").strip().lower()
        self.is_on = wanted not in ("off", "0", "false", "no")
        self.has_controls = wanted != "static"
        self._shell = shell
        self._shown: tuple[int, int] | None = None

    def register(self) -> None:
        """Tell IPython how results, proofs and telemetry are displayed."""
        formatter: Any = self._shell.display_formatter
        for address in _VALUES:
            formatter.ipython_display_formatter.for_type_by_name(*address, self._show_value)
        formatter.formatters["text/html"].for_type_by_name(*_TELEMETRY, self._telemetry_html)

    def unregister(self) -> None:
        """Take the formatters away again."""
        formatter: Any = self._shell.display_formatter
        for address in _VALUES:
            formatter.ipython_display_formatter.pop(".".join(address), None)
        formatter.formatters["text/html"].pop(".".join(_TELEMETRY), None)

    def switch(self, state: str) -> None:
        """Turn cards on, off, or on without buttons.

        Raises:
            UsageError: another word.
        """
        if state not in ("on", "off", "static"):
            raise UsageError(
                f"%agnitra_display takes on or off (or static), got {state!r}.", hint="Write: %agnitra_display off"
            )
        self.is_on, self.has_controls = state != "off", state != "static"

    def card(self, bundle: Bundle) -> None:
        """Send one card, when cards are on."""
        if self.is_on:
            send(bundle)

    def card_of(self, value: Any) -> None:
        """Send what a value looks like, when cards are on, and remember that this cell has shown it."""
        if self.is_on:
            self._send_value(value)
            self._shown = self._key(value)

    def _send_value(self, value: Any) -> None:
        kind = type(value).__name__
        if kind == "Workbench":
            from agnitra_lab.notebook.workbench_view import show

            show(value, has_controls=self.has_controls)
        elif kind == "Result":
            send_report(value.report, value.artifacts, self.has_controls)
        else:
            send(_BUNDLES[kind](value))

    def _show_value(self, value: Any) -> None:
        if not self.is_on:
            send({"text/plain": repr(value)})
        elif self._shown != self._key(value):
            self.card_of(value)

    def _key(self, value: Any) -> tuple[int, int]:
        return id(value), self._shell.execution_count

    def _telemetry_html(self, telemetry: Any) -> str | None:
        return profile_bundle(telemetry.record)["text/html"] if self.is_on else None


def send(
    bundle: Bundle,
    *,
    metadata: Bundle | None = None,
    display_id: str | None = None,
    is_update: bool = False,
) -> None:
    """Publish one display_data message.

    Args:
        bundle: mime type -> content.
        metadata: of the message.
        display_id: what it can be updated by.
        is_update: whether it replaces what was shown by that id.
    """
    from IPython.display import display

    extra: dict[str, Any] = {"display_id": display_id, "update": is_update} if display_id is not None else {}
    display(bundle, raw=True, metadata=metadata, **extra)


def has_front_end() -> bool:
    """Whether a page can show buttons: a kernel answers to one, a terminal does not."""
    from IPython.core.getipython import get_ipython

    return hasattr(get_ipython(), "kernel")


def comparison_bundle(comparison: Comparison) -> Bundle:
    """The card of an A/B as one mime bundle."""
    from agnitra_lab.notebook.comparing import comparison_card_html, comparison_card_text

    return {"text/html": comparison_card_html(comparison), "text/plain": comparison_card_text(comparison)}


def regressions_bundle(found: Regressions) -> Bundle:
    """The card of two runs side by side as one mime bundle."""
    from agnitra_lab.notebook.comparing import runs_card_html, runs_card_text

    return {"text/html": runs_card_html(found), "text/plain": runs_card_text(found)}


_BUNDLES: dict[str, Callable[[Any], Bundle]] = {
    "RollbackProof": rollback_bundle,
    "Comparison": comparison_bundle,
    "Regressions": regressions_bundle,
}
