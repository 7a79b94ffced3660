"""Running a workload so that a caller finds its inputs and its model as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.patch.rollback import MutableState
from agnitra_lab.profiler import capture
from agnitra_lab.profiler.telemetry import Telemetry


@contextmanager
def as_it_was(workload: Workload) -> Iterator[Callable[[], None]]:
    """Put back what calls in the block write: buffers, arguments, and what a cache among these holds.

    Yields:
        What puts it back at once, for between two calls.
    """
    state = MutableState.of(workload)

    def restore() -> None:
        # The rest need not be written: that would count as a change of weights.
        state.only_written().restore()

    try:
        yield restore
    finally:
        restore()


def profile(workload: Workload, **options: Any) -> Telemetry:
    """Profile a workload; arguments, result and errors are those of `capture.profile`."""
    with as_it_was(workload) as restore:
        return capture.profile(workload, restore=restore, **options)
