"""Choose how a drop-in runs its compiled call past Dynamo's guards: by a direct call, or by a CUDA graph's replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.graphs import Watched, everywhere
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.backend import Backend, first_line
from agnitra_lab.patch.direct import DirectCall, unchanged_attributes, untracked_memory
from agnitra_lab.patch.ends import Arguments, Change, Ends, Result, changes, flat, held
from agnitra_lab.patch.fast import Check, FastPath, Run, walls_ms
from agnitra_lab.patch.graphed import GraphedCall
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.output_strides import OutputStrides
from agnitra_lab.patch.rollback import MutableState
from agnitra_lab.patch.weights import WeightGuard


class Paths:
    """The ways to run one call of a workload, all made from the same run.

    Args:
        workload: the model and the inputs whose signature the drop-in accepts.
        state: what a call writes; put back after each of the runs made here.
        checks: what must hold beside the model's own tensors and attributes.
        strides: what the compiled call's results must be given.

    Attributes:
        has_captured: whether one CUDA graph could hold the compiled call, be it the faster path or not.
    """

    def __init__(
        self, workload: Workload, state: MutableState, checks: Sequence[Check], strides: OutputStrides | None = None
    ) -> None:
        self._workload = workload
        self._state = state
        self._liveness = Liveness(workload.model)
        self._checks = [*checks, self._liveness.difference]
        self._strides = strides
        self.has_captured = False

    def of_compiled(
        self, compiled: Callable[..., Any], backend: Backend, *, should_capture: bool
    ) -> tuple[FastPath | None, str | None]:
        """Return the faster of the direct call and the replay.

        Returns:
            The path, None where a call cannot go past Dynamo; and why there is no CUDA graph where one was asked for.
        """
        try:
            with torch.no_grad():
                arguments, given = self._arguments()
                direct, is_pure = self._direct(compiled, backend, given)
                ends = self._ends(arguments, given, direct.result)
        except PatchError as error:
            return self._of_graphs(compiled, backend, error.message) if should_capture else (None, error.message)
        path = self._path("direct", self._restrided(direct), ends, backend.guards, is_pure=is_pure)
        if not should_capture:
            return path, None
        try:
            # What leaves the graph is copied in any case, and takes the original's strides by the way.
            run = self._graphed(direct, given, ends)
            graphed = self._path("cuda_graph", run, ends, backend.guards, is_pure=is_pure)
        except PatchError as error:
            return path, error.message
        self.has_captured = True
        direct_ms, graphed_ms = self._walls_ms([path, graphed])
        if graphed_ms > direct_ms:
            return path, _too_many_copies(graphed_ms, direct_ms)
        return graphed, None

    def of_eager(self) -> FastPath:
        """Return the replay of the original model's own ops.

        Raises:
            PatchError: when it cannot be captured, or reads memory that nothing here could watch.
        """
        return self._whole(self._workload.model)

    def _of_graphs(
        self, compiled: Callable[..., Any], backend: Backend, reason: str
    ) -> tuple[FastPath | None, str | None]:
        """Return the replay of all that a compiled call runs: its graphs, and Python's ops between them.

        Args:
            reason: why the call cannot run past Dynamo.
        """
        try:
            path = self._whole(compiled, backend.guards, backend.watched)
        except (PatchError, RuntimeError) as error:
            # Too little memory for it is no reason to lose the candidate.
            problem = error.message if isinstance(error, PatchError) else first_line(error)
            same = problem == reason
            return None, reason if same else f"{reason}, and a replay of them all was not possible: {problem}"
        self.has_captured = True
        through_dynamo_ms, graphed_ms = self._walls_ms([lambda args, kwargs: compiled(*args, **kwargs), path])
        if graphed_ms > through_dynamo_ms:
            return None, _too_many_copies(graphed_ms, through_dynamo_ms)
        return path, None

    def _whole(
        self, run_model: Callable[..., Any], guards: Sequence[WeightGuard] = (), watched: Watched = everywhere
    ) -> FastPath:
        """Return the replay of a call as Python runs it.

        Args:
            run_model: the model, or what computes the same.
            guards: of derived weights that it reads.
            watched: which of its ops a capture sees.
        """
        arguments, first = self._arguments()

        def call(run: Callable[..., Any], given: Sequence[Any]) -> tuple[Any, list[Any], list[Change]]:
            args, kwargs = arguments.rebuilt(given)
            own = arguments(args, kwargs)
            before = held(own)
            return run(*args, **kwargs), own, changes(before, own)

        def run(given: Sequence[Any]) -> list[Tensor]:
            result, _, changed = call(run_model, given)
            return flat(result, changed)

        versions = self._liveness.versions()
        try:
            with torch.no_grad(), unchanged_attributes(self._workload.model, self._liveness):
                op = untracked_memory(lambda: call(self._workload.model, first), first, self._liveness)
                self._state.restore()
                result = Result(*call(run_model, first))
        finally:
            self._state.restore()
        if op is not None:
            raise PatchError(f"{op} reads a tensor that is neither an input nor a parameter, buffer or attribute")
        is_pure = not self._state.tensors and versions == self._liveness.versions()
        ends = self._ends(arguments, first, result)
        return self._path("cuda_graph", self._graphed(run, first, ends, watched), ends, guards, is_pure=is_pure)

    def _arguments(self) -> tuple[Arguments, list[Any]]:
        args, kwargs = self._workload.args, self._workload.kwargs
        arguments = Arguments(args, kwargs)
        return arguments, arguments(args, kwargs)

    def _ends(self, arguments: Arguments, given: Sequence[Any], result: Result) -> Ends:
        is_written = set(map(id, self._state.tensors))
        written = {index for index, value in enumerate(given) if id(value) in is_written}
        ends = Ends(arguments, given, result, written)
        if not ends.are_apart(given):
            raise PatchError("the call writes to an input that shares memory with another one")
        return ends

    def _direct(self, compiled: Callable[..., Any], backend: Backend, given: Sequence[Any]) -> tuple[DirectCall, bool]:
        versions = self._liveness.versions()
        args, kwargs = self._workload.args, self._workload.kwargs
        try:
            direct = DirectCall(compiled, backend.record, self._workload.model, self._liveness, args, kwargs, given)
        finally:
            self._state.restore()
        return direct, not self._state.tensors and versions == self._liveness.versions()

    def _graphed(self, run: Run, given: Sequence[Any], ends: Ends, watched: Watched = everywhere) -> GraphedCall:
        try:
            # As every call is made: a product that is launched after the graph writes to given memory, which autograd
            # refuses of weights that require gradients.
            with torch.no_grad():
                return GraphedCall(
                    run, given, self._liveness, self._strides,
                    written=ends.written, restore=self._state.restore, watched=watched,
                )  # fmt: skip
        finally:
            self._state.restore()

    def _restrided(self, run: Run) -> Run:
        strides = self._strides
        return (lambda given: strides.given_to(run(given))) if strides else run

    def _path(self, name: str, run: Run, ends: Ends, guards: Sequence[WeightGuard], *, is_pure: bool) -> FastPath:
        return FastPath(name, run, ends, self._checks, guards, is_pure=is_pure)

    def _walls_ms(self, paths: Sequence[Callable[[tuple[Any, ...], Mapping[str, Any]], Any]]) -> list[float]:
        try:
            return walls_ms(paths, self._workload.args, self._workload.kwargs, self._state.restore)
        finally:
            self._state.restore()


def _too_many_copies(graphed_ms: float, other_ms: float) -> str:
    figures = f"{graphed_ms:.3f} ms against {other_ms:.3f} ms"
    return f"copying the inputs into the graph costs more than it saves: {figures}"
