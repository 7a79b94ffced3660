"""Hand a live workload to another process of this machine: a file with its objects, tensors by value or by handle."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any, cast

import torch

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError


def write(workload: Workload, path: Path) -> None:
    """Write a workload to a file that `read` turns into an equal one, while this process lives.

    Tensors on a GPU cross as handles to their memory, of which the reader makes copies: nothing that it does reaches
    the originals. Others are written out. Classes of a notebook or a script travel by value where cloudpickle is
    installed, by name otherwise.

    Raises:
        UsageError: when something in it cannot be pickled, with what.
    """
    try:
        with path.open("wb") as file:
            _pickler()(file, protocol=pickle.HIGHEST_PROTOCOL).dump(workload)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(
            f"Workload {workload.name!r} cannot be handed to another process ({type(error).__name__}: {text}).",
            hint="Define its classes in a module, or install cloudpickle for those of a notebook.",
        ) from error


def read(path: Path) -> Workload:
    """Return the workload that a process of this machine has written."""
    with path.open("rb") as file:
        return cast(Workload, pickle.load(file))


def _pickler() -> Any:
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle

        base: Any = cloudpickle.Pickler
    else:
        base = pickle.Pickler

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                from torch.multiprocessing.reductions import reduce_tensor

                rebuild, arguments = reduce_tensor(value.detach())
                is_parameter = isinstance(value, torch.nn.Parameter)
                return _copied, (rebuild, arguments, is_parameter, value.requires_grad)
            inherited = getattr(super(), "reducer_override", None)
            return inherited(value) if inherited is not None else NotImplemented

    return Pickler


def _copied(rebuild: Any, arguments: Any, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    """Copy a tensor out of another process's memory: a wild write here must not reach it."""
    shared = rebuild(*arguments)
    own = torch.empty_strided(shared.shape, shared.stride(), dtype=shared.dtype, device=shared.device).copy_(shared)
    return torch.nn.Parameter(own, requires_grad) if is_parameter else own.requires_grad_(requires_grad)
