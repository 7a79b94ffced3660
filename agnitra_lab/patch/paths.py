"""Choose how a drop-in runs its compiled call past Dynamo's guards: by a direct call, or by a CUDA graph's replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.direct import DirectCall, flat_inputs, unchanged_attributes, untracked_memory
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
    """

    def __init__(
        self, workload: Workload, state: MutableState, checks: Sequence[Check], strides: OutputStrides | None = None
    ) -> None:
        self._workload = workload
        self._state = state
        self._liveness = Liveness(workload.model)
        self._checks = [*checks, self._liveness.difference]
        self._strides = strides
        self._leaves = flat_inputs(workload.args, workload.kwargs)

    def of_compiled(
        self, compiled: Callable[..., Any], backend: Backend, *, should_capture: bool
    ) -> tuple[FastPath | None, str | None]:
        """Return the faster of the direct call and the replay.

        Returns:
            The path, None where a call cannot go past Dynamo; and why there is no CUDA graph where one was asked for.
        """
        try:
            with torch.no_grad():
                direct, is_pure = self._direct(compiled, backend)
        except PatchError as error:
            return None, error.message
        path = self._path("direct", self._restrided(direct), backend.guards, is_pure=is_pure)
        if not should_capture:
            return path, None
        try:
            # What leaves the graph is copied in any case, and takes the original's strides by the way.
            graphed = self._path("cuda_graph", self._graphed(direct), backend.guards, is_pure=is_pure)
        except PatchError as error:
            return path, error.message
        direct_ms, graphed_ms = self._walls_ms([path, graphed])
        if graphed_ms > direct_ms:
            figures = f"{graphed_ms:.3f} ms against {direct_ms:.3f} ms"
            return path, f"copying the inputs into the graph costs more than it saves: {figures}"
        return graphed, None

    def of_eager(self) -> FastPath:
        """Return the replay of the original model's own ops.

        Raises:
            PatchError: when it cannot be captured, or reads memory that nothing here could watch.
        """
        structure = _pytree.tree_structure((self._workload.args, dict(self._workload.kwargs)))
        model = self._workload.model

        def run(given: Sequence[Any]) -> Any:
            args, kwargs = _pytree.tree_unflatten(list(given), structure)
            return model(*args, **kwargs)

        versions = self._liveness.versions()
        try:
            with unchanged_attributes(self._liveness):
                op = untracked_memory(lambda: run(self._leaves), self._leaves, self._liveness)
        finally:
            self._state.restore()
        if op is not None:
            raise PatchError(f"{op} reads a tensor that is neither an input nor a parameter, buffer or attribute")
        is_pure = not self._state.tensors and versions == self._liveness.versions()
        return self._path("cuda_graph", self._graphed(run), (), is_pure=is_pure)

    def _direct(self, compiled: Callable[..., Any], backend: Backend) -> tuple[DirectCall, bool]:
        versions = self._liveness.versions()
        args, kwargs = self._workload.args, self._workload.kwargs
        try:
            direct = DirectCall(compiled, backend.record, self._liveness, args, kwargs)
        finally:
            self._state.restore()
        return direct, not self._state.tensors and versions == self._liveness.versions()

    def _graphed(self, run: Run) -> GraphedCall:
        try:
            return GraphedCall(run, self._leaves, self._liveness, self._strides)
        finally:
            self._state.restore()

    def _restrided(self, run: Run) -> Run:
        strides = self._strides
        return (lambda given: strides(run(given))) if strides else run

    def _path(self, name: str, run: Run, guards: Sequence[WeightGuard], *, is_pure: bool) -> FastPath:
        return FastPath(name, run, self._checks, guards, is_pure=is_pure)

    def _walls_ms(self, paths: Sequence[FastPath]) -> list[float]:
        try:
            return walls_ms(paths, self._workload.args, self._workload.kwargs)
        finally:
            self._state.restore()
