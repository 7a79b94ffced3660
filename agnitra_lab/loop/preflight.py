"""What can be known before a run: every expected failure that needs no measuring is found here, leaving nothing."""

from __future__ import annotations

from typing import Any

import torch

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.compiler import require_cpp_compiler
from agnitra_lab.errors import UsageError
from agnitra_lab.graph.tree import is_plain, tensors
from agnitra_lab.loop.undisturbed import as_it_was
from agnitra_lab.runs.store import RunStore


def check_machine(store: RunStore) -> None:
    """Find out whether runs can be written and graphs compiled.

    Raises:
        RunStoreError: the artifacts folder cannot be written.
        MissingError: there is no C++ compiler.
    """
    store.check_writable()
    require_cpp_compiler()


def check_runs(workload: Workload) -> Any:
    """Call the workload once, and return what it gives.

    Raises:
        UsageError: when the model does not take its inputs, with the model's own words.
    """
    try:
        with torch.no_grad(), as_it_was(workload):
            return workload()
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise UsageError(
            f"{workload.name} does not run on its inputs: {type(error).__name__}: {text}.",
            hint="Check the shapes, dtypes and devices of the inputs.",
        ) from error


def check_comparable(workload: Workload) -> None:
    """Call the workload once, and find out whether its results can be held against others.

    Raises:
        UsageError: as `check_runs`; when it takes or gives tensors whose values nothing here could compare; and when
            part of it is TorchScript.
    """
    _refuse_torch_script(workload)
    given = (workload.args, dict(workload.kwargs))
    for what, value in (("input", given), ("output", check_runs(workload))):
        for path, tensor in tensors(value):
            if not is_plain(tensor):
                kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
                raise UsageError(
                    f"{workload.name} has the {what}{path}, a tensor of {tensor.dtype} on {tensor.device} ({kind}).",
                    hint="Only dense tensors of values can be compared: put a wrapper around the model that converts "
                    "it.",
                )


def _refuse_torch_script(workload: Workload) -> None:
    modules = workload.model.named_modules() if isinstance(workload.model, torch.nn.Module) else ()
    name = next((name for name, module in modules if isinstance(module, torch.jit.ScriptModule)), None)
    if name is not None:
        part = f"{workload.name} has the TorchScript module {name}" if name else f"{workload.name} is TorchScript"
        raise UsageError(
            f"{part}, whose code no compiler or rewrite here can see, as torch.compile cannot.",
            hint="Give the nn.Module that it was scripted or traced from.",
        )
