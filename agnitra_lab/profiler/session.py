"""One torch.profiler session with module markers: started once, always stopped, read as an event table."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity

from agnitra_lab.errors import CaptureError
from agnitra_lab.profiler.event_table import EventTable, concatenate, read_events
from agnitra_lab.profiler.markers import OWN_RANGE, ModuleMarkers, make_marker
from agnitra_lab.profiler.memory import Allocations, memory_scope, read_allocations

MAX_EVENTS = 2_000_000
# The profiler keeps up to 1 kB an event until it is stopped; columns take 60 bytes.
_PIECE_S = 5.0

_ALREADY = "A torch profiler is already running in this process, and there can only be one."


def is_profiler_active() -> bool:
    """Return whether a torch profiler runs in this process: there can only be one."""
    flag = bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", False))
    enabled = getattr(torch._C._autograd, "_profiler_enabled", None)
    return flag or bool(enabled() if enabled is not None else False)


class ProfilerSession:
    """Profiles what runs in its `with` block.

    A long capture is read in pieces, between calls of root modules, so that the profiler's own buffers stay small and
    the budget acts while the code runs: past it the rest runs unprofiled.

    Attributes:
        markers: the modules and roots that were called.
        table: the events, after the block.
        allocations: of a session with memory, after the block.
        paused_ns: time inside the block that reading pieces took.
        is_cut: whether the rest of the block ran unprofiled.
        is_taken_over: whether another profiler started in the block, which ends this one without an error.
    """

    def __init__(
        self,
        *,
        has_device: bool,
        has_shapes: bool = False,
        markers: ModuleMarkers | None = None,
        max_events: int = MAX_EVENTS,
        has_memory: bool = False,
    ) -> None:
        """Prepare a session.

        Args:
            has_device: record CUDA kernels as well as CPU ops.
            has_shapes: record input shapes; a fifth more overhead, so never in the timed pass.
            markers: of an earlier pass over the same modules; new ones by default.
            max_events: events kept, the earliest ones.
            has_memory: record every allocation, which costs about as much again.
        """
        self.markers = markers if markers is not None else ModuleMarkers()
        self.table: EventTable | None = None
        self.allocations: Allocations | None = None
        self.paused_ns = 0
        self.is_cut = False
        self.is_taken_over = False
        self._has_shapes = has_shapes
        self._has_memory = has_memory
        self._scope = contextlib.ExitStack()
        self._max_events = max_events
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_device else [])]
        self._pieces: list[EventTable] = []
        self._profiler: Any = None
        self._piece_started_s = 0.0

    def __enter__(self) -> Self:
        if is_profiler_active():
            raise CaptureError(_ALREADY, hint="Leave its with block, or stop it, and profile again.")
        try:
            self._start()
        except RuntimeError as error:
            raise CaptureError(f"The torch profiler does not start ({error}).") from error
        if self._has_memory:
            self._scope.enter_context(memory_scope())
        else:
            # Allocations are paired over the whole block, which must then stay in one piece.
            self.markers.on_root_exit = self._end_piece
        self.markers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.markers.__exit__(kind, error, trace)
        self.markers.on_root_exit = None
        self._scope.close()
        try:
            if self._profiler is not None:
                self._stop()
        except (RuntimeError, AttributeError) as problem:
            if error is None:
                raise CaptureError(f"The torch profiler lost its events ({problem}).") from problem
        finally:
            self._profiler = None
            if self._pieces:
                self.table = concatenate(self._pieces).first(self._max_events)
            self._pieces = []

    def _start(self) -> None:
        self._profiler = torch.profiler.profile(
            activities=self._activities, record_shapes=self._has_shapes, profile_memory=self._has_memory
        )
        with _quiet_kineto():
            self._profiler.start()
        # The first event: where it is missing at the end, somebody else's profiler has taken the events.
        begin = make_marker(OWN_RANGE)
        if begin is not None:
            with begin:
                pass
        self._piece_started_s = time.perf_counter()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        try:
            with _quiet_kineto():
                profiler.stop()
            result = profiler.profiler.kineto_results
            piece = read_events(result.events(), has_shapes=self._has_shapes)
            self.is_taken_over |= make_marker(OWN_RANGE) is not None and OWN_RANGE not in piece.names
            self._pieces.append(piece)
            if self._has_memory:
                self.allocations = read_allocations(result)
        finally:
            # Short sessions leak until their cycles are collected: 318 MiB per 1000 on torch 2.11 (pytorch #193348).
            _break_cycles(profiler)

    def _end_piece(self) -> None:
        if self._profiler is None or time.perf_counter() - self._piece_started_s < _PIECE_S or _is_capturing():
            return
        started_ns = time.perf_counter_ns()
        try:
            self._stop()
            self.is_cut = sum(map(len, self._pieces)) >= self._max_events
            if not self.is_cut:
                self._start()
        except (RuntimeError, AttributeError):
            # The user's code is running: a profiler that fails here costs it the rest of the events, and no more.
            self._profiler, self.is_cut = None, True
        self.paused_ns += time.perf_counter_ns() - started_ns


def initialise() -> None:
    """Initialise torch's profiler in the main thread, for sessions that another thread will open. Costs 1 ms.

    Kineto complains on the process's stderr when its first session is not of the thread that imported torch.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _ExperimentalConfig

    config = ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig())
    inner: Any = torch._C._autograd
    with _quiet_kineto():
        inner._prepare_profiler(config, {ProfilerActivity.CPU})
        inner._enable_profiler(config, {ProfilerActivity.CPU})
        inner._disable_profiler()


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _break_cycles(profiler: Any) -> None:
    """Let go of a profiler's results without waiting for the collector, whose full pass takes 0.1 s and more."""
    inner = getattr(profiler, "profiler", None)
    for owner in (inner, profiler):
        if owner is not None:
            with contextlib.suppress(AttributeError):
                owner.__dict__.clear()
    gc.collect(0)


@contextlib.contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler library from printing its own start and stop, unless the user chose a log level."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        os.environ.pop(name, None)
