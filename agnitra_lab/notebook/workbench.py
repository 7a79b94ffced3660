"""The loop step by step: plain state and plain methods, which the widget, the card and the tests all use.

workbench = Workbench(model, inputs)      # shown in a notebook: buttons, and a card that grows
workbench.run_next()                      # or run_all(), redo("refine", sampler="random"), cancel(), rollback()
workbench.comparison.speedup              # contracts and frames: telemetry, suggestions, trials, candidates
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.report import STAGES, Checkpoint, StageName
from agnitra_lab.contracts.search import Trial
from agnitra_lab.errors import AgnitraError, UsageError
from agnitra_lab.loop.settings import Settings
from agnitra_lab.notebook.failures import one_line
from agnitra_lab.notebook.findings import Findings
from agnitra_lab.notebook.interrupts import on_stop_button
from agnitra_lab.notebook.job import GRACE_S, Job, Outcome, torch_state
from agnitra_lab.profiler import session
from agnitra_lab.redact import redact_text
from agnitra_lab.report import numbers
from agnitra_lab.workloads.adopt import as_workload

if TYPE_CHECKING:
    from agnitra_lab.loop.optimization import Optimization

DEADLINE_S = 1800.0
# What a later step reads of the settings: a change begins again there.
_READ_BY: dict[str, StageName] = {
    "suggest": "suggest", "llm_base_url": "suggest", "llm_api_key": "suggest", "llm_model": "suggest",
    "llm_deadline_s": "suggest", "accept": "refine", "sampler": "refine", "max_trials": "refine", "seed": "refine",
    "is_warm": "refine", "budget_s": "refine", "timing_s": "patch", "only": "patch",
}  # fmt: skip


class Workbench(Findings):
    """The seven steps over one model, one at a time or all at once, each again with other settings.

    Args:
        model: a `torch.nn.Module` in eval mode (or any callable), or a `Workload`.
        inputs: one call's inputs: a tensor, a sequence, or a mapping of keyword inputs.
        name: what artifacts call it.
        deadline_s: seconds after which a step is cancelled.
        **settings: fields of `Settings`, as `agnitra_lab.optimize` takes them.

    Raises:
        UsageError: wrong arguments. Nothing runs before the first step.
    """

    def __init__(
        self,
        model: Any,
        inputs: Any = None,
        *,
        name: str | None = None,
        deadline_s: float = DEADLINE_S,
        **settings: Any,
    ) -> None:
        if not deadline_s > 0:
            raise UsageError(f"deadline_s is {deadline_s!r}.", hint="Expected seconds above 0.")
        super().__init__(as_workload(model, inputs, name=name), Settings.of(**settings))
        self._deadline_s = deadline_s
        self._is_dirty = False
        self._lock = threading.RLock()
        self._listeners: list[Callable[[bool], None]] = []
        self._context = contextvars.copy_context()
        session.initialise()
        self._torch_state = torch_state()

    # --- what it does ---

    @one_line()
    def run_next(self, *, wait: bool = True, **settings: Any) -> None:
        """Run the next step.

        Args:
            wait: return when it has ended, and raise what it raised; the notebook's stop button cancels it then.
                False returns at once.
            **settings: fields of `Settings` to change first; a step that has read one of them is done again.

        Raises:
            UsageError: a step is running, all have ended, or a setting is wrong.
            AgnitraError: what the step raised, when it is waited for; its own exceptions pass unchanged.
        """
        self._begin(self._following(settings), is_all=False, settings=settings, wait=wait)

    @one_line()
    def run_all(self, *, wait: bool = True, **settings: Any) -> None:
        """Run all steps that are left; arguments and exceptions are those of `run_next`."""
        self._begin(self._following(settings), is_all=True, settings=settings, wait=wait)

    @one_line()
    def redo(self, stage: StageName, *, wait: bool = True, **settings: Any) -> None:
        """Do a step again, with other settings; the steps after it wait, those before it stay.

        Args:
            stage: which one. After the report the compiled candidates are gone: benchmark and report begin at patch.
            wait, **settings: as of `run_next`.

        Raises:
            UsageError: no such step, or one whose turn has not come; else as `run_next`.
        """
        if stage not in STAGES:
            raise UsageError(f"There is no step {stage!r}.", hint=f"Steps: {', '.join(STAGES)}.")
        following = self.steps.following
        if following is not None and STAGES.index(stage) > STAGES.index(following):
            raise UsageError(f"{stage} cannot be done again: {following} comes first.", hint="Run the next step.")
        if stage == "refine" and "is_warm" not in settings:
            # A search that is asked for again does not take what the last one found.
            settings["is_warm"] = False
        self._begin(stage, is_all=False, settings=settings, wait=wait)

    def cancel(self, why: str = "cancelled") -> bool:
        """End what is running, within half a second; what has ended before stays.

        Returns:
            Whether anything was running.
        """
        job = self._job
        if job is None or not self.is_busy:
            return False
        job.cancel(why)
        job.wait(2 * GRACE_S)
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is running; return whether nothing is. Raises nothing that a step raised."""
        job = self._job
        return job is None or job.wait(timeout_s)

    @one_line()
    def rollback(self, *, wait: bool = True) -> RollbackProof | None:
        """Make the drop-in run the original from now on, and prove that nothing of it has changed.

        Returns:
            The proof; None when it is not waited for.

        Raises:
            UsageError: nothing is installed, or a step is running.
            RollbackError: the original is not as it was.
        """
        self._check_idle()
        result = self.result
        if result is None:
            raise UsageError("Nothing to roll back: the report comes first.", hint="Run all steps.")

        def work() -> None:
            self.doing = "restoring the original, and comparing it bit for bit"
            self._changed()
            self.proof = result.rollback()

        self._start(work, name=f"the rollback of {self.workload.name}")
        if wait:
            self._await()
        return self.proof if wait else None

    @one_line()
    def show_search(self, number: int = 1) -> None:
        """Show one kernel search: its curve, its configs as parallel lines, and which parameters decide the time.

        Args:
            number: of the search, from 1 on, in the order of `searches`.

        Raises:
            UsageError: no such search has ended.
        """
        from agnitra_lab.notebook.search_panel import search_card_html, search_card_text
        from agnitra_lab.notebook.show import send

        html = search_card_html(self, number)
        send({"text/html": html, "text/plain": search_card_text(self, number)})

    # --- how it runs ---

    def listen(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` after each change, from whichever thread makes it: True for a step, False for progress."""
        self._listeners.append(listener)

    def deafen(self, listener: Callable[[bool], None]) -> None:
        """Stop calling a listener."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def __repr__(self) -> str:
        line = ", ".join(f"{step.stage} {step.status}" for step in self.steps)
        return f"<agnitra_lab.Workbench {self.workload.name}: {line}>"

    def _ipython_display_(self) -> None:
        from agnitra_lab.notebook.workbench_view import show

        show(self)

    def _following(self, settings: dict[str, Any]) -> StageName:
        following = self.steps.following
        changed = self._first_reader(Settings.of(**{**vars(self.settings), **settings}))
        if changed is not None and (following is None or STAGES.index(changed) < STAGES.index(following)):
            return changed
        if following is None:
            raise UsageError("All seven steps have ended.", hint='Do one again: workbench.redo("refine").')
        return following

    def _first_reader(self, settings: Settings) -> StageName | None:
        """The first step, of those that have ended, that would now read another setting."""
        readers = [
            stage
            for name, stage in _READ_BY.items()
            if getattr(settings, name) != getattr(self.settings, name) and self.steps[stage].has_ended
        ]
        return min(readers, key=STAGES.index, default=None)

    def _begin(self, stage: StageName, *, is_all: bool, settings: dict[str, Any], wait: bool) -> None:
        self._check_idle()
        given = Settings.of(**{**vars(self.settings), **settings})
        first = self._first_reader(given)
        stage = min((stage, first), key=STAGES.index) if first else stage
        # Where somebody deleted the run's folder, a new run takes over what is known, and files it again.
        is_again = self._pass is not None and (
            self._is_dirty
            or self.steps.following != stage
            or given != self._pass.settings
            or not self._pass.run.is_there
        )
        if self._pass is not None and is_again:
            from agnitra_lab.loop.redo import stages_taken

            taken = stages_taken(self._pass, stage)
            last = STAGES[-1] if is_all else stage
            stage = STAGES[len(taken)]
        else:
            last = STAGES[-1] if is_all else stage
        self.settings = given
        stages = STAGES[STAGES.index(stage) : STAGES.index(last) + 1]
        self.steps.restart_at(stage)
        self._forget(stage)
        self._start(lambda: self._work(stages, is_again), name=self.workload.name)
        if wait:
            self._await()

    def _check_idle(self) -> None:
        if self.is_busy:
            step = self.steps.current
            what = step.stage if step else "The rollback"
            raise UsageError(f"{what} is running.", hint="Wait for it, or cancel it: workbench.cancel()")

    def _forget(self, stage: StageName) -> None:
        """Drop what belongs to the steps that are done again."""
        position = STAGES.index(stage)
        self.result = self.proof = None
        if position <= STAGES.index("patch"):
            self._logs = ()
        if position <= STAGES.index("refine"):
            self._trials = []

    def _start(self, work: Callable[[], None], *, name: str) -> None:
        self.error, self.doing = None, ""
        self._printed.clear()
        job = Job(
            work, name=name, deadline_s=self._deadline_s, tell=self._tell, log=self._note_printed,
            on_end=self._ended, state=self._torch_state, context=self._context,
        )  # fmt: skip
        with self._lock:
            self._job = job
        self._began_s = time.monotonic()
        on_stop_button(job)
        job.start()
        self._changed()

    def _work(self, stages: Sequence[StageName], is_again: bool) -> None:
        job = self._job
        self._enter(stages[0])
        # Loading the stages takes a second or two: the card is on the page before that.
        self._tell("loading the stages")
        from agnitra_lab.loop import Optimization, redo

        if self._pass is None:
            self._pass = Optimization(self.workload, self.settings)
        elif is_again:
            self._is_dirty = True
            self._pass = redo(self._pass, stages[0], self.settings)
        passing = self._pass
        passing.on_progress, passing.on_trial = self._tell, self._note_trial
        for stage in stages:
            if stage != stages[0]:
                self._enter(stage)
            self._is_dirty = True
            value = getattr(passing, stage)()
            # A thread that was given up on must not report into the pass that came after it.
            if self._job is not job or (job is not None and job.why is not None):
                return
            self._leave(stage, value, passing)

    def _enter(self, stage: StageName) -> None:
        self._began_s = time.monotonic()
        self.doing = ""
        self.steps.begin(stage)
        self._changed()

    def _leave(self, stage: StageName, value: Any, passing: Optimization) -> None:
        if stage == "patch":
            self._logs = tuple(patch.log() for patch in passing.patches.values())
        if stage == "report":
            self.result = value
        self._is_dirty = False
        self.doing = ""
        point: Checkpoint = passing.checkpoints[-1]
        self.steps.end(point)
        self._changed()

    def _ended(self, outcome: Outcome, failure: BaseException | None) -> None:
        step, job = self.steps.current, self._job
        self.doing = ""
        if outcome == "failed":
            self.error = failure
        if step is not None and outcome != "done":
            why = _sentence(failure) if outcome == "failed" else f"{(job and job.why) or 'cancelled'}"
            self.steps.stop(step.stage, outcome, why, time.monotonic() - self._began_s)
            passing = self._pass
            if passing is not None and passing.lab is not None:
                # The search's own process is ended; it waits for nothing that the kernel has.
                threading.Thread(target=passing.close, daemon=True).start()
        # Declared from within the job, which counts as busy until this returns.
        threading.Thread(target=self._changed_once_idle, args=(job,), daemon=True).start()

    def _changed_once_idle(self, job: Job | None) -> None:
        if job is not None:
            job.wait()
        self._changed()

    def _await(self) -> None:
        job = self._job
        assert job is not None
        try:
            job.wait()
        except KeyboardInterrupt:
            job.cancel("stopped by an interrupt")
            job.wait(2 * GRACE_S)
            raise
        if self.error is not None:
            raise self.error
        if job.why is not None:
            raise AgnitraError(f"The step was cancelled: {job.why}.", hint="Run it again: workbench.run_next()")

    def _tell(self, what: str) -> None:
        self.doing = numbers.plain_text(redact_text(what))
        self._changed(is_step=False)

    def _note_trial(self, site: Site, trial: Trial) -> None:
        self._trials.append((site, trial))
        count = sum(other == site for other, _ in self._trials)
        self._tell(f"trial {count} of at most {self.settings.max_trials} at {site.key()}")

    def _changed(self, is_step: bool = True) -> None:
        for listener in tuple(self._listeners):
            listener(is_step)


def _sentence(failure: BaseException | None) -> str:
    """What went wrong, as one line."""
    if isinstance(failure, AgnitraError):
        return str(failure)
    return f"{type(failure).__name__}: {failure}"
