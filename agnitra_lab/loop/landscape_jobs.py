"""What runs in the process that has the GPU while a landscape is recorded: first runs, rounds of samples, baselines.

A sample is the span between two CUDA events around one replay of a CUDA graph of one call; the L2 is filled with clean
lines by reading a buffer before the first event. A batch is queued as a whole behind a spinning kernel, so that the
device never waits for the host inside a span. On a CPU (Triton's interpreter) it is the wall time of a call.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from agnitra_lab.benchmark.elements import rtol_of
from agnitra_lab.benchmark.worker_main import classify
from agnitra_lab.device import info, nvml
from agnitra_lab.generate import registry
from agnitra_lab.graph.tree import tensors
from agnitra_lab.loop.compile_jobs import short
from agnitra_lab.refine.landscape_recording import Lines
from agnitra_lab.refine.landscape_task import Target, Task

_REQUIRED_SHARE = 0.999
_FLUSH_BYTES = 256 * 2**20
_SPIN_CYCLES = 400_000
"""Some 0.2 ms, in which the host queues the first samples of a batch."""
_BATCH = 24
_BASELINE_SAMPLES = 50

Item = tuple[int, dict[str, int]]


def warm(device: str) -> tuple[dict[str, Any], Target | None]:
    """Load torch and Triton and start the device.

    Returns:
        What the device is, and Triton's target (None where nothing is compiled).
    """
    _follow_launches()
    described = dict(info.describe(device).model_dump(mode="json"))
    if not device.startswith("cuda"):
        return described, None
    import triton

    torch.zeros(1, device=device)
    target = triton.runtime.driver.active.get_current_target()
    return described, (target.backend, target.arch, target.warp_size)


def screen(task: Task, items: Sequence[Item], num_samples: int) -> None:
    """Run configs for the first time: hold their output against the reference and take a few samples of each."""
    stand = _stand_of(task)
    for config, params in items:
        stand.lines.add("begin", i=config)
        try:
            stand.first_run(config, params, num_samples)
        except Exception as error:
            status = classify(error)
            stand.lines.add("failed", i=config, failure=_failure_of(error, status), detail=short(error))
            if status == "device_lost":
                raise
            if status == "out_of_memory":
                torch.cuda.empty_cache()
    stand.read_sensors()


def sweep(task: Task, items: Sequence[Item], number: int, num_samples: int, is_careful: bool) -> None:
    """Take one round of samples of configs that have run before.

    Args:
        task: which landscape.
        items: the configs, in the order in which they are sampled.
        number: of the round.
        num_samples: of each config.
        is_careful: say before each config that it begins, so that one that ends the process is known.
    """
    stand = _stand_of(task)
    size = 1 if is_careful else _BATCH
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        if is_careful:
            stand.lines.add("begin", i=batch[0][0])
        began_s = time.perf_counter()
        calls = [stand.call_of(config, params) for config, params in batch]
        samples = stand.sample(calls, num_samples)
        wall_s = (time.perf_counter() - began_s) / len(batch)
        for (config, _), taken in zip(batch, samples, strict=True):
            stand.lines.add("samples", i=config, round=number, b=0, us=taken, s=round(wall_s, 5))
        stand.read_sensors()


def finals(task: Task, items: Sequence[Item], num_rounds: int, num_samples: int) -> None:
    """Measure the best configs again, interleaved; this belongs into a process that has measured nothing else."""
    stand = _stand_of(task)
    calls = [stand.call_of(config, params) for config, params in items]
    stand.sample(calls, 1)
    taken: list[list[float]] = [[] for _ in items]
    for turn in range(num_rounds):
        order = range(len(items)) if turn % 2 == 0 else range(len(items) - 1, -1, -1)
        for place, samples in zip(order, stand.sample([calls[place] for place in order], num_samples), strict=True):
            taken[place].extend(samples)
    for (config, _), samples in zip(items, taken, strict=True):
        stand.lines.add("again", i=config, us=samples)
    stand.read_sensors()


def baselines(task: Task) -> None:
    """Sample the eager reference, and a device copy of as many bytes as the template's cost counts."""
    stand = _stand_of(task)
    arguments, options = stand.arguments
    num_bytes, _ = stand.template.cost(task.site.shape, task.site.dtype)
    source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.uint8, device=task.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {
        "eager": lambda: stand.template.reference(*arguments, **options),
        "copy": lambda: target.copy_(source),
    }
    for name, call in calls.items():
        with torch.no_grad():
            call()
            ready = stand.captured_with_libraries(call)
        stand.sample([ready], 3)
        stand.lines.add("baseline", name=name, us=stand.sample([ready], _BASELINE_SAMPLES)[0])


