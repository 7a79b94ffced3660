"""Mark module calls on the profiler's time line, so that every op falls into an innermost module call.

While a session is open `nn.Module.__call__` is a function that enters a marker made beforehand. On a launch-bound model
of 41 modules that adds 5% to torch.profiler's own time, where a pair of forward hooks a module adds a third (CPU).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules import module as nn_module

MARKER_PREFIX = "agn::"
GRADIENT_PREFIX = "agn::grad::"
OWN_RANGE = "agn::own"
# A cache that grows by one token gives every call of a decoder another signature.
MAX_SIGNATURES = 4
_MAX_DEPTH, _MAX_ITEMS = 4, 256

_RecordFunctionFast: Any = getattr(torch._C._profiler, "_RecordFunctionFast", None)
_original_call: Any = nn.Module.__call__
# Dynamo takes it for True, and outside of Dynamo it is one short frame.
_is_compiling = torch.compiler.is_dynamo_compiling
_get_tracing_state = torch._C._get_tracing_state
# Hooks on all modules: torch never makes these dictionaries anew.
_forward_hooks, _forward_pre_hooks = nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks
_backward_hooks, _backward_pre_hooks = nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks
_DYNAMO_MODULES = ("torch._dynamo.variables.nn_module", "torch._dynamo.utils")


@dataclass(eq=False)
class RootCall:
    """The first call of a module that no other module called, with inputs of one signature.

    Attributes:
        index: marker index of these calls.
        module: the root.
        args: positional inputs; not copied.
        kwargs: keyword inputs.
        has_grad: whether gradients were enabled.
        num_calls: how many calls had this signature.
    """

    index: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    has_grad: bool
    num_calls: int = 0


@dataclass
class _Root:
    """What is known of a module that has been called by no other module."""

    calls: dict[Any, RootCall] = field(default_factory=dict)


class ModuleMarkers:
    """Marks every module call while the `with` block runs, and the gradient of every parameter in a backward pass.

    One object may be entered several times in a row (the passes of one profile); its indices stay the same.

    Attributes:
        modules: marker index -> module.
        roots: marker index -> first call of a root with one signature, in order.
        gradients: (marker index of the root call, dotted name of the parameter) of each gradient marker.
        note: why there are no markers, else None.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.roots: dict[int, RootCall] = {}
        self.gradients: list[tuple[int, str]] = []
        self.note: str | None = None
        self.on_root_exit: Callable[[], None] | None = None
        self._marks: dict[int, Any] = {}
        self._root_of: dict[int, _Root] = {}
        self._hooked: dict[int, Any] = {}
        self._handles: list[Any] = []
        self._open = threading.local()

    def __enter__(self) -> Self:
        global _session
        if _RecordFunctionFast is None:
            self.note = "this torch has no fast range marker: ops are not tied to modules"
            return self
        _session = self
        _marks.update(self._marks)
        nn.Module.__call__ = marked_call  # type: ignore[method-assign]
        _tell_dynamo(_original_call, marked_call)
        return self

    def __exit__(self, *exception: object) -> None:
        global _session
        if _session is not self:
            return
        nn.Module.__call__ = _original_call  # type: ignore[method-assign]
        _tell_dynamo(marked_call, _original_call)
        self._marks.update(_marks)
        _marks.clear()
        _session = None
        self._open = threading.local()

    def forget_inputs(self) -> None:
        """Let go of modules, inputs and gradient hooks, so that nothing outlives the profile."""
        for handle in self._handles:
            handle.remove()
        for kept in (self._handles, self._marks, self._root_of, self._hooked, self.modules):
            kept.clear()

    def call_root(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module that may be a root: the slow path, taken once per call of a root and never inside one."""
        depth = getattr(self._open, "depth", 0)
        mark = self._inner_mark(module) if depth else self._root_mark(module, args, kwargs)
        self._open.depth = depth + 1
        try:
            mark.__enter__()
        except RuntimeError:
            # Taken, by a call further up or by another thread.
            mark = _RecordFunctionFast(mark_name(self._index_of(module)))
            mark.__enter__()
        try:
            return module._wrapped_call_impl(*args, **kwargs)
        except BaseException:
            __tracebackhide__ = True
            raise
        finally:
            mark.__exit__(None, None, None)
            self._open.depth = depth
            if depth == 0 and self.on_root_exit is not None:
                self.on_root_exit()

    def _root_mark(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        root = self._root_of.get(id(module))
        signature = signature_of(args, kwargs)
        call = root.calls.get(signature) if root is not None else None
        if call is None:
            with _RecordFunctionFast(OWN_RANGE):
                call = self._new_root_call(module, args, kwargs, signature)
        call.num_calls += 1
        if call.has_grad and id(module) not in self._hooked:
            try:
                with _RecordFunctionFast(OWN_RANGE):
                    self._hook_gradients(call)
            except Exception as error:  # a parameter that cannot be hooked must not stop the user's call
                self.note = f"gradients are not tied to parameters ({type(error).__name__})"
        return self._marks[call.index]

    def _new_root_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], signature: Any
    ) -> RootCall:
        root = self._root_of.setdefault(id(module), _Root())
        if len(root.calls) >= MAX_SIGNATURES:
            call = next(reversed(root.calls.values()))
            root.calls[signature] = call
            return call
        index = self._new_index(module)
        # Keyed by its index, which no address equals: the module's own address must keep taking the slow path.
        self._marks[index] = _RecordFunctionFast(mark_name(index))
        call = RootCall(index, module, args, dict(kwargs), torch.is_grad_enabled())
        self.roots[index] = root.calls[signature] = call
        for part in module.modules():
            is_known = id(part) in _marks or id(part) in self._root_of
            if part is not module and not is_known and _has_usual_call(part):
                _marks[id(part)] = _RecordFunctionFast(mark_name(self._new_index(part)))
        return call

    def _inner_mark(self, module: nn.Module) -> Any:
        index = self._index_of(module)
        mark = self._marks.get(~index)
        if mark is None:
            mark = self._marks[~index] = _RecordFunctionFast(mark_name(index))
        if id(module) not in self._root_of and _has_usual_call(module):
            _marks[id(module)] = mark
        return mark

    def _index_of(self, module: nn.Module) -> int:
        for index, known in enumerate(self.modules):
            if known is module and index not in self.roots:
                return index
        return self._new_index(module)

    def _new_index(self, module: nn.Module) -> int:
        # The list keeps the module alive, so that its address stays its own.
        self.modules.append(module)
        return len(self.modules) - 1

    def _hook_gradients(self, call: RootCall) -> None:
        """Mark the accumulation of each parameter's gradient; the hooks sit on autograd's nodes, unseen by Dynamo."""
        self._hooked[id(call.module)] = None
        for name, parameter in call.module.named_parameters():
            if not parameter.requires_grad or not parameter.is_leaf or id(parameter) in self._hooked:
                continue
            mark = _RecordFunctionFast(f"{GRADIENT_PREFIX}{len(self.gradients)}")
            self.gradients.append((call.index, name.removeprefix("_orig_mod.")))
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            # The node lives as long as it is held: without it the hook would vanish before the backward pass.
            self._hooked[id(parameter)] = (node, parameter)
            self._handles.append(node.register_prehook(_touch(mark)))


_session: ModuleMarkers | None = None
_marks: dict[int, Any] = {}


def marked_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module inside its marker: `nn.Module.__call__` while a session is open."""
    if _is_compiling():
        return self._wrapped_call_impl(*args, **kwargs)
    mark = _marks.get(id(self))
    if mark is not None:
        try:
            with mark:
                # What `__call__` does for a module without hooks, two frames less: they cost as much as the marker.
                if not (
                    self._forward_hooks
                    or self._forward_pre_hooks
                    or self._backward_hooks
                    or self._backward_pre_hooks
                    or _forward_hooks
                    or _forward_pre_hooks
                    or _backward_hooks
                    or _backward_pre_hooks
                    or self._compiled_call_impl is not None
                    or _get_tracing_state() is not None
                ):
                    return self.forward(*args, **kwargs)
                return self._wrapped_call_impl(*args, **kwargs)
        except BaseException as error:
            __tracebackhide__ = True  # IPython leaves this frame out of the user's traceback
            if not _is_taken(error):
                raise
    # torch.compile may keep this function as a module's call after the session is over.
    return _session.call_root(self, args, kwargs) if _session is not None else _original_call(self, *args, **kwargs)


def _is_taken(error: BaseException) -> bool:
    """Whether a marker refused to be entered: the module calls itself, or another thread is in it."""
    return type(error) is RuntimeError and "record_function_fast context" in str(error)


def make_marker(name: str) -> Any:
    """Return a range that the profiler records as an op, to be entered in a `with`; None where torch has none."""
    return _RecordFunctionFast(name) if _RecordFunctionFast is not None else None


def mark_name(index: int) -> str:
    """Return the name of the marker of a module."""
    return f"{MARKER_PREFIX}{index}"


def _has_usual_call(module: nn.Module) -> bool:
    return type(module)._call_impl is nn.Module._call_impl and "_call_impl" not in module.__dict__


def _touch(mark: Any) -> Callable[[Any], None]:
    def touch(_gradients: Any) -> None:
        mark.__enter__()
        mark.__exit__(None, None, None)

    return touch


def _tell_dynamo(known: Any, wanted: Any) -> None:
    """Keep Dynamo's short cut for plain modules, and Dynamo out of the marking function.

    Dynamo inlines `forward` directly when `__call__` is the function that it saw at its own import; another one it
    would trace through. Where it is imported during a session it has seen ours, which the exit takes back.
    """
    for name in _DYNAMO_MODULES:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "unpatched_nn_module_call", None) is known:
            module.unpatched_nn_module_call = wanted  # type: ignore[attr-defined]
    # Where Dynamo is not loaded yet nothing is compiled, and loading it takes a second.
    skip_code = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    if skip_code is not None:
        for function in (marked_call, ModuleMarkers.call_root, ModuleMarkers._root_mark, signature_of):
            skip_code(function.__code__)


