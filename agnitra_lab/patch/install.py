"""Install a candidate: compile the workload's model with its rewrites and hand back a drop-in that can be undone.

fingerprint -> reference run -> first call (compiles) -> drop-in            rollback: drop-in -> original, proved
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.patch import PatchDescriptor, PatchLog, Refusal, RollbackProof
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import PatchError
from agnitra_lab.graph.tree import ADDRESS_MARK, tensors
from agnitra_lab.patch.backend import Backend, first_line
from agnitra_lab.patch.dropin import OptimizedModel
from agnitra_lab.patch.frozen import FrozenWeights
from agnitra_lab.patch.options import (
    OPTION_ACTIONS,
    describe_option,
    merge_options,
    mode_options,
    model_tensors,
    uses_cuda,
)
from agnitra_lab.patch.output_strides import OutputStrides, strides_of
from agnitra_lab.patch.paths import Paths
from agnitra_lab.patch.returned import Returned
from agnitra_lab.patch.rollback import Fingerprint, MutableState, fingerprint, keep_outputs, prove, run_original
from agnitra_lab.patch.signature import Signature

# Candidates of one model share the code of its submodules where the graph breaks; this many of them fit.
_RECOMPILE_LIMIT = 64
_numbers = itertools.count()


class Patch:
    """One installed candidate.

    Attributes:
        name: the candidate's name.
        model: the drop-in.
        compile_s: wall seconds of the first call, which compiles; None for eager.
        is_whole: whether one CUDA graph of ours can hold its call, or nobody asked for one.
        graph_sha256: of what Dynamo made of the model in that call; None where it was not asked.
    """

    def __init__(
        self, name: str, workload: Workload, before: _Before, model: OptimizedModel, compile_s: float | None
    ) -> None:
        self.name = name
        self.model = model
        self.compile_s = compile_s
        self.is_whole = True
        self.graph_sha256: str | None = None
        self._workload = workload
        self._before = before
        self._backend: Backend | None = None
        self._num_graphs = 0
        self._options: list[PatchDescriptor] = []
        self._refusals: list[Refusal] = []
        self._rollback: RollbackProof | None = None

    def log(self) -> PatchLog:
        """Return the patch log as it stands: changes, refusals, guard misses so far."""
        backend = self._backend
        return PatchLog(
            candidate=self.name,
            descriptors=(*(backend.descriptors if backend else ()), *self._options),
            refusals=(*(backend.refusals if backend else ()), *self._refusals),
            num_graphs=backend.num_graphs if backend else self._num_graphs,
            num_guard_misses=self.model.num_guard_misses,
            compile_s=self.compile_s,
            rollback=self._rollback,
        )

    def refresh(self) -> None:
        """Rebuild derived weights. Needed only after writes that PyTorch does not count, through an old `.data`."""
        for guard in self._backend.guards if self._backend else ():
            guard.refresh()

    def discard(self) -> None:
        """Let go of everything compiled without a proof: the candidate was never handed out."""
        self.model.unload()
        if self._backend is not None:
            self._backend.release()
        self._before.restore_marks()
        self._before.outputs = None

    def prove_rollback(self) -> RollbackProof:
        """Prove that the original stands as it stood before install, while the drop-in stays installed."""
        return prove(
            self._workload, self._before.fingerprint, self._before.outputs, self._before.state, self._workload.model
        )

    def rollback(self) -> RollbackProof:
        """Make the drop-in run the original for good, release what was compiled, and prove it.

        Returns:
            The proof; the same one when called again.
        """
        if self._rollback is None:
            self.model.unload()
            if self._backend is not None:
                self._backend.release()
            self._before.restore_marks()
            self._rollback = prove(
                self._workload, self._before.fingerprint, self._before.outputs, self._before.state, self.model
            )
            # A prefill's logits are hundreds of MB, and a run holds several rejected candidates.
            self._before.outputs = None
        return self._rollback


class _Before:
    """The original as it was: fingerprint, outputs, mutable state, and Dynamo's marks on tensors."""

    def __init__(self, workload: Workload) -> None:
        self._marks = [(tensor, tensor.__dict__.get(ADDRESS_MARK)) for tensor in model_tensors(workload.model)]
        state = MutableState.of(workload)
        outputs = run_original(workload)
        self.strides = strides_of(outputs)
        self.outputs: Any = keep_outputs(outputs)
        self.state = state.only_written()
        self.state.restore()
        self.fingerprint: Fingerprint = fingerprint(workload.model)

    def put_back(self) -> None:
        """Restore what a call or a trace has written."""
        self.state.restore()
        self.restore_marks()

    def restore_marks(self) -> None:
        """Take back the mark that Dynamo leaves on each weight that it traces."""
        for tensor, mark in self._marks:
            if mark is not None:
                setattr(tensor, ADDRESS_MARK, mark)
            elif ADDRESS_MARK in tensor.__dict__:
                delattr(tensor, ADDRESS_MARK)


