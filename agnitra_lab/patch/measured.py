"""Two forms of one operation, timed on random tensors like those of the graph: the second has to be faster.

Each distinct operation of a graph is timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from agnitra_lab.patch.context import RewriteContext

Times = tuple[float, float]
LEAST_GAIN = 1.03
"""Below that the difference is noise, or lost in a copy around it."""


class Measured:
    """Decides for one rewrite of one graph.

    Args:
        action: the rewrite, in whose name is refused what gains nothing.
        context: of the graph.
    """

    def __init__(self, action: str, context: RewriteContext) -> None:
        self._action, self._context = action, context
        self._times: dict[Hashable, Times | None] = {}

    def faster(self, key: Hashable, measure: Callable[[], Times | None], subject: str, other: str) -> Times | None:
        """Return the times in ms of both forms where the other one is faster; else refuse it, with the times.

        Args:
            key: equal for operations that take the same time.
            measure: gives the times of both, None where one does not run.
            subject: the operation as it is, for the refusal.
            other: the other form.
        """
        if key not in self._times:
            self._times[key] = measure()
        times = self._times[key]
        if times is not None and times[0] / times[1] > LEAST_GAIN:
            return times
        shown = "does not run alone" if times is None else f"takes {times[0]:.4f} ms, {other} {times[1]:.4f} ms"
        self._context.refuse(self._action, f"{subject} {shown}")
        return None


def layouts_of(*fakes: Tensor | None) -> Hashable:
    """Return what the time of an operation depends on in its tensors."""
    return tuple(
        None if fake is None else (tuple(fake.shape), fake.stride(), fake.dtype, fake.device) for fake in fakes
    )
