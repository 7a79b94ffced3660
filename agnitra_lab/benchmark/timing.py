"""Interleaved timing of callables in one process: cold caches, fresh inputs at fresh addresses, idle to idle."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch

from agnitra_lab.benchmark.cold import ColdCache
from agnitra_lab.benchmark.outputs import fingerprint
from agnitra_lab.contracts.workload import Inputs
from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.device.graphs import capture
from agnitra_lab.device.info import synchronize

Side = Literal["baseline", "candidate"]
_MIN_WARM_CALLS, _WARM_SHARE = 2, 0.15
# Past this many budgets (and this many seconds) a loop of very long calls ends with half of the pairs.
_MAX_OVERRUN, _MIN_OVERRUN_S = 3.0, 20.0
_MAX_DEVICE_SPANS, _DEVICE_SHARE = 15, 0.15
_SPIN_CYCLES_PER_S, _MAX_SPIN_S = 2e9, 0.05
_BRIEF_PAIRS, _PAIRS, _PLAIN_RATIO, _PLAIN_ERROR = 20, 50, 1.5, 0.005
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
        prints: (side, round, fingerprint of that call's output) of every call.
    """

    baseline_ms: np.ndarray
    candidate_ms: np.ndarray
    baseline_device_ms: np.ndarray | None = None
    candidate_device_ms: np.ndarray | None = None
    prints: list[tuple[Side, int, list[torch.Tensor]]] = field(default_factory=list)


@dataclass
class GroupTimings:
    """Times of single calls of several sides. Element i of each side's times comes from one round of calls.

    Attributes:
        wall_ms: side -> host wall times, device idle to device idle, in ms.
        device_ms: side -> device spans in ms, empty on a CPU.
        prints: (side, round, fingerprint of that call's output) of every call.
    """

    wall_ms: dict[str, np.ndarray]
    device_ms: dict[str, np.ndarray]
    prints: list[tuple[str, int, list[torch.Tensor]]]


def time_pair(
    baseline: Callable[..., Any],
    candidate: Callable[..., Any],
    make_args: Callable[[int], Inputs],
    *,
    device: torch.device | str,
    budget_s: float,
    min_pairs: int = 12,
    max_pairs: int = 200,
    reset: Callable[[Side], None] | None = None,
    is_brief: bool = False,
) -> PairTimings:
    """Time two callables against each other, A/B/B/A then B/A/A/B: `time_group` of two sides.

    Args:
        baseline: callable A.
        candidate: callable B.
        make_args, device, budget_s, reset: as in `time_group`.
        min_pairs: pairs to take at least, as `min_rounds` there.
        max_pairs: pairs to take at most.
        is_brief: end where more pairs would change no decision, as `is_plain` says, after 20 of them or more; without
            it after 50, which have a tail to report.
    """
    sides: dict[str, Callable[..., Any]] = {"baseline": baseline, "candidate": candidate}
    timed = time_group(
        sides, make_args, device=device, budget_s=budget_s, min_rounds=min_pairs, max_rounds=max_pairs,
        reset=cast("Callable[[str], None] | None", reset),
        is_enough=lambda times: is_plain(times["baseline"], times["candidate"], _BRIEF_PAIRS if is_brief else _PAIRS),
    )  # fmt: skip
    return PairTimings(
        timed.wall_ms["baseline"], timed.wall_ms["candidate"],
        timed.device_ms.get("baseline"), timed.device_ms.get("candidate"),
        cast("list[tuple[Side, int, list[torch.Tensor]]]", timed.prints),
    )  # fmt: skip


def is_plain(baseline_ms: Sequence[float], candidate_ms: Sequence[float], num_pairs: int) -> bool:
    """Say whether pairs leave no doubt about which side is faster, and know the candidate's own median well.

    Eager decoding waits 30 ms for its host, the candidate takes 1 ms: two seconds would buy 60 pairs of which the first
    dozen say the same.

    Args:
        baseline_ms, candidate_ms: times in pairs, in any unit.
        num_pairs: how many there have to be.
    """
    ratios = np.asarray(baseline_ms) / np.asarray(candidate_ms)
    if ratios.size < num_pairs or not (
        np.quantile(ratios, 0.1) > _PLAIN_RATIO or np.quantile(ratios, 0.9) < 1 / _PLAIN_RATIO
    ):
        return False
    low, middle, high = np.quantile(candidate_ms, (0.25, 0.5, 0.75))
    # Of a normal distribution: the quartiles are 1.35 deviations apart, a median's error is 1.25 times a mean's.
    return bool(1.25 * (high - low) / 1.35 / np.sqrt(ratios.size) < _PLAIN_ERROR * middle)