def install(
    workload: Workload,
    actions: Sequence[str],
    *,
    name: str,
    kernels: KernelSource | None = None,
    options: Mapping[str, Any] | None = None,
    base_mode: str | None = None,
    is_lowered: bool = True,
) -> Patch:
    """Compile the workload's model with the given actions and return the installed candidate.

    Args:
        workload: model and inputs; the first call runs on these inputs, under no_grad.
        actions: names from `contracts.ACTIONS`.
        name: the candidate's name.
        kernels: gives the kernel for each site of the template actions.
        options: further Inductor options, as `torch.compile(options=...)` takes them.
        base_mode: a torch.compile mode whose options come first.
        is_lowered: False runs the rewritten graph without Inductor.

    Raises:
        PatchError: an unknown action or mode, or a model that the rewrites or Inductor cannot take. The model is
            as it was.
    """
    unknown = [action for action in actions if action not in ACTIONS]
    if unknown:
        raise PatchError(f"Unknown action {unknown[0]!r}; known: {', '.join(ACTIONS)}.")
    merged, taken, refusals = merge_options(workload, actions, options or {}, base_mode)
    backend = Backend(actions, kernels=kernels, options=merged, is_lowered=is_lowered)
    before = _Before(workload)
    # Past Dynamo nobody would copy what lies in the memory of Inductor's own CUDA graphs.
    is_past_dynamo = not (merged.get("triton.cudagraphs") and uses_cuda(workload))
    with _unmarked_inputs(workload) if is_past_dynamo else nullcontext():
        patch = _compile(name, workload, before, {"backend": backend}, merged)
        patch.graph_sha256 = backend.graphs_sha256 or None
        if is_past_dynamo:
            refusals += _take_fast_path(patch, workload, before, backend, should_capture="cuda_graph" in taken)
    taken = [action for action in taken if action not in {refusal.action for refusal in refusals}]
    patch._backend = backend
    patch._options = [describe_option(action, merged) for action in taken]
    patch._refusals = refusals
    if backend.num_graphs == 0:
        patch._refusals += [
            Refusal(action=action, reason="Dynamo captured no graph of this model") for action in backend.actions
        ]
    return patch


@contextmanager
def _unmarked_inputs(workload: Workload) -> Iterator[None]:
    """Take the mark of `mark_static_address` off the inputs while a graph is made that calls reach past Dynamo.

    What bears it is baked into the graph, or taken for the model's: another mask then got the first one's answer.
    """
    own = set(map(id, model_tensors(workload.model)))
    given = {id(tensor): tensor for _, tensor in tensors((workload.args, dict(workload.kwargs)))}
    marked = [tensor for key, tensor in given.items() if key not in own and ADDRESS_MARK in tensor.__dict__]
    kept = [(tensor, tensor.__dict__.pop(ADDRESS_MARK)) for tensor in marked]
    try:
        yield
    finally:
        for tensor, mark in kept:
            setattr(tensor, ADDRESS_MARK, mark)


def compile_mode(workload: Workload, mode: str) -> Patch:
    """Install plain `torch.compile(mode=mode)` behind the same drop-in, so that wrapper costs cancel out.

    Args:
        mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".

    Raises:
        PatchError: an unknown mode, or a model that does not compile.
    """
    from torch._dynamo.utils import counters

    options = mode_options(mode)
    num_before = counters["stats"]["unique_graphs"]
    patch = _compile(f"torch.compile({mode})", workload, _Before(workload), {"mode": mode}, options)
    patch._num_graphs = counters["stats"]["unique_graphs"] - num_before
    return patch


def capture_eager(workload: Workload, name: str) -> Patch:
    """Install the replay of the original model's own ops as one CUDA graph, with nothing compiled.

    Raises:
        PatchError: when the call cannot be captured, with the reason. The model is as it was.
    """
    before = _Before(workload)
    started = time.perf_counter()
    model = OptimizedModel(workload.model, workload.model, Signature(workload.args, workload.kwargs))
    paths = Paths(workload, before.state, [model.__dict__["_agnitra_context"].difference])
    try:
        model.take_fast_path(paths.of_eager())
    finally:
        before.state.restore()
    patch = Patch(name, workload, before, model, time.perf_counter() - started)
    patch._options = [describe_option("cuda_graph", OPTION_ACTIONS["cuda_graph"])]
    return patch