def signature_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what tells calls apart: shapes and dtypes of tensors, values of small constants, types of the rest."""
    named = tuple((name, _mark_of_value(kwargs[name], _MAX_DEPTH)) for name in sorted(kwargs))
    return tuple(_mark_of_value(value, _MAX_DEPTH) for value in args), named


def _mark_of_value(value: Any, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple, dict)):
        # Long and deep structures count by their size: a structure may even hold itself.
        if len(value) > _MAX_ITEMS or depth == 0:
            return type(value), len(value)
        if isinstance(value, dict):
            return tuple((str(name), _mark_of_value(item, depth - 1)) for name, item in value.items())
        return tuple(_mark_of_value(item, depth - 1) for item in value)
    return value if isinstance(value, (bool, int, str, type(None))) else type(value)


def module_paths(markers: ModuleMarkers) -> dict[int, dict[int, str]]:
    """Name modules by their path below each root that was called.

    Args:
        markers: after the profile.

    Returns:
        Marker index of the root call -> marker index of a module -> dotted path, "" for the root itself. A module
        that several places of a root share has the first of its paths.
    """
    indices: dict[int, list[int]] = {}
    for index, module in enumerate(markers.modules):
        indices.setdefault(id(module), []).append(index)
    found: dict[int, dict[int, str]] = {}
    for root, call in markers.roots.items():
        paths = found[root] = {root: ""}
        for path, module in _named_modules(call.module):
            for index in indices.get(id(module), ()):
                paths.setdefault(index, path)
    return found


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in root.named_modules():
        # torch.compile's wrapper adds one level that the user's model does not have.
        yield path.removeprefix("_orig_mod").removeprefix("."), module
