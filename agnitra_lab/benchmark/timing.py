"""Interleaved timing of two callables in one process: cold caches, fresh inputs at fresh addresses, idle to idle."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from agnitra_lab.benchmark.cold import ColdCache
from agnitra_lab.benchmark.outputs import fingerprint
from agnitra_lab.contracts.workload import Inputs
from agnitra_lab.device.graphs import capture
from agnitra_lab.device.info import synchronize

Side = Literal["baseline", "candidate"]
# Each side follows itself and the other equally often, and linear drift falls on both alike.
_ORDERS: tuple[tuple[Side, ...], ...] = (
    ("baseline", "candidate", "candidate", "baseline"),
    ("candidate", "baseline", "baseline", "candidate"),
)
_NUM_INPUT_SETS = 3
_MIN_WARM_CALLS, _WARM_SHARE = 2, 0.15
# Past this many budgets (and this many seconds) a loop of very long calls ends with half of the pairs.
_MAX_OVERRUN, _MIN_OVERRUN_S = 3.0, 20.0
_MAX_DEVICE_SPANS, _DEVICE_SHARE = 15, 0.15
_SPIN_CYCLES_PER_S, _MAX_SPIN_S = 2e9, 0.05
_KERNEL_SAMPLES, _KERNEL_BUDGET_S, _MIN_KERNEL_SAMPLES = 20, 0.1, 5

# Bound at import: a candidate that replaces the clock or the wait later changes nothing here.
_clock_ns = time.perf_counter_ns
_wait = synchronize


@dataclass
class PairTimings:
    """Times of single calls. Element i of `baseline_ms` was taken next to element i of `candidate_ms`.

    Attributes:
        baseline_ms, candidate_ms: host wall time, device idle to device idle, in ms, in the order of the calls; so the
            baseline's element i and i + 1 are its own noise (A/A).
        baseline_device_ms, candidate_device_ms: device spans in ms, None on a CPU.
        prints: (side, input set, fingerprint of that call's output) of timed calls.
    """

    baseline_ms: np.ndarray
    candidate_ms: np.ndarray
    baseline_device_ms: np.ndarray | None = None
    candidate_device_ms: np.ndarray | None = None
    prints: list[tuple[Side, int, list[torch.Tensor]]] = field(default_factory=list)


def time_pair(
    baseline: Callable[..., Any],
    candidate: Callable[..., Any],
    make_args: Callable[[int], Inputs],
    *,
    device: torch.device | str,
    budget_s: float,
    min_pairs: int = 12,
    max_pairs: int = 200,
    num_input_sets: int = _NUM_INPUT_SETS,
    reset: Callable[[Side], None] | None = None,
) -> PairTimings:
    """Time two callables against each other, A/B/B/A then B/A/A/B.

    Outside the timed span of every call: the input copy, `reset`, the cache sweep, a wait for the device, and the
    fingerprint of the output. The garbage collector is off; each call runs in its own `torch.no_grad()`.

    Args:
        baseline: callable A.
        candidate: callable B.
        make_args: input set number -> a fresh copy of its inputs; earlier copies stay alive, so that addresses move.
        device: where they run.
        budget_s: time for the whole loop; `min_pairs` are taken even if that takes longer, half of them once it has
            taken three times the budget and 20 s.
        min_pairs: pairs to take at least.
        max_pairs: pairs to take at most.
        num_input_sets: how many input sets rotate.
        reset: called with the side before each call, to restore what the call before it wrote.
    """
    started_s = time.perf_counter()
    bench = _Bench(
        {"baseline": baseline, "candidate": candidate}, make_args, torch.device(device), num_input_sets, reset
    )
    call_s = bench.warm(budget_s * _WARM_SHARE)
    bench.cold = ColdCache(bench.device, call_s=call_s)
    is_cuda = bench.device.type == "cuda"
    loop_budget_s = budget_s * (1.0 - (_DEVICE_SHARE if is_cuda else 0.0))
    times: dict[Side, list[float]] = {"baseline": [], "candidate": []}
    with _collector_off():
        loop_started_s = time.perf_counter()
        for group in range(max(max_pairs // 2, 1)):
            for side in _ORDERS[group % 2]:
                times[side].append(bench.time_once(side, group % num_input_sets))
            elapsed_s = time.perf_counter() - started_s
            num_pairs = 2 * (group + 1)
            is_overrun = time.perf_counter() - loop_started_s > max(_MAX_OVERRUN * budget_s, _MIN_OVERRUN_S)
            needed = min_pairs // 2 if is_overrun else min_pairs
            if num_pairs >= needed and elapsed_s > loop_budget_s:
                break
        spans = bench.device_spans(budget_s * _DEVICE_SHARE, call_s) if is_cuda else {}
    samples = {side: np.asarray(values) for side, values in times.items()}
    return PairTimings(
        samples["baseline"], samples["candidate"],
        spans.get("baseline"), spans.get("candidate"), bench.prints,
    )  # fmt: skip


def measure_kernel(call: Callable[[], Any], *, device: torch.device | str) -> float:
    """Measure one kernel call: the median of at least 20 cold-cache samples, or of what 100 ms allow (at least 5).

    Args:
        call: launches the work; the first call may compile.
        device: where it runs.

    Returns:
        Device time in ms on CUDA, of a CUDA graph's replay: a short kernel's own launch takes longer than the kernel.
        Host time in ms on a CPU.
    """
    chosen = torch.device(device)
    with torch.no_grad(), _collector_off():
        call()
        _wait(chosen)
        if chosen.type == "cuda":
            call = _captured(call)
        started_ns = _clock_ns()
        call()
        _wait(chosen)
        cold = ColdCache(chosen, call_s=(_clock_ns() - started_ns) / 1e9)
        samples_ms: list[float] = []
        deadline_ns = _clock_ns() + int(_KERNEL_BUDGET_S * 1e9)
        while len(samples_ms) < _KERNEL_SAMPLES:
            cold()
            samples_ms.append(_span_ms(call) if chosen.type == "cuda" else _wall_ms(call, chosen))
            if len(samples_ms) >= _MIN_KERNEL_SAMPLES and _clock_ns() > deadline_ns:
                break
    return float(np.median(samples_ms))


@dataclass
class _Bench:
    sides: dict[Side, Callable[..., Any]]
    make_args: Callable[[int], Inputs]
    device: torch.device
    num_input_sets: int
    reset: Callable[[Side], None] | None
    cold: Callable[[], None] | None = None
    prints: list[tuple[Side, int, list[torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # While two earlier copies live, the next one cannot take their addresses.
        self._alive: deque[Inputs] = deque(maxlen=2)

    def _prepare(self, side: Side, input_set: int) -> Inputs:
        inputs = self.make_args(input_set)
        self._alive.append(inputs)
        if self.reset is not None:
            self.reset(side)
        if self.cold is not None:
            self.cold()
        _wait(self.device)
        return inputs

    def time_once(self, side: Side, input_set: int) -> float:
        args, kwargs = self._prepare(side, input_set)
        function = self.sides[side]
        with torch.no_grad():
            started_ns = _clock_ns()
            output = function(*args, **kwargs)
            _wait(self.device)
            elapsed_ns = _clock_ns() - started_ns
        self.prints.append((side, input_set, fingerprint(output)))
        return elapsed_ns / 1e6

    def warm(self, budget_s: float) -> float:
        """Call both in turn until clocks and caches have settled; return the longer side's last time in s."""
        started_s = time.perf_counter()
        last_ms: dict[Side, float] = {}
        num_rounds = 0
        while num_rounds < _MIN_WARM_CALLS or (time.perf_counter() - started_s < budget_s and num_rounds < 50):
            for side in self.sides:
                last_ms[side] = self.time_once(side, num_rounds % self.num_input_sets)
            num_rounds += 1
        return max(last_ms.values()) / 1e3

    def device_spans(self, budget_s: float, call_s: float) -> dict[Side, np.ndarray]:
        """Time on the device alone: a spinning kernel holds the stream until the host has queued the whole call."""
        spin_cycles = int(min(2.0 * call_s, _MAX_SPIN_S) * _SPIN_CYCLES_PER_S)
        spans: dict[Side, list[float]] = {side: [] for side in self.sides}
        deadline_s = time.perf_counter() + budget_s
        for repeat in range(_MAX_DEVICE_SPANS):
            for side, function in self.sides.items():
                args, kwargs = self._prepare(side, repeat % self.num_input_sets)
                torch.cuda._sleep(spin_cycles)
                with torch.no_grad():
                    spans[side].append(_span_ms(lambda f=function, a=args, k=kwargs: f(*a, **k)))  # type: ignore[misc]
            if repeat + 1 >= 3 and time.perf_counter() > deadline_s:
                break
        return {side: np.asarray(values) for side, values in spans.items()}


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of one call; the call itself where it cannot be captured."""
    try:
        graph, _ = capture(call)
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    graph.replay()
    return graph.replay


def _wall_ms(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started_ns = _clock_ns()
    call()
    _wait(device)
    return (_clock_ns() - started_ns) / 1e6


def _span_ms(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def _collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
