"""Profile a workload or a piece of code: the one entry that the SDK, the shell and the notebook share.

workload: warm-up -> plain timed calls -> shape pass -> memory pass -> profiled calls -> graph -> rows
cell:     the body, once, profiled -> graph of the modules that it called -> rows
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from agnitra_lab.contracts import DeviceInfo, Workload
from agnitra_lab.device.info import device_of, synchronize
from agnitra_lab.errors import CaptureError, UsageError
from agnitra_lab.profiler.markers import ModuleMarkers
from agnitra_lab.profiler.observe import Observer
from agnitra_lab.profiler.places import Attribution
from agnitra_lab.profiler.record import Capture, build_telemetry
from agnitra_lab.profiler.session import MAX_EVENTS, ProfilerSession, is_profiler_active
from agnitra_lab.profiler.telemetry import Telemetry

_WORKLOAD_REPEAT = 3
_WORKLOAD_WARMUP = 2


def profile(
    target: Workload | Callable[[], Any],
    *,
    name: str | None = None,
    repeat: int | None = None,
    num_warmup: int | None = None,
    should_time: bool = True,
    device_info: DeviceInfo | None = None,
    max_events: int = MAX_EVENTS,
    reference: Telemetry | None = None,
    restore: Callable[[], None] | None = None,
) -> Telemetry:
    """Profile a workload, or a callable without arguments.

    Args:
        target: a `Workload`, whose model runs in inference (no gradients) when it is a module; or a callable, which
            runs as it is and, unless told otherwise, exactly once.
        name: what the record calls it; the workload's own name when left out.
        repeat: timed calls, and profiled calls; 3 for a workload, 1 for a callable.
        num_warmup: calls before; 2 for a workload, 0 for a callable. A workload always has one.
        should_time: whether to time plain calls of a workload; without it `wall_ms` is null.
        device_info: of the device, where the caller has it already.
        max_events: events kept, the earliest ones.
        reference: a profile of the same kernels, such as the eager model's: it tells what the kernels of a CUDA graph
            are that was captured before the profile by other means than torch.compile.
        restore: puts back what a call writes; called before each call that is not recorded, and before each recording.
            A cache that counts its tokens would be full after a dozen calls.

    Returns:
        The telemetry; times are of one call. `telemetry.value` is what a callable returned.

    Raises:
        UsageError: `target` is not callable, or a number is out of range.
        CaptureError: a torch profiler is already running (workload); nothing was run.
        Exception: whatever the target raises, unchanged.
    """
    if not callable(target):
        raise UsageError(f"A profile needs a Workload or a callable without arguments, got {type(target).__name__}.")
    if isinstance(target, nn.Module):
        raise UsageError(
            f"A profile of {type(target).__name__} needs its inputs.",
            hint="Wrap them: Workload(name, model, args), or pass lambda: model(inputs).",
        )
    if (repeat is not None and repeat < 1) or (num_warmup is not None and num_warmup < 0):
        raise UsageError(f"repeat must be at least 1 and num_warmup at least 0, got {repeat} and {num_warmup}.")
    attribution = reference.attribution if reference is not None else None
    known = _Known(name, device_info, max_events, attribution, restore or _nothing)
    if isinstance(target, Workload):
        repeats = repeat if repeat is not None else _WORKLOAD_REPEAT
        warmups = max(1, num_warmup if num_warmup is not None else _WORKLOAD_WARMUP)
        return _profile_workload(target, repeats, warmups, should_time, known)
    if (repeat or 1) == 1 and not num_warmup:
        with capture_block(name=name, device_info=device_info, max_events=max_events, reference=reference) as block:
            block.value = target()
        assert block.telemetry is not None
        return block.telemetry
    return _profile_repeated(target, repeat or 1, num_warmup or 0, should_time, known)


@dataclass(frozen=True)
class _Known:
    """What the caller says of a capture."""

    name: str | None
    device_info: DeviceInfo | None
    max_events: int
    reference: Attribution | None
    restore: Callable[[], None]


def _profile_workload(workload: Workload, repeat: int, num_warmup: int, should_time: bool, known: _Known) -> Telemetry:
    device = device_of(workload.model, workload.args, dict(workload.kwargs))
    with _inference(workload.model):
        capture = _run_passes(workload, device, repeat, num_warmup, should_time, known, has_extra_passes=True)
    capture.name = known.name or workload.name
    capture.workload = workload.name
    capture.phase = workload.phase
    capture.items_per_call = workload.items_per_call
    capture.item_unit = workload.item_unit
    return build_telemetry(capture)


def _profile_repeated(
    body: Callable[[], Any], repeat: int, num_warmup: int, should_time: bool, known: _Known
) -> Telemetry:
    values: list[Any] = [None]

    def call() -> None:
        values[0] = body()

    capture = _run_passes(call, _ambient_device(), repeat, num_warmup, should_time, known, has_extra_passes=False)
    telemetry = build_telemetry(capture)
    telemetry.value = values[0]
    return telemetry


def _run_passes(
    call: Callable[[], Any],
    device: torch.device,
    repeat: int,
    num_warmup: int,
    should_time: bool,
    known: _Known,
    *,
    has_extra_passes: bool,
) -> Capture:
    if is_profiler_active():
        raise CaptureError(
            "A torch profiler is already running in this process, and there can only be one; nothing was run.",
            hint="Leave its with block, or stop it, and profile again.",
        )
    has_device = device.type == "cuda"

    def prepare() -> None:
        known.restore()
        synchronize(device)

    for _ in range(num_warmup):
        prepare()
        call()
    plain_ms = []
    for _ in range(repeat if should_time else 0):
        prepare()
        plain_ms.append(_timed_ms(call, device))
    markers = ModuleMarkers()
    shape_session = memory_session = None
    if has_extra_passes:
        # They also pay for what a process's first profile sets up, which the measured one then does not.
        shape_session = ProfilerSession(has_device=has_device, has_shapes=True, markers=markers)
        memory_session = ProfilerSession(has_device=has_device, markers=markers, has_memory=True)
        for session in (shape_session, memory_session):
            prepare()
            with session:
                call()
                synchronize(device)
    session = ProfilerSession(has_device=has_device, markers=markers, max_events=known.max_events)
    prepare()
    with session, Observer(device) as observer:
        for _ in range(repeat):
            call()
        synchronize(device)
    return Capture(
        observer.observation,
        session,
        shape_session,
        memory_session,
        num_calls=repeat,
        plain_ms=plain_ms,
        name=known.name,
        device_info=known.device_info,
        reference=known.reference,
    )


def _nothing() -> None:
    """There is nothing to put back."""


def _timed_ms(call: Callable[[], Any], device: torch.device) -> float:
    started_ns = time.perf_counter_ns()
    call()
    synchronize(device)
    return (time.perf_counter_ns() - started_ns) / 1e6


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Turn gradients off for a module; a plain function may compute them on purpose."""
    with torch.no_grad() if isinstance(model, nn.Module) else contextlib.nullcontext():
        yield


