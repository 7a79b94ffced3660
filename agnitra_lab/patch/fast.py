"""The fast path of a drop-in: the check of what it bakes in, around a direct call or a replay, whichever is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.patch.ends import Ends
from agnitra_lab.patch.graphed import GraphedCall
from agnitra_lab.patch.weights import WeightGuard

Run = Callable[[Sequence[Any]], Sequence[Tensor]]
"""What a call is given, as `Arguments` reads it -> the tensors of its result, as `Result` orders them."""
Check = Callable[[], "str | None"]
_NUM_TIMED_CALLS, _FEWEST_TIMED_CALLS, _TIMED_S = 15, 3, 1.0


class FastPath:
    """Runs a call past Dynamo, and never gives an answer of a model that has changed since.

    A call that writes nothing is launched first and checked while the device works: where the check then fails, its
    outputs are thrown away. A call that writes state is checked before, while the device copies a graph's inputs.

    Attributes:
        name: "direct" or "cuda_graph".
    """

    def __init__(
        self,
        name: str,
        run: Run,
        ends: Ends,
        checks: Sequence[Check],
        guards: Sequence[WeightGuard],
        *,
        is_pure: bool,
    ) -> None:
        """Make a path.

        Args:
            name: "direct" or "cuda_graph".
            run: the call itself.
            ends: what it is given and returns.
            checks: each says what has changed since the path was made, None for nothing.
            guards: of the derived weights that it reads.
            is_pure: it writes neither inputs nor state of the model.
        """
        self.name = name
        self._run = run
        self._ends = ends
        self._checks = list(checks)
        self._guards = list(guards)
        self._is_pure = is_pure
        # Its inputs are loaded before the checks.
        self._loaded = run if isinstance(run, GraphedCall) and not is_pure else None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
        """Run one call whose signature matches.

        Returns:
            The outputs and None, or None and what has changed.
        """
        given = self._ends.arguments(args, kwargs) if kwargs or not all(map(_is_tensor, args)) else args
        if not self._ends.are_apart(given):
            return None, "inputs share memory"
        if torch.is_inference_mode_enabled() and not any(map(_is_inference, given)):
            with torch.inference_mode(False), torch.no_grad():
                return self._checked(given)
        return self._checked(given)

    def _checked(self, given: Sequence[Any]) -> tuple[Any, str | None]:
        made = self._run(given) if self._is_pure else ()
        if self._loaded is not None:
            self._loaded.load(given)
        reason = self._difference()
        if reason is not None:
            return None, reason
        is_stale = self._refresh()
        if any(guard.is_broken for guard in self._guards):
            return None, "weights changed"
        if self._loaded is not None:
            made = self._loaded.replay(given)
        elif is_stale or not self._is_pure:
            made = self._run(given)
        return self._ends.result(made, given), None

    def _difference(self) -> str | None:
        for check in self._checks:
            reason = check()
            if reason is not None:
                return reason
        return None

    def _refresh(self) -> bool:
        """Bring derived weights up to date; return whether any was not."""
        return any([guard.refresh_stale() for guard in self._guards])


def walls_ms(
    paths: Sequence[Callable[[tuple[Any, ...], Mapping[str, Any]], Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    restore: Callable[[], None],
) -> list[float]:
    """Return the wall time of one call by each path in ms, idle to idle; `restore` puts back what it writes.

    In turns, and the lower fifth of each one's times: what a busy machine adds to a path that waits for its host says
    nothing of it. A pointwise op over 268 MB was given a CUDA graph for that, which copies its input: 0.26 ms of an
    H200 instead of 0.13.
    """
    samples: list[list[float]] = [[] for _ in paths]
    with exclusive(), torch.no_grad():
        began = time.perf_counter()
        for turn in range(_NUM_TIMED_CALLS):
            if turn >= _FEWEST_TIMED_CALLS and time.perf_counter() - began > _TIMED_S:
                break
            for path, times in zip(paths, samples, strict=True):
                restore()
                _wait()
                started = time.perf_counter()
                path(args, kwargs)
                _wait()
                times.append(time.perf_counter() - started)
    return [sorted(times)[len(times) // 5] * 1e3 for times in samples]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()
