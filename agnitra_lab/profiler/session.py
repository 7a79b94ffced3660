"""One torch.profiler session with module markers: started once, always stopped, read as an event table."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity

from agnitra_lab.errors import CaptureError
from agnitra_lab.profiler.event_table import EventTable, read_events
from agnitra_lab.profiler.markers import ModuleMarkers


def is_profiler_active() -> bool:
    """Return whether a torch profiler runs in this process: there can only be one."""
    flag = bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", False))
    enabled = getattr(torch._C._autograd, "_profiler_enabled", None)
    return flag or bool(enabled() if enabled is not None else False)


class ProfilerSession:
    """Profiles what runs in its `with` block.

    Attributes:
        markers: the modules and roots that were called.
        table: the events, after the block.
    """

    def __init__(self, *, has_device: bool, has_shapes: bool = False) -> None:
        """Prepare a session.

        Args:
            has_device: record CUDA kernels as well as CPU ops.
            has_shapes: record input shapes; a fifth more overhead, so never in the timed pass.
        """
        self.markers = ModuleMarkers()
        self.table: EventTable | None = None
        self._has_shapes = has_shapes
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_device else [])]
        self._profiler: Any = torch.profiler.profile(activities=activities, record_shapes=has_shapes)

    def __enter__(self) -> Self:
        if is_profiler_active():
            raise CaptureError(
                "A torch profiler is already running in this process, and there can only be one.",
                hint="Leave its with block, or stop it, and profile again.",
            )
        try:
            with _quiet_kineto():
                self._profiler.start()
        except RuntimeError as error:
            raise CaptureError(f"The torch profiler does not start ({error}).") from error
        self.markers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.markers.__exit__(kind, error, trace)
        profiler, self._profiler = self._profiler, None
        try:
            with _quiet_kineto():
                profiler.stop()
            self.table = read_events(profiler.profiler.kineto_results.events(), has_shapes=self._has_shapes)
        except (RuntimeError, AttributeError) as problem:
            if error is None:
                raise CaptureError(f"The torch profiler lost its events ({problem}).") from problem
        finally:
            # Short sessions leak until their cycles are collected: 318 MiB per 1000 on torch 2.11 (pytorch #193348).
            del profiler
            gc.collect()


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
