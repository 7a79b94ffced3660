"""A workbench on the page: controls, a card that is updated in place, and at the end a chart that can be explored.

Messages of the user may arrive in any thread, during a cell or after it (ipykernel 7.1, 7.3 and 7.4 differ): they only
start work or flag it. Updates leave from the worker's threads, under the cell that showed the workbench.
"""

from __future__ import annotations

import contextvars
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import UsageError
from agnitra_lab.notebook import show as shown
from agnitra_lab.notebook.artifact_files import RunFiles
from agnitra_lab.notebook.file_buttons import answer, file_rows, send_file
from agnitra_lab.notebook.steps import ENDED, MARKS, SAMPLER_CHOICES, WORDS
from agnitra_lab.notebook.workbench_card import workbench_card_html, workbench_card_text
from agnitra_lab.redact import redact_text
from agnitra_lab.report import numbers

if TYPE_CHECKING:
    from agnitra_lab.notebook.widget import Controls, Message
    from agnitra_lab.notebook.workbench import Workbench

_TICK_S, _CLOCK_S, _CURVE_S = 0.2, 1.0, 0.7
_CHOICES = {"suggest": ("auto", "llm", "preset"), "sampler": SAMPLER_CHOICES}
_OPTIONS = ("suggest", "sampler", "max_trials", "budget_s", "timing_s", "accept")
_MAX_WHY = 300


