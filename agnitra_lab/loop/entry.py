"""The loop as three calls: `optimize`, `profile`, `compare`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agnitra_lab.benchmark import compare as comparing
from agnitra_lab.contracts.measurement import Comparison
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.loop import preflight, undisturbed
from agnitra_lab.loop.optimization import Optimization, Progress
from agnitra_lab.loop.result import Result
from agnitra_lab.loop.settings import Settings
from agnitra_lab.profiler import capture
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.profiler.trace import SUFFIXES
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore
from agnitra_lab.workloads.adopt import as_workload


def optimize(
    model: Any, inputs: Any = None, *, name: str | None = None, on_checkpoint: Progress | None = None, **settings: Any
) -> Result:
    """Make a model faster, prove that it is still right, and file the evidence.

    Args:
        model: a `torch.nn.Module` in eval mode (or any callable), or a `Workload`.
        inputs: one call's inputs: a tensor, a sequence, or a mapping of keyword inputs.
        name: what artifacts call it.
        on_checkpoint: called after each stage.
        **settings: fields of `Settings`.

    Returns:
        The result; `result.model` is the drop-in, `result.report` every number, `result.rollback()` the way back.

    Raises:
        UsageError: for wrong arguments, before anything runs.
        MissingError: when no C++ compiler is installed.
    """
    return Optimization(as_workload(model, inputs, name=name), Settings.of(**settings), on_checkpoint).run_all()


def profile(target: Any, inputs: Any = None, *, name: str | None = None, repeat: int | None = None) -> Telemetry:
    """Find out what burns the time of a callable, or of a model on inputs.

    Args:
        target: a function without arguments, a model, or a `Workload`.
        inputs: the model's inputs; None for a function without arguments.
        name: what tables call it.
        repeat: how many calls are captured; by default one of a function, which may have side effects, and three of a
            model on inputs.

    Returns:
        Telemetry: pandas frames `ops`, `kernels`, `nodes`, `modules`, `memory`, `gpu`, and `to_json()`.

    Raises:
        UsageError: a model without the inputs that its forward takes.
    """
    if inputs is None and isinstance(target, torch.nn.Module):
        _check_takes_nothing(target)
    is_plain = inputs is None and not isinstance(target, (Workload, torch.nn.Module))
    chosen = target if is_plain and callable(target) else as_workload(target, inputs, name=name)
    profiled = undisturbed.profile if isinstance(chosen, Workload) else capture.profile
    return profiled(chosen, name=name, repeat=repeat)


def _check_takes_nothing(model: torch.nn.Module) -> None:
    try:
        inspect.signature(model.forward).bind()
    except TypeError as error:
        raise UsageError(
            f"A profile of {type(model).__name__} needs its inputs ({error}).",
            hint="Write: agnitra_lab.profile(model, inputs), with a tensor, a tuple or a mapping.",
        ) from error
    except ValueError:
        # No signature to be read, as of a scripted module: the call itself will say.
        return


def profile_run(
    workload: Workload,
    *,
    artifacts: Path | str,
    repeat: int = 3,
    trace: Path | None = None,
    command: str | None = None,
) -> tuple[Telemetry, Path]:
    """Profile a workload and file it as a run of its own.

    Args:
        workload: what to profile.
        artifacts: folder of the runs.
        repeat: calls to capture.
        trace: a .json or .json.gz file for a Chrome trace.
        command: for the record.

    Returns:
        The telemetry and the directory with telemetry.json, events.parquet, summary.json and run.md.

    Raises:
        UsageError: `trace` ends otherwise.
        RunStoreError: a folder cannot be written.
    """
    store = RunStore(artifacts)
    store.check_writable()
    if trace is not None:
        if not trace.name.endswith(SUFFIXES):
            raise UsageError(f"--trace is {str(trace)!r}.", hint="Expected a file such as trace.json or trace.json.gz.")
        RunStore(trace.parent).check_writable()
    preflight.check_runs(workload)
    run = store.create("profile", workload.name, category="profiles")
    telemetry = undisturbed.profile(workload, name=workload.name, repeat=repeat)
    telemetry.save(run.directory("profiles"))
    if trace is not None:
        telemetry.export_trace(trace)
    meta = provenance.meta(
        run.run_id, "profile", workload.name, command=command, argv=sys.argv, seed=0,
        device=telemetry.record.device, config={"workload": dict(workload.settings), "repeat": repeat},
    )  # fmt: skip
    filed = summary.summarise(meta, summary.profile_results(telemetry.record))
    run.finish("profiles", filed, run_markdown(filed, f"Profile of {workload.name}: where its time goes."))
    return telemetry, run.directory("profiles")


def compare(
    baseline: Any, candidate: Callable[..., Any], inputs: Any = None, *, name: str | None = None, budget_s: float = 6.0
) -> Comparison:
    """Compare two callables on the same inputs: interleaved timing with intervals, and equivalence.

    Args:
        baseline: the model to beat, or a `Workload`.
        candidate: called with the same inputs.
        inputs: one call's inputs.
        name: what tables call the workload.
        budget_s: seconds of timing.
    """
    workload = as_workload(baseline, inputs, name=name)
    return comparing.compare(workload, candidate, candidate_name="candidate", budget_s=budget_s)
