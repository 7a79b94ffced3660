"""Mark module calls on the profiler's time line, so that every op falls into an innermost module call."""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules import module as nn_module

MARKER_PREFIX = "agn::"


@dataclass
class RootCall:
    """The first call of a module that no other module called.

    Attributes:
        module: the root.
        args: positional inputs; not copied.
        kwargs: keyword inputs; empty when the call raised.
        num_calls: how often it was called as a root.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_calls: int = 1


class ModuleMarkers:
    """Marks every module call while the `with` block runs; leaves no hook behind.

    Attributes:
        modules: every module that was called, by marker index.
        roots: the first call of each root, by marker index.
        note: why there are no markers, else None.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.roots: dict[int, RootCall] = {}
        self.note: str | None = None
        self._index_of: dict[int, int] = {}
        self._open = threading.local()
        self._handles: list[Any] = []
        self._filter: Any = None
        self._record: Any = getattr(torch._C._profiler, "_RecordFunctionFast", None)

    def __enter__(self) -> Self:
        if self._record is None:
            self.note = "this torch has no fast range marker: ops are not tied to modules"
            return self
        enter, leave = self._enter, self._leave

        # Dynamo inlines both and drops them: a model compiled inside the profile gets no graph breaks from markers.
        def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.compiler.is_compiling():
                enter(module, args)

        def after_forward(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if not torch.compiler.is_compiling():
                leave(module, rest)

        ours = (ModuleMarkers._enter, ModuleMarkers._leave, ModuleMarkers._stack, ModuleMarkers._count_root)
        for function in (before_forward, after_forward, *ours, RootCall.__init__):
            _never_compile(function)
        self._silence_compile_warning()
        self._handles = [
            nn_module.register_module_forward_pre_hook(before_forward),
            nn_module.register_module_forward_hook(after_forward, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
            # remove() forgets these, and torch.compile then warns of global hooks for the rest of the process.
            nn_module._global_forward_hooks_always_called.pop(handle.id, None)
            nn_module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        self._handles = []
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        # Markers still open belong to calls that never returned here, such as a generator that was left suspended.
        while self._stack():
            self._stack().pop()[1].__exit__(None, None, None)

    def _silence_compile_warning(self) -> None:
        known = list(warnings.filters)
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        added = warnings.filters[0]
        self._filter = added if added not in known else None

    def _stack(self) -> list[tuple[int, Any]]:
        stack: list[tuple[int, Any]] | None = getattr(self._open, "stack", None)
        if stack is None:
            stack = self._open.stack = []
        return stack

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        index = self._index_of.get(id(module))
        if index is None:
            # The list keeps the module alive, so that its id stays its own.
            index = self._index_of[id(module)] = len(self.modules)
            self.modules.append(module)
        stack = self._stack()
        if not stack:
            self._count_root(index, module, args)
        marker = self._record(f"{MARKER_PREFIX}{index}")
        marker.__enter__()
        stack.append((index, marker))

    def _count_root(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        known = self.roots.get(index)
        if known is None:
            self.roots[index] = RootCall(module, args)
        else:
            known.num_calls += 1

    def _leave(self, module: nn.Module, rest: tuple[Any, ...]) -> None:
        index = self._index_of.get(id(module))
        stack = self._stack()
        if not any(open_index == index for open_index, _ in stack):
            return
        # An exception may have passed modules whose own exit did not run: they end here as well.
        while stack:
            open_index, marker = stack.pop()
            marker.__exit__(None, None, None)
            if open_index == index:
                break
        if not stack and len(rest) == 2 and index in self.roots and not self.roots[index].kwargs:
            self.roots[index].kwargs = dict(rest[0])


def module_paths(roots: dict[int, nn.Module], modules: list[nn.Module]) -> dict[int, tuple[int, str]]:
    """Name modules by their path below the root that holds them.

    Args:
        roots: root modules by marker index.
        modules: all marked modules; the position is the marker index.

    Returns:
        Marker index -> (marker index of the root, dotted path, "" for the root itself). A module that several
        places share has the first of its paths; one that no root holds is missing.
    """
    index_of = {id(module): index for index, module in enumerate(modules)}
    paths: dict[int, tuple[int, str]] = {}
    for root_index, root in roots.items():
        for path, module in root.named_modules():
            index = index_of.get(id(module))
            if index is not None:
                # torch.compile's wrapper adds one level that the user's model does not have.
                paths.setdefault(index, (root_index, path.removeprefix("_orig_mod").removeprefix(".")))
    return paths


def _never_compile(function: Any) -> None:
    """Keep Dynamo from compiling a hook as a frame of its own, which it does below a compiled module's call."""
    # Where Dynamo is not loaded yet nothing is compiled, and loading it takes a second.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    skip_code = getattr(dynamo, "skip_code", None)
    if skip_code is not None:
        skip_code(function.__code__)