class View:
    """One workbench as it is shown under one cell.

    Args:
        workbench: what is shown.
        has_controls: False for a card alone, as for a page that is to be published.
    """

    def __init__(self, workbench: Workbench, *, has_controls: bool = True) -> None:
        self._workbench = workbench
        self._controls: Controls | None = _made_controls() if has_controls else None
        self._context = contextvars.copy_context()
        self._card_id, self._chart_id = uuid.uuid4().hex, uuid.uuid4().hex
        self._charted_run: str | None = None
        self._page: str | None = None
        self._is_elsewhere = False
        self._num_announced = 0
        self._announced: tuple[object, ...] = ()
        self._spoken = ""
        self._ticked_s = self._drawn_s = 0.0
        self._files: tuple[str, RunFiles] | None = None
        # Held while messages are made and sent, so that an older state never comes after a newer one.
        self._lock = threading.RLock()
        self._clock: threading.Thread | None = None
        if self._controls is not None:
            self._controls.on_message(self._heard)

    def open(self) -> None:
        """Show it under the cell that runs now."""
        self._workbench.listen(self._changed)
        with self._lock:
            if self._controls is not None:
                self._controls.state, self._controls.tick = self._state(), self._tick()
                shown.send_controls(self._controls, "Workbench")
            shown.send(self._card(), display_id=self._card_id)
            self._chart()

    def close(self) -> None:
        """Stop following the workbench."""
        self._workbench.deafen(self._changed)

    # --- from the workbench ---

    def _changed(self, is_step: bool) -> None:
        now_s = time.monotonic()
        if not is_step and now_s - self._ticked_s < _TICK_S:
            return
        with self._lock:
            self._ticked_s = now_s
            step = self._workbench.steps.current
            is_live = step is not None and step.stage == "refine" and now_s - self._drawn_s >= _CURVE_S
            # A measurement is not disturbed by drawing: while a step times, only the line changes.
            if is_step or is_live:
                self._drawn_s = now_s
                self._publish(self._card(), self._card_id, is_update=True)
            if self._controls is not None:
                self._controls.tick = self._tick()
                if is_step or self._is_elsewhere:
                    self._controls.state = self._state()
            if is_step:
                self._chart()
        if is_step and self._workbench.is_busy:
            self._start_clock()

    def _start_clock(self) -> None:
        if self._controls is None or (self._clock is not None and self._clock.is_alive()):
            return
        run = self._context.copy().run
        self._clock = threading.Thread(target=run, args=(self._run_clock,), name="agnitra-clock", daemon=True)
        self._clock.start()

    def _run_clock(self) -> None:
        while not self._workbench.wait(_CLOCK_S):
            self._changed(is_step=False)

    def _tick(self) -> dict[str, Any]:
        value, text = self._workbench.progress
        return {"value": value, "text": text}

    def _state(self) -> dict[str, Any]:
        known = self._workbench
        is_busy = known.is_busy
        files = self._run_files()
        state: dict[str, Any] = {
            "title": " · ".join(filter(None, (known.workload.name, known.device_name))),
            "steps": [
                {
                    "stage": step.stage,
                    "status": step.status,
                    "mark": MARKS[step.status],
                    "word": WORDS[step.status],
                    "time": numbers.seconds(step.wall_s) if step.wall_s is not None else "",
                    "can_redo": step.status in ENDED,
                }
                for step in known.steps
            ],
            "is_busy": is_busy,
            "next": known.steps.following,
            "can_rollback": known.can_rollback,
            "problem": self._problem(),
            "options": self._options(),
            "choices": _CHOICES,
            "suggestions": self._suggestions(),
            "files": file_rows(files),
            "announcement": self._announcement(),
            "page": self._page,
        }
        if self._is_elsewhere:
            state["card"] = self._card()["text/html"]
        return state

    def _options(self) -> dict[str, Any]:
        given = {name: getattr(self._workbench.settings, name) for name in _OPTIONS}
        return {**given, "sampler": given["sampler"] or "none"}

    def _suggestions(self) -> list[dict[str, Any]]:
        proposal, accepted = self._workbench.proposal, self._workbench.settings.accept
        unique = {each.action: each for each in reversed(proposal.suggestions)} if proposal else {}
        return [
            {
                "action": each.action,
                "source": each.source,
                "why": numbers.shortened(numbers.plain_text(each.rationale), _MAX_WHY),
                "is_accepted": accepted is None or each.action in accepted,
            }
            for each in reversed(unique.values())
        ]

    def _announcement(self) -> dict[str, Any]:
        """What a screen reader hears: each step's end once, and no progress."""
        known = self._workbench
        ended = [step for step in known.steps if step.status not in ("waiting", "running")]
        proof = known.proof
        now = (*((step.stage, step.status, step.wall_s) for step in ended), id(proof) if proof else None)
        if now != self._announced:
            is_new = len(now) > 1 or proof is not None
            self._announced = now
            if is_new:
                self._num_announced += 1
                self._spoken = "Rolled back: the original runs again." if proof else ended[-1].announcement
        return {"number": self._num_announced, "text": redact_text(self._spoken)}

    def _problem(self) -> str | None:
        known = self._workbench
        stopped = next((step for step in known.steps if step.status in ("failed", "cancelled")), None)
        if stopped is not None:
            return f"{stopped.stage.capitalize()} {WORDS[stopped.status]}: {stopped.headline}"
        if known.error is not None:
            return redact_text(str(known.error))
        files = self._run_files()
        return files.missing() if files is not None and known.steps.num_ended else None

    def _card(self) -> shown.Bundle:
        files = self._run_files()
        listed = files.all() if files is not None else ()
        problem = files.missing() if files is not None and self._workbench.steps.num_ended else None
        card: shown.Bundle = {
            "text/html": workbench_card_html(self._workbench, listed, problem),
            "text/plain": workbench_card_text(self._workbench, listed),
        }
        return card if self._controls is None else shown.beside_buttons(card)

    def _run_files(self) -> RunFiles | None:
        run = self._workbench.run
        if run is None:
            return None
        if self._files is None or self._files[0] != run.run_id:
            self._files = run.run_id, RunFiles(run.root, run.topic, run.run_id)
        return self._files[1]

    def _chart(self) -> None:
        """The finished run's chart, once a run. Lab keeps an updated Plotly output as it was, so another kind of
        output goes in between."""
        report = self._workbench.report
        if report is None or report.run_id == self._charted_run:
            return
        bundle = shown.chart_bundle(report)
        is_update = self._charted_run is not None
        self._charted_run = report.run_id
        if is_update:
            self._publish({"text/plain": bundle["text/plain"]}, self._chart_id, is_update=True)
        self._publish(bundle, self._chart_id, is_update=is_update)

    def _publish(self, bundle: shown.Bundle, display_id: str, *, is_update: bool) -> None:
        # In the context of the cell that showed it: another thread's output would come under the newest cell.
        self._context.copy().run(shown.send, bundle, display_id=display_id, is_update=is_update)

    # --- from the user ---

    def _heard(self, message: Message) -> None:
        controls = self._controls
        if controls is not None:
            answer(controls, message, lambda: self._act(message))

    def _act(self, message: Message) -> None:
        known, act = self._workbench, message.get("do")
        if act == "next":
            known.run_next(wait=False, **_settings(message))
        elif act == "all":
            known.run_all(wait=False, **_settings(message))
        elif act == "redo":
            known.redo(message["stage"], wait=False, **_settings(message))
        elif act == "cancel":
            known.cancel()
        elif act == "rollback":
            known.rollback(wait=False)
        elif act == "file" and self._controls is not None:
            send_file(self._controls, message, self._run_files())
        elif act == "hello":
            self._greet(str(message.get("page")))

    def _greet(self, page: str) -> None:
        """A page that was loaded after the cell ran gets no updates of the card: from then on the widget shows it."""
        with self._lock:
            if self._page is None:
                self._page = page
            self._is_elsewhere = self._is_elsewhere or page != self._page
            if self._controls is not None:
                self._controls.state = self._state()


def show(workbench: Workbench, *, has_controls: bool = True) -> View:
    """Show a workbench under the cell that runs now; the one that it was shown under before stays as it is."""
    view = View(workbench, has_controls=has_controls and shown.has_front_end())
    view.open()
    return view


def _settings(message: Message) -> dict[str, Any]:
    """The options of a message as settings.

    Raises:
        UsageError: an option that the widget has not.
    """
    given = dict(message.get("options") or {})
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise UsageError(f"Unknown options: {', '.join(unknown)}.", hint=f"Known: {', '.join(_OPTIONS)}.")
    if "sampler" in given:
        given["sampler"] = None if given["sampler"] == "none" else given["sampler"]
    if given.get("accept") is not None:
        given["accept"] = tuple(str(name) for name in given["accept"])
    for name in ("budget_s", "timing_s"):
        if name in given:
            given[name] = float(given[name])
    return given


def _made_controls() -> Controls:
    from agnitra_lab.notebook.widget import Controls

    return Controls(state={}, tick={})
