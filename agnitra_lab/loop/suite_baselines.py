"""The baselines of the suite: eager and torch.compile's modes as a careful user calls them, without our drop-in."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from agnitra_lab.benchmark.inputs import fixed_tensors, redraw, shifted_copy
from agnitra_lab.benchmark.state import ModuleState
from agnitra_lab.contracts.suite import EAGER
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.exclusive import exclusive, waited_s
from agnitra_lab.device.info import synchronize
from agnitra_lab.graph.tree import untouched

MODES = {"cuda": ("default", "reduce-overhead", "max-autotune"), "cpu": ("default",)}
"""Modes by device. On a CPU reduce-overhead is the default under another name."""

KNOWN_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Modes share the code of the model's forward, where Dynamo keeps what it compiled; this many fit.
_RECOMPILE_LIMIT = 64
# A CUDA graph of Inductor's is recorded at the second call and replayed from the third on.
_NUM_SETTLING_CALLS = 2


@dataclass(frozen=True)
class Contestant:
    """A callable that takes the workload's inputs, or the reason why there is none.

    Attributes:
        name: "eager", a mode, or "agnitra".
        call: None where it failed.
        compile_s: seconds of the first call; None for eager.
        error: why `call` is None.
    """

    name: str
    call: Callable[..., Any] | None
    compile_s: float | None = None
    error: str | None = None


def compile_baseline(workload: Workload, mode: str, state: ModuleState, device: torch.device) -> Contestant:
    """Compile the workload's model with a mode by calling it once, on inputs like its own.

    Args:
        workload: its model is compiled as it is.
        mode: of torch.compile; "eager" compiles nothing.
        state: the model's, restored after the call.
        device: where the model runs.

    Returns:
        The contestant; with `error` and without `call` when it does not compile or run.
    """
    if mode == EAGER:
        return Contestant(EAGER, workload.model)
    started_s, waited_before_s = time.perf_counter(), waited_s()
    try:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            call = _in_steps(torch.compile(workload.model, mode=mode), device)
            run_once(workload, call, state, device)
    except Exception as error:
        return Contestant(mode, None, error=one_line(error))
    return Contestant(mode, call, time.perf_counter() - started_s - (waited_s() - waited_before_s))


def settle(workload: Workload, contestant: Contestant, state: ModuleState, device: torch.device) -> Contestant:
    """Call a contestant a few times, so that graphs are recorded; one that raises becomes one without a call."""
    if contestant.call is None:
        return contestant
    try:
        for seed in range(_NUM_SETTLING_CALLS):
            run_once(workload, contestant.call, state, device, seed=seed)
    except Exception as error:
        return replace(contestant, call=None, error=one_line(error))
    return contestant


def run_once(
    workload: Workload, call: Callable[..., Any], state: ModuleState, device: torch.device, *, seed: int = 0
) -> None:
    """Call once on inputs of its own and wait for the device; what the call wrote to the model is put back."""
    places = fixed_tensors(workload)
    with untouched(places):
        args, kwargs = shifted_copy(redraw(workload, seed), places)
        try:
            with torch.no_grad():
                call(*args, **kwargs)
            synchronize(device)
        finally:
            state.restore()


@contextmanager
def cold_caches(folder: Path | None) -> Iterator[None]:
    """Compile as in a new process: nothing that was compiled before is found, in memory or on disk.

    Args:
        folder: where this block's own caches go; None keeps the process's caches, for warm runs.
    """
    if folder is None:
        yield
        return
    from torch._inductor import utils

    folder.mkdir(parents=True, exist_ok=True)
    # The files stay: what was compiled loads some of them late.
    with utils.fresh_cache(dir=str(folder), delete=False):
        yield


def autotune_in_turns() -> None:
    """Let each measurement of Inductor's own tuning wait for its turn at the device, in this process from now on."""
    from torch._inductor.runtime.benchmarking import benchmarker

    # Set on the one instance that all of Inductor uses; which methods there are differs between versions of torch.
    for name in dir(type(benchmarker)):
        if name.startswith("benchmark"):
            setattr(benchmarker, name, _in_turn(getattr(benchmarker, name)))


def release_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split())[:600]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _in_steps(compiled: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Mark each call as a step of its own, without which Inductor's CUDA graphs keep all earlier outputs alive."""
    if device.type != "cuda":
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    return call


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def measure(*args: Any, **kwargs: Any) -> Any:
        with exclusive():
            return method(*args, **kwargs)

    return measure
