"""What is displayed, once each: cards of profiles, results and rollbacks, with a switch to turn them off."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from agnitra_lab.contracts.patch import RollbackProof
    from agnitra_lab.contracts.report import Report
    from agnitra_lab.contracts.telemetry import TelemetryRecord

SWITCH = "AGNITRA_DISPLAY"
# Whole objects by their classes' addresses, so that registering them imports nothing.
_RESULT = ("agnitra_lab.loop.result", "Result")
_PROOF = ("agnitra_lab.contracts.patch", "RollbackProof")
_TELEMETRY = ("agnitra_lab.profiler.telemetry", "Telemetry")

Bundle = dict[str, Any]


def profile_bundle(record: TelemetryRecord, filed: str | None = None) -> Bundle:
    """The profile card as one mime bundle."""
    from agnitra_lab.notebook.profile_card import profile_card_html, profile_card_text

    return {"text/html": profile_card_html(record, filed), "text/plain": profile_card_text(record, filed)}


def report_bundle(report: Report) -> Bundle:
    """The report card as one mime bundle."""
    from agnitra_lab.report.card import card_html, card_text

    return {"text/html": card_html(report), "text/plain": card_text(report)}


def chart_bundle(report: Report) -> Bundle:
    """The A/B as a chart that can be explored, with the same as a picture for where nothing runs."""
    from agnitra_lab.report.figures import report_bundles

    return report_bundles(report, names=("latency",))["latency"]


def rollback_bundle(proof: RollbackProof) -> Bundle:
    """The rollback card as one mime bundle."""
    from agnitra_lab.notebook.rollback_card import rollback_card_html, rollback_card_text

    return {"text/html": rollback_card_html(proof), "text/plain": rollback_card_text(proof)}


class Display:
    """Shows cards. A magic shows its card and returns the object: the cell's value then shows nothing a second time.

    Attributes:
        is_on: whether cards are shown without being asked for; the environment's AGNITRA_DISPLAY=off turns it off.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self.is_on = os.environ.get(SWITCH, "on").strip().lower() not in ("off", "0", "false", "no")
        self._shell = shell
        self._shown: tuple[int, int] | None = None

    def register(self) -> None:
        """Tell IPython how results, proofs and telemetry are displayed."""
        formatter: Any = self._shell.display_formatter
        for address in (_RESULT, _PROOF):
            formatter.ipython_display_formatter.for_type_by_name(*address, self._show_value)
        formatter.formatters["text/html"].for_type_by_name(*_TELEMETRY, self._telemetry_html)

    def unregister(self) -> None:
        """Take the formatters away again."""
        formatter: Any = self._shell.display_formatter
        for address in (_RESULT, _PROOF):
            formatter.ipython_display_formatter.pop(".".join(address), None)
        formatter.formatters["text/html"].pop(".".join(_TELEMETRY), None)

    def card(self, bundle: Bundle) -> None:
        """Send one card, when cards are on."""
        if self.is_on:
            send(bundle)

    def card_of(self, value: Any) -> None:
        """Send the card of a result or proof, when cards are on, and remember that this cell has shown it."""
        if self.is_on:
            send(_bundle_of(value))
            self._shown = self._key(value)

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


def _bundle_of(value: Any) -> Bundle:
    return report_bundle(value.report) if hasattr(value, "report") else rollback_bundle(value)