class _Stand:
    """One landscape's tensors, its reference, and the captured calls of the configs that have run."""

    def __init__(self, task: Task) -> None:
        self.task, self.lines = task, Lines(task.path)
        self.template = registry.load(task.site.template)
        self.arguments = self.template.example(task.site.shape, task.site.dtype, task.device)
        arguments, options = self.arguments
        with torch.no_grad():
            expected = tensors(self.template.reference(*arguments, **options))
        # What every config's output is held against, once: the share of elements within the project's tolerance.
        self._expected = [tensor.float() for _, tensor in expected]
        self._limits = [
            rtol_of(tensor.dtype) * (wide.pow(2).mean().sqrt() + wide.abs())
            for (_, tensor), wide in zip(expected, self._expected, strict=True)
        ]
        self._is_cuda = task.device.startswith("cuda")
        self._calls: dict[int, Callable[[], Any]] = {}
        self._gpu = nvml.open_gpu(0) if self._is_cuda else nvml.OpenGpu(None, None, "a CPU")
        if self._is_cuda:
            self._cold = torch.ones(_FLUSH_BYTES // 4, device=task.device)
            self._sink = torch.empty((), device=task.device)
            self._pool = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream()
            self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def first_run(self, config: int, params: dict[str, int], num_samples: int) -> None:
        """Run, check, capture and sample one config, and file what came out."""
        began_s = time.perf_counter()
        _launched.clear()
        _recompiled.clear()
        arguments, options = self.arguments
        with torch.no_grad():
            output = self.template.launch(params, *arguments, **options)
            self._wait()
            max_error, wrong_share = self._errors(output)
            del output
        facts = {
            "n_regs": max((getattr(kernel, "n_regs", 0) or 0 for kernel in _launched), default=0),
            "n_spills": max((getattr(kernel, "n_spills", 0) or 0 for kernel in _launched), default=0),
            "shared_bytes": max((int(kernel.metadata.shared) for kernel in _launched), default=0),
        }
        num_recompiled = len(_recompiled)
        if not 1.0 - wrong_share >= _REQUIRED_SHARE:
            detail = f"{wrong_share:.3%} of the elements differ from the reference, at most by {max_error:.4g}"
            self.lines.add("failed", i=config, failure="wrong", detail=detail)
            return
        samples = self.sample([self.call_of(config, params)], num_samples)[0]
        self.lines.add(
            "ready", i=config, **facts, max_error=max_error if max_error < float("inf") else None,
            wrong_share=wrong_share, wall_s=round(time.perf_counter() - began_s, 5), num_recompiled=num_recompiled,
            b=0, us=samples,
        )  # fmt: skip

    def call_of(self, config: int, params: dict[str, int]) -> Callable[[], Any]:
        """Return what replays a config, captured when it is first asked for."""
        if config not in self._calls:
            arguments, options = self.arguments

            def call() -> Any:
                return self.template.launch(params, *arguments, **options)

            with torch.no_grad():
                if self._is_cuda:
                    call()
                self._calls[config] = self.captured(call)
        return self._calls[config]

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call that has run before; its memory is shared with all others, which run one at a time."""
        if not self._is_cuda:
            return call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay

    def captured_with_libraries(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call that may use cuBLAS, whose workspace must not outlive the graph's memory."""
        if self._is_cuda:
            torch._C._cuda_clearCublasWorkspaces()
        try:
            return self.captured(call)
        finally:
            if self._is_cuda:
                torch._C._cuda_clearCublasWorkspaces()

    def sample(self, calls: Sequence[Callable[[], Any]], num_samples: int) -> list[list[float]]:
        """Return samples of each call in microseconds, one call after the other."""
        if not self._is_cuda:
            return [[_wall_us(call) for _ in range(num_samples)] for call in calls]
        while len(self._events) < len(calls) * num_samples:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        spans = iter(self._events)
        torch.cuda._sleep(_SPIN_CYCLES)
        for call in calls:
            for _ in range(num_samples):
                start, end = next(spans)
                torch.sum(self._cold, dim=0, out=self._sink)
                start.record()
                call()
                end.record()
        torch.cuda.synchronize()
        spans = iter(self._events)
        pairs = [[next(spans) for _ in range(num_samples)] for _ in calls]
        return [[round(start.elapsed_time(end) * 1000, 3) for start, end in row] for row in pairs]

    def read_sensors(self) -> None:
        """File clock, temperature and power: 0.1 ms."""
        mhz, celsius, watts = _read_sensors(self._gpu)
        self.lines.add("clocks", t=round(time.time(), 2), mhz=mhz, c=celsius, w=watts)

    def close(self) -> None:
        """Let go of everything."""
        self._calls.clear()
        self.lines.close()
        nvml.close_gpu(self._gpu)

    def _errors(self, output: Any) -> tuple[float, float]:
        """Return the largest error and the share of elements outside the tolerance, over all tensors of the output."""
        found = tensors(output)
        if len(found) != len(self._expected):
            return float("inf"), 1.0
        largest, num_right, num_all = [], [], 0
        for (_, out), ref, limit in zip(found, self._expected, self._limits, strict=True):
            if out.shape != ref.shape:
                return float("inf"), 1.0
            error = (out.float() - ref).abs_()
            largest.append(error.max().double())
            num_right.append((error <= limit).sum().double())
            num_all += out.numel()
        facts = torch.stack([*largest, *num_right]).tolist()
        errors = [value if value == value else float("inf") for value in facts[: len(found)]]
        return max(errors), 1.0 - sum(facts[len(found) :]) / num_all

    def _wait(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


_stand: _Stand | None = None
_launched: list[Any] = []
_recompiled: list[str] = []
_is_following = False


def _stand_of(task: Task) -> _Stand:
    global _stand
    if _stand is None or _stand.task != task:
        if _stand is not None:
            _stand.close()
            _stand = None
        gc.collect()
        if task.device.startswith("cuda"):
            torch.cuda.empty_cache()
        # Of a collection in the middle of a batch the device would see nothing but a gap.
        gc.disable()
        _follow_launches()
        _stand = _Stand(task)
    return _stand


def _follow_launches() -> None:
    """Note every compiled kernel that runs, for its registers, and every one that the cache did not have."""
    global _is_following
    if _is_following:
        return
    import triton
    from triton.runtime.jit import JITFunction

    whole_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = whole_run(self, *args, grid=grid, warmup=warmup, **kwargs)
        _launched.append(kernel)
        return kernel

    def listen(*, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if not cache_hit:
            _recompiled.append(metadata["hash"])

    JITFunction.run = run
    triton.knobs.compilation.listener = listen
    _is_following = True


def _read_sensors(gpu: nvml.OpenGpu) -> tuple[float | None, float | None, float | None]:
    """Return SM clock in MHz, temperature in C and power in W."""
    readings: list[float | None] = []
    for read, unit in (
        (lambda: gpu.nvml.nvmlDeviceGetClockInfo(gpu.handle, gpu.nvml.NVML_CLOCK_SM), 1.0),
        (lambda: gpu.nvml.nvmlDeviceGetTemperature(gpu.handle, gpu.nvml.NVML_TEMPERATURE_GPU), 1.0),
        (lambda: gpu.nvml.nvmlDeviceGetPowerUsage(gpu.handle), 1e3),
    ):
        try:
            readings.append(read() / unit)
        except Exception:  # no NVML, or a reading that the driver refuses
            readings.append(None)
    return readings[0], readings[1], readings[2]


def _failure_of(error: BaseException, status: str) -> str:
    if status == "out_of_memory":
        return "oom"
    module = type(error).__module__
    return "compile" if module.startswith(("triton.compiler", "triton.language")) else "launch"


def _wall_us(call: Callable[[], Any]) -> float:
    began_ns = time.perf_counter_ns()
    with torch.no_grad():
        call()
    return max((time.perf_counter_ns() - began_ns) / 1e3, 0.001)
