"""Begin a new pass of the loop midway: what the stages before found is taken over and filed in the new run as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from agnitra_lab.contracts.report import STAGES, StageName
from agnitra_lab.errors import RunStoreError
from agnitra_lab.loop import filing
from agnitra_lab.loop.optimization import Optimization
from agnitra_lab.loop.settings import Settings


def redo(earlier: Optimization, stage: StageName, settings: Settings) -> Optimization:
    """Begin again at a stage, with other settings.

    Args:
        earlier: the pass to begin from. Unless it is finished its run is taken away, so that a directory always holds
            one consistent pass; a finished one stays as it is, with its drop-in.
        stage: the first stage to do again.
        settings: of the new pass.

    Returns:
        The new pass, ready for `stage`.

    Raises:
        RunStoreError: when the artifacts folder cannot be written.
    """
    taken = stages_taken(earlier, stage)
    fresh = Optimization(earlier.workload, settings, earlier.on_checkpoint)
    fresh.on_progress, fresh.on_trial = earlier.on_progress, earlier.on_trial
    for name in taken:
        _TAKE[name](fresh, earlier)
    for point in earlier.checkpoints:
        if point.stage in taken:
            fresh.checkpoints.append(point)
            fresh.emit("stage.completed", **point.model_dump(exclude={"wall_s"}), taken_from=earlier.run.run_id)
    earlier.close()
    for patch in earlier.patches.values():
        if patch not in fresh.patches.values():
            patch.discard()
    with contextlib.suppress(RunStoreError):
        # Nobody reads it, so what is left of it is worth no failure.
        earlier.run.discard()
    return fresh


def stages_taken(earlier: Optimization, stage: StageName) -> tuple[StageName, ...]:
    """Name the stages whose results a redo at `stage` takes over.

    A finished pass has let its compiled candidates go: what needs them begins at `patch` again.
    """
    done = {point.stage for point in earlier.checkpoints}
    if "report" in done and stage in ("benchmark", "report"):
        stage = "patch"
    wanted = STAGES[: STAGES.index(stage)]
    num_done = next((index for index, name in enumerate(wanted) if name not in done), len(wanted))
    return wanted[:num_done]


def _take_profile(fresh: Optimization, earlier: Optimization) -> None:
    fresh.telemetry, fresh.profile_of_workload = earlier.telemetry, earlier.profile_of_workload
    filing.file_profile(fresh.run, fresh.telemetry)


def _take_suggestions(fresh: Optimization, earlier: Optimization) -> None:
    fresh.proposal, fresh.surveyed, fresh.advice = earlier.proposal, earlier.surveyed, earlier.advice
    filing.file_proposal(fresh.run, fresh.proposal)


def _take_searches(fresh: Optimization, earlier: Optimization) -> None:
    fresh.searches, fresh.tuned, fresh.refused = earlier.searches, earlier.tuned, earlier.refused
    fresh.ledgers = earlier.ledgers
    filing.file_searches(fresh.run, fresh.searches, fresh.ledgers)


def _take_kernels(fresh: Optimization, earlier: Optimization) -> None:
    fresh.kernels = earlier.kernels
    filing.file_kernels(fresh.run, fresh.kernels.kernels)


def _take_patches(fresh: Optimization, earlier: Optimization) -> None:
    fresh.patches, fresh.results, fresh.peaks = dict(earlier.patches), list(earlier.results), earlier.peaks
    fresh.tried = dict(earlier.tried)
    filing.file_patches(fresh.run, fresh.patches)


def _take_comparisons(fresh: Optimization, earlier: Optimization) -> None:
    fresh.winner, fresh.comparison, fresh.against_best = earlier.winner, earlier.comparison, earlier.against_best
    filing.file_comparisons(fresh.run, fresh.results)


_TAKE: dict[StageName, Callable[[Optimization, Optimization], None]] = {
    "profile": _take_profile,
    "suggest": _take_suggestions,
    "refine": _take_searches,
    "generate": _take_kernels,
    "patch": _take_patches,
    "benchmark": _take_comparisons,
}