def _ambient_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class CaptureBlock:
    """Profiles its body exactly once. The body's exception passes unchanged, and what ran before it is kept.

    Attributes:
        value: for the caller to set, kept in the telemetry.
        num_calls: for the caller to set, when the body repeats its work: times are of one call.
        telemetry: complete after the block, also when the body raised or was interrupted.
    """

    def __init__(
        self,
        known: _Known,
        *,
        workload: str | None,
        has_memory: bool,
        on_progress: Callable[[str], None] | None,
    ) -> None:
        self.value: Any = None
        self.num_calls = 1
        self.telemetry: Telemetry | None = None
        self._known, self._workload, self._on_progress = known, workload, on_progress
        self._has_memory = has_memory
        self._notes: list[str] = []
        self._session: ProfilerSession | None = None
        self._observer = Observer(_ambient_device())
        self._ended_s = 0.0

    def __enter__(self) -> Self:
        try:
            session = ProfilerSession(
                has_device=torch.cuda.is_available(),
                max_events=self._known.max_events,
                has_memory=self._has_memory,
            )
            session.__enter__()
            self._session = session
        except CaptureError as error:
            self._notes.append(f"The code ran unprofiled: {error.message}")
        # Last, so that the start of the profiler is not part of the body's wall time.
        self._observer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_s = time.process_time()
        try:
            self._stop(kind, error, trace)
            self._build(error)
        except Exception:
            # A failure of ours must not hide the body's: it is the body's that the user has to see.
            if error is None:
                raise

    def _stop(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._observer.__exit__(kind, error, trace)
        finally:
            if self._session is not None:
                try:
                    self._session.__exit__(kind, error, trace)
                except CaptureError as problem:
                    self._session = None
                    self._notes.append(f"No events: {problem.message}")

    def _build(self, error: BaseException | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._notes.append("The code was interrupted; these are the events up to there.")
        elif error is not None:
            self._notes.append(f"The code raised {type(error).__name__}; these are the events up to there.")
        capture = Capture(
            self._observer.observation,
            self._session,
            memory_session=self._session if self._has_memory else None,
            num_calls=max(1, self.num_calls),
            name=self._known.name,
            workload=self._workload,
            device_info=self._known.device_info,
            reference=self._known.reference,
            on_progress=self._on_progress,
            ended_s=self._ended_s,
            notes=self._notes,
        )
        self._session = None
        self.telemetry = build_telemetry(capture)
        self.telemetry.value = self.value


def capture_block(
    *,
    name: str | None = None,
    workload: str | None = None,
    device_info: DeviceInfo | None = None,
    max_events: int = MAX_EVENTS,
    has_memory: bool = False,
    reference: Telemetry | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> CaptureBlock:
    """Return a context manager that profiles its body exactly once.

    Args:
        name: what the record calls it.
        workload: what the code is an example of, for the record.
        device_info: of the device, where the caller has it already.
        max_events: events kept, the earliest ones; past them the rest of a long body runs unprofiled.
        has_memory: whether to record every allocation too, which costs about as much again as the profile itself.
        reference: a profile of the same kernels, as for `profile`.
        on_progress: told in short lines what is done after the body, from this thread.

    Returns:
        The block; its `telemetry` is there after the `with`. Where another torch profiler is running the body runs
        unprofiled, and the telemetry's notes say so.

    Raises:
        UsageError: `max_events` is below 1.

    Example:
        with capture_block(name="step") as block:
            block.value = model(inputs)
        print(block.telemetry.bottleneck)
    """
    if max_events < 1:
        raise UsageError(f"max_events must be at least 1, got {max_events}.")
    attribution = reference.attribution if reference is not None else None
    known = _Known(name, device_info, max_events, attribution, _nothing)
    return CaptureBlock(known, workload=workload, has_memory=has_memory, on_progress=on_progress)
