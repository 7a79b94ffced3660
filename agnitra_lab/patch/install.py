"""Install a candidate: compile the workload's model with its rewrites and hand back a drop-in that can be undone.

fingerprint -> reference run -> first call (compiles) -> drop-in            rollback: drop-in -> original, proved
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.patch import PatchDescriptor, PatchLog, Refusal, RollbackProof
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.dropin import OptimizedModel
from agnitra_lab.patch.frozen import FrozenWeights
from agnitra_lab.patch.rollback import Fingerprint, MutableState, fingerprint, keep_outputs, prove, run_original
from agnitra_lab.patch.signature import Signature

OPTION_ACTIONS: dict[str, dict[str, Any]] = {
    "freezing": {"freezing": True},
    # One graph around the whole call (patch/graphed.py) instead of Inductor's, with its wrapper in front of each.
    "cuda_graph": {"triton.cudagraphs": False},
    "max_autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}
"""What each action of kind "options" adds to the Inductor options."""

# Candidates of one model share the code of its submodules where the graph breaks; this many of them fit.
_RECOMPILE_LIMIT = 64
_numbers = itertools.count()


class Patch:
    """One installed candidate.

    Attributes:
        name: the candidate's name.
        model: the drop-in.
        compile_s: wall seconds of the first call, which compiles; None for eager.
    """

    def __init__(
        self, name: str, workload: Workload, before: _Before, model: OptimizedModel, compile_s: float | None
    ) -> None:
        self.name = name
        self.model = model
        self.compile_s = compile_s
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
        self._marks = [(tensor, tensor.__dict__.get(_MARK)) for tensor in _weights(workload.model)]
        state = MutableState.of(workload)
        self.outputs: Any = keep_outputs(run_original(workload))
        self.state = state.only_written()
        self.state.restore()
        self.fingerprint: Fingerprint = fingerprint(workload.model)

    def restore_marks(self) -> None:
        """Take back the mark that Dynamo leaves on each weight that it traces."""
        for tensor, mark in self._marks:
            if mark is not None:
                setattr(tensor, _MARK, mark)
            elif _MARK in tensor.__dict__:
                delattr(tensor, _MARK)


_MARK = "_dynamo_static_input_type"


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
    merged, taken, refusals = _merge_options(workload, actions, options or {}, base_mode)
    backend = Backend(actions, kernels=kernels, options=merged, is_lowered=is_lowered)
    before = _Before(workload)
    patch = _compile(name, workload, before, {"backend": backend}, merged)
    if "cuda_graph" in taken:
        refusals += _capture(patch, workload, before, backend)
        taken = [action for action in taken if action not in {refusal.action for refusal in refusals}]
    patch._backend = backend
    patch._options = [_describe_option(action, merged) for action in taken]
    patch._refusals = refusals
    if backend.num_graphs == 0:
        patch._refusals += [
            Refusal(action=action, reason="Dynamo captured no graph of this model") for action in backend.actions
        ]
    return patch


def compile_mode(workload: Workload, mode: str) -> Patch:
    """Install plain `torch.compile(mode=mode)` behind the same drop-in, so that wrapper costs cancel out.

    Args:
        mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".

    Raises:
        PatchError: an unknown mode, or a model that does not compile.
    """
    from torch._dynamo.utils import counters

    options = _mode_options(mode)
    num_before = counters["stats"]["unique_graphs"]
    patch = _compile(f"torch.compile({mode})", workload, _Before(workload), {"mode": mode}, options)
    patch._num_graphs = counters["stats"]["unique_graphs"] - num_before
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
    is_cuda_graph = bool(options.get("triton.cudagraphs")) and _uses_cuda(workload)
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT))
            if options.get("freezing"):
                # Dynamo makes parameters graph constants only while it sees this flag.
                stack.enter_context(torch._inductor.config.patch(freezing=True))
            outputs = run_original(workload, compiled)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception as error:
        raise _undo(name, before, how, error) from error
    compile_s = time.perf_counter() - started
    if _failure(how) is not None:
        raise _undo(name, before, how, None)
    clones = _clone_mask(workload, outputs) if is_cuda_graph else None
    before.state.restore()
    frozen = _freeze(workload, before) if options.get("freezing") else None
    model = OptimizedModel(workload.model, compiled, signature, clones=clones, frozen=frozen)
    return Patch(name, workload, before, model, compile_s)


def _capture(patch: Patch, workload: Workload, before: _Before, backend: Backend) -> list[Refusal]:
    """Put a CUDA graph around the compiled call; where that cannot be, say why and leave the call as it is."""
    if backend.num_graphs != 1:
        reason = f"Dynamo made {backend.num_graphs} graphs of the model; Python runs between them at each call"
        return [Refusal(action="cuda_graph", reason=reason)]
    started = time.perf_counter()
    try:
        patch.model.capture(workload.args, workload.kwargs, backend.guards)
    except PatchError as error:
        return [Refusal(action="cuda_graph", reason=error.message)]
    finally:
        before.state.restore()
    patch.compile_s = (patch.compile_s or 0.0) + time.perf_counter() - started
    return []


def _undo(name: str, before: _Before, how: Mapping[str, Any], raised: Exception | None) -> PatchError:
    """Put the model back and say what went wrong. Dynamo wraps a backend's error, or hides it (`suppress_errors`)."""
    before.state.restore()
    before.restore_marks()
    error = _failure(how) or raised
    reason = f"{type(error).__name__}: {_first_line(error)}" if error is not None else "unknown"
    return PatchError(f"Candidate {name} could not be compiled: {reason}.", hint="The original model is untouched.")