def time_group(
    sides: Mapping[str, Callable[..., Any]],
    make_args: Callable[[int], Inputs],
    *,
    device: torch.device | str,
    budget_s: float,
    min_rounds: int = 12,
    max_rounds: int = 200,
    reset: Callable[[str], None] | None = None,
    is_enough: Callable[[Mapping[str, Sequence[float]]], bool] | None = None,
) -> GroupTimings:
    """Time callables against each other in rounds: each once a round, in an order that favours none.

    Outside the timed span of every call: the input copy, `reset`, the cache sweep, a wait for the device, and the
    fingerprint of the output. The garbage collector is off; each call runs in its own `torch.no_grad()`. Where
    processes share the device, this one has it to itself.

    Args:
        sides: name -> callable.
        make_args: number of the round -> a new copy of its inputs, the same values for all sides; the numbers rise
            from the first call that warms up. Earlier copies stay alive, so that addresses move.
        device: where they run.
        budget_s: time for the whole loop; `min_rounds` are taken even if that takes longer, half of them once it has
            taken three times the budget and 20 s.
        min_rounds: rounds, and so samples a side, to take at least.
        max_rounds: rounds to take at most; they come in twos.
        reset: called with the side before each call, to restore what the call before it wrote.
        is_enough: asked after every second round, with the times of each side so far; ends the rounds early.
    """
    bench = _Bench(dict(sides), make_args, torch.device(device), reset)
    with exclusive():
        started_s = time.perf_counter()
        call_s = bench.warm(budget_s * _WARM_SHARE)
        bench.cold = ColdCache(bench.device, call_s=call_s)
        is_cuda = bench.device.type == "cuda"
        loop_budget_s = budget_s * (1.0 - (_DEVICE_SHARE if is_cuda else 0.0))
        names = list(sides)
        times: dict[str, list[float]] = {name: [] for name in names}
        with _collector_off():
            loop_started_s = time.perf_counter()
            for turn in range(max(max_rounds // 2, 1)):
                for index in (2 * turn, 2 * turn + 1):
                    for side in _order(names, index):
                        times[side].append(bench.time_once(side))
                    bench.round += 1
                elapsed_s = time.perf_counter() - started_s
                is_overrun = time.perf_counter() - loop_started_s > max(_MAX_OVERRUN * budget_s, _MIN_OVERRUN_S)
                needed = min_rounds // 2 if is_overrun else min_rounds
                is_done = elapsed_s > loop_budget_s or (is_enough is not None and is_enough(times))
                if 2 * (turn + 1) >= needed and is_done:
                    break
            spans = bench.device_spans(budget_s * _DEVICE_SHARE, call_s) if is_cuda else {}
    return GroupTimings({side: np.asarray(values) for side, values in times.items()}, spans, bench.prints)


def _order(names: Sequence[str], index: int) -> list[str]:
    """Return the order of one round: over 2n rounds each side follows each other one equally often.

    Every second round is the one before it backwards, so that linear drift falls on all sides alike; of two sides that
    is A/B/B/A, then B/A/A/B.

    Source: Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.
    """
    size = len(names)
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(size)]
    order = [names[(place + index // 2) % size] for place in zigzag]
    return order[::-1] if index % 2 else order


def measure_kernel(call: Callable[[], Any], *, device: torch.device | str) -> float:
    """Measure one kernel call: the median in ms of `sample_kernel`.

    Args:
        call, device: as there.
    """
    return float(np.median(sample_kernel(call, device=device)[0]))


def sample_kernel(
    call: Callable[[], Any],
    *,
    device: torch.device | str,
    is_hopeless: Callable[[Sequence[float]], bool] | None = None,
) -> tuple[tuple[float, ...], bool]:
    """Take 20 cold-cache samples of one kernel call, or what 100 ms allow (at least 5).

    Args:
        call: launches the work; the first call may compile.
        device: where it runs.
        is_hopeless: handed the samples so far after each but the last; True ends the sampling.

    Returns:
        The samples in ms, in the order in which they were taken, and whether `is_hopeless` ended them early. Device
        time on CUDA, of a CUDA graph's replay: a short kernel's own launch takes longer than the kernel. Host time on
        a CPU.
    """
    chosen = torch.device(device)
    with exclusive(), torch.no_grad(), _collector_off():
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
            if is_hopeless is not None and len(samples_ms) < _KERNEL_SAMPLES and is_hopeless(samples_ms):
                return tuple(samples_ms), True
    return tuple(samples_ms), False


@dataclass
class _Bench:
    sides: dict[str, Callable[..., Any]]
    make_args: Callable[[int], Inputs]
    device: torch.device
    reset: Callable[[str], None] | None
    cold: Callable[[], None] | None = None
    round: int = 0
    prints: list[tuple[str, int, list[torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # While two earlier copies live, the next one cannot take their addresses.
        self._alive: deque[Inputs] = deque(maxlen=2)

    def _prepare(self, side: str) -> Inputs:
        inputs = self.make_args(self.round)
        self._alive.append(inputs)
        if self.reset is not None:
            self.reset(side)
        if self.cold is not None:
            self.cold()
        _wait(self.device)
        return inputs

    def time_once(self, side: str) -> float:
        args, kwargs = self._prepare(side)
        function = self.sides[side]
        with torch.no_grad():
            started_ns = _clock_ns()
            output = function(*args, **kwargs)
            _wait(self.device)
            elapsed_ns = _clock_ns() - started_ns
        self.prints.append((side, self.round, fingerprint(output)))
        return elapsed_ns / 1e6

    def warm(self, budget_s: float) -> float:
        """Call all in turn until clocks and caches have settled; return the longest side's last time in s."""
        started_s = time.perf_counter()
        last_ms: dict[str, float] = {}
        num_rounds = 0
        while num_rounds < _MIN_WARM_CALLS or (time.perf_counter() - started_s < budget_s and num_rounds < 50):
            for side in self.sides:
                last_ms[side] = self.time_once(side)
            self.round += 1
            num_rounds += 1
        return max(last_ms.values()) / 1e3

    def device_spans(self, budget_s: float, call_s: float) -> dict[str, np.ndarray]:
        """Time on the device alone: a spinning kernel holds the stream until the host has queued the whole call."""
        spin_cycles = int(min(2.0 * call_s, _MAX_SPIN_S) * _SPIN_CYCLES_PER_S)
        spans: dict[str, list[float]] = {side: [] for side in self.sides}
        deadline_s = time.perf_counter() + budget_s
        for repeat in range(_MAX_DEVICE_SPANS):
            for side, function in self.sides.items():
                args, kwargs = self._prepare(side)
                torch.cuda._sleep(spin_cycles)
                with torch.no_grad():
                    spans[side].append(_span_ms(lambda f=function, a=args, k=kwargs: f(*a, **k)))  # type: ignore[misc]
            self.round += 1
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