def eager(workload: Workload) -> Patch:
    """Return the original behind the drop-in, with nothing compiled: the baseline with the same wrapper."""
    before = _Before(workload)
    model = OptimizedModel(workload.model, workload.model, Signature(workload.args, workload.kwargs))
    return Patch("eager", workload, before, model, None)


def _compile(
    name: str, workload: Workload, before: _Before, how: Mapping[str, Any], options: Mapping[str, Any]
) -> Patch:
    compiled = torch.compile(fresh_entry(workload.model), dynamic=False, **_isolation(), **how)
    signature = Signature(workload.args, workload.kwargs)
    is_cuda_graph = bool(options.get("triton.cudagraphs")) and uses_cuda(workload)
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT))
            stack.enter_context(torch._dynamo.config.patch(getattr(how.get("backend"), "dynamo_options", {})))
            if options.get("freezing"):
                # Dynamo makes parameters graph constants only while it sees this flag.
                stack.enter_context(torch._inductor.config.patch(freezing=True))
            outputs = run_original(workload, compiled)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception as error:
        raise _undo(name, before, how, error) from error
    except BaseException:
        # Interrupted, or out of time.
        before.put_back()
        raise
    compile_s = time.perf_counter() - started
    if _failure(how) is not None:
        raise _undo(name, before, how, None)
    is_own = _clone_mask(workload, outputs)
    strides = OutputStrides(before.strides, outputs, is_own)
    returned = Returned(outputs, strides, is_own if is_cuda_graph else None)
    before.state.restore()
    frozen = _freeze(workload, before) if options.get("freezing") else None
    model = OptimizedModel(
        workload.model, compiled, signature, returned=returned, is_graphed=is_cuda_graph, frozen=frozen
    )
    return Patch(name, workload, before, model, compile_s)


def _take_fast_path(
    patch: Patch, workload: Workload, before: _Before, backend: Backend, *, should_capture: bool
) -> list[Refusal]:
    """Let calls go past Dynamo's guards where they can; where a CUDA graph cannot be, say why."""
    own = patch.model.__dict__
    frozen: FrozenWeights | None = own["_agnitra_frozen"]
    checks = [own["_agnitra_context"].difference, *([frozen.difference] if frozen is not None else [])]
    started = time.perf_counter()
    returned: Returned | None = own["_agnitra_returned"]
    paths = Paths(workload, before.state, checks, returned.strides if returned is not None else None)
    path, reason = paths.of_compiled(own["_agnitra_compiled"], backend, should_capture=should_capture)
    patch.model.take_fast_path(path)
    patch.is_whole = paths.has_captured or not should_capture
    patch.compile_s = (patch.compile_s or 0.0) + time.perf_counter() - started
    return [Refusal(action="cuda_graph", reason=reason)] if should_capture and reason is not None else []


def _undo(name: str, before: _Before, how: Mapping[str, Any], raised: Exception | None) -> PatchError:
    """Put the model back and say what went wrong. Dynamo wraps a backend's error, or hides it (`suppress_errors`)."""
    before.put_back()
    error = _failure(how) or raised
    reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".") if error is not None else "unknown"
    return PatchError(f"Candidate {name} could not be compiled: {reason}.", hint="The original model is untouched.")


def _failure(how: Mapping[str, Any]) -> Exception | None:
    return getattr(how.get("backend"), "failure", None)


def fresh_entry(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a code object of its own that calls the model.

    Dynamo keeps compiled code per code object. A candidate that compiled the model's own `forward` would share that
    cache (and its recompile limit) with the other candidates and with the user's own torch.compile of the model. Its
    names, and so those of the graph's inputs, are those of `graph.compiled`'s entry.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    name = f"agnitra_entry_{next(_numbers)}"
    # Dynamo also stores what it compiles among the function's globals: those of its own die with it.
    own_globals = {"__builtins__": builtins, "__name__": name}
    return types.FunctionType(entry.__code__.replace(co_name=name), own_globals, name, None, entry.__closure__)


def _isolation() -> dict[str, Any]:
    # New in torch 2.13: frames behind a graph break get a cache of their own too.
    parameters = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in parameters else {}


def _freeze(workload: Workload, before: _Before) -> FrozenWeights | None:
    if not isinstance(workload.model, nn.Module):
        return None
    return FrozenWeights(workload.model, {id(tensor) for tensor in before.state.tensors})


def _clone_mask(workload: Workload, outputs: Any) -> tuple[bool, ...]:
    """Per output tensor: False when it shares memory with an argument or a weight, as a returned cache does."""
    arguments = [tensor for _, tensor in tensors((workload.args, dict(workload.kwargs)))]
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*arguments, *model_tensors(workload.model)]}
    return tuple(tensor.untyped_storage().data_ptr() not in owned for _, tensor in tensors(outputs))