def _failure(how: Mapping[str, Any]) -> Exception | None:
    return getattr(how.get("backend"), "failure", None)


def fresh_entry(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a code object of its own that calls the model.

    Dynamo keeps compiled code per code object. A candidate that compiled the model's own `forward` would share that
    cache (and its recompile limit) with the other candidates and with the user's own torch.compile of the model.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    name = f"agnitra_entry_{next(_numbers)}"
    # Dynamo also stores what it compiles among the function's globals: those of its own die with it.
    own_globals = {"__builtins__": builtins, "__name__": name}
    return types.FunctionType(entry.__code__.replace(co_name=name), own_globals, name, None, entry.__closure__)


def _isolation() -> dict[str, Any]:
    # New in torch 2.13: frames behind a graph break get a cache of their own too.
    parameters = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in parameters else {}


def _merge_options(
    workload: Workload, actions: Sequence[str], options: Mapping[str, Any], base_mode: str | None
) -> tuple[dict[str, Any], list[str], list[Refusal]]:
    merged = {**(_mode_options(base_mode) if base_mode else {}), **options}
    taken: list[str] = []
    refusals: list[Refusal] = []
    for action in (action for action in OPTION_ACTIONS if action in actions):
        if ACTIONS[action].needs_cuda and not _uses_cuda(workload):
            refusals.append(Refusal(action=action, reason="the workload has no tensor on a CUDA device"))
            continue
        if action == "freezing" and any(tensor.is_inference() for tensor in _weights(workload.model)):
            reason = "a weight was made in inference mode and has no version counter, so updates could not be noticed"
            refusals.append(Refusal(action=action, reason=reason))
            continue
        merged.update(OPTION_ACTIONS[action])
        taken.append(action)
    return merged, taken, refusals


def _mode_options(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    try:
        return dict(list_mode_options(mode))
    except Exception as error:
        known = "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"
        raise PatchError(f"Unknown torch.compile mode {mode!r}; known: {known}.") from error


def _describe_option(action: str, options: Mapping[str, Any]) -> PatchDescriptor:
    config = {key: options[key] for key in OPTION_ACTIONS[action]}
    return PatchDescriptor(
        name=f"{action}__root__0",
        action=action,
        kind="options",
        node="graph",
        module_path="",
        source=None,
        replaced=(),
        replacement=f"Inductor options {', '.join(config)}",
        config=config,
    )


def _freeze(workload: Workload, before: _Before) -> FrozenWeights | None:
    if not isinstance(workload.model, nn.Module):
        return None
    return FrozenWeights(workload.model, {id(tensor) for tensor in before.state.tensors})


def _clone_mask(workload: Workload, outputs: Any) -> tuple[bool, ...]:
    """Per output tensor: False when it shares memory with an argument or a weight, as a returned cache does."""
    arguments = [
        leaf for leaf in _pytree.tree_leaves((workload.args, dict(workload.kwargs))) if isinstance(leaf, Tensor)
    ]
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*arguments, *_weights(workload.model)]}
    leaves = [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return tuple(leaf.untyped_storage().data_ptr() not in owned for leaf in leaves)


def _weights(model: Callable[..., Any]) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _uses_cuda(workload: Workload) -> bool:
    leaves = _pytree.tree_leaves((workload.args, dict(workload.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return any(tensor.device.type == "cuda" for tensor in [*tensors, *_weights(workload.model)])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else "no message"
