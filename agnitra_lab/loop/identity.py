"""What makes two optimisations the same one: a sha256 over everything that the answer depends on, but weights' values.

Files that code comes from count by path, size and time of change, this package's own by content.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.workload import Workload

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Parts and tensors are described by their own names, and of a module's other tables the hooks of a call alone count.
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
# Known by their versions, which the device's facts hold, or by the package's own hash.
_VERSIONED = frozenset({"torch", "triton", "numpy", "agnitra_lab", *sys.stdlib_module_names} - {"__main__"})
_PACKAGE = Path(__file__).parents[1]
_MAX_DEPTH = 6
_MAX_MODULES = 2000


def identity_of(workload: Workload, device: DeviceInfo) -> str | None:
    """Return the sha256 of what an optimisation is of; None for a callable that is no module.

    Args:
        workload: model and inputs.
        device: where it runs, with the versions.
    """
    model = workload.model
    if not isinstance(model, nn.Module):
        return None
    describe = _Description()
    parts = dict(model.named_modules(remove_duplicate=False))
    facts = (
        _package_sha256(),
        device.model_dump_json(),
        _switches(),
        [(name, describe(part)) for name, part in parts.items()],
        _tensors(model),
        describe(_pytree.tree_flatten((workload.args, dict(workload.kwargs)))[0]),
        str(_pytree.tree_flatten((workload.args, dict(workload.kwargs)))[1]),
        sorted(_code_of({type(part) for part in parts.values()})),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


class _Description:
    """Describes objects by value, each once; what is seen again is named by its number."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []

    def __call__(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        if isinstance(value, (*_PLAIN, Enum)):
            return repr(value)
        if isinstance(value, Tensor):
            return _metadata(value)
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, types.FunctionType):
            return kind, value.__module__, value.__qualname__, _code(value.__code__)
        if depth == 0:
            return kind
        if isinstance(value, Mapping):
            return kind, [(repr(key), self(item, depth - 1)) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return kind, [self(item, depth - 1) for item in value]
        if isinstance(value, (set, frozenset)):
            return kind, sorted(map(repr, value))
        return kind, [(name, self(item, depth - 1)) for name, item in self._attributes(value)]

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        for name, item in getattr(value, "__dict__", {}).items():
            if not isinstance(value, nn.Module) or name not in _TABLES:
                yield name, item
            elif name in _HOOKS:
                yield name, list(item.values())


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    stride = tensor.stride() if tensor.layout is torch.strided else None
    return tuple(tensor.shape), stride, str(tensor.dtype), str(tensor.device), tensor.requires_grad, str(tensor.layout)


def _tensors(model: nn.Module) -> list[Any]:
    """Describe weights and buffers; those that share memory have the number of the first of them."""
    first: dict[int, int] = {}
    found = []
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    ):  # fmt: skip
        number = first.setdefault(id(tensor), len(first))
        found.append((name, type(tensor).__qualname__, number, _metadata(tensor)))
    return found


def _switches() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(),
        str(torch.get_default_dtype()),
    )


def _code_of(classes: set[type]) -> Iterator[Any]:
    """Yield the files that the classes' code comes from, with those that their modules reach by name."""
    queue = list({base.__module__ for kind in classes for base in kind.__mro__})
    for kind in classes:
        if not getattr(sys.modules.get(kind.__module__), "__file__", None):
            # Of a notebook's cell there is no file.
            functions = [(n, f) for n, f in vars(kind).items() if isinstance(f, types.FunctionType)]
            yield kind.__qualname__, repr([(name, _code(function.__code__)) for name, function in functions])
    seen: set[str] = set()
    while queue and len(seen) < _MAX_MODULES:
        name = queue.pop()
        if name in seen or name.partition(".")[0] in _VERSIONED:
            continue
        seen.add(name)
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or not isinstance(file, str):
            continue
        yield name, _file_facts(file)
        for value in list(vars(module).values()):
            if isinstance(value, (types.FunctionType, type)):
                queue.append(value.__module__ or "")
            elif isinstance(value, types.ModuleType):
                queue.append(value.__name__)


def _file_facts(file: str) -> str:
    try:
        stat = Path(file).stat()
    except OSError:
        return file
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def _code(code: types.CodeType) -> str:
    constants = [_constant(value) for value in code.co_consts]
    return hashlib.sha256(repr((code.co_code, constants, code.co_names)).encode()).hexdigest()


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    # The order of a set is another in each process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@functools.cache
def _package_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
