"""Capture a model as a graph of ATen calls without running it, each call with its module, source line and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from agnitra_lab.contracts import ComputationGraph, GraphHandoff
from agnitra_lab.errors import CaptureError
from agnitra_lab.graph.nodes import read_nodes


def capture(model: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> GraphHandoff:
    """Trace `model` over fake tensors and describe every ATen call that it makes.

    Nothing is computed: parameters, buffers and inputs keep their values, and a model on a GPU launches no kernel.
    Shapes are those of the given inputs.

    Args:
        model: a `torch.nn.Module`, or one compiled with torch.compile (its original is traced).
        args: positional inputs of one call.
        kwargs: keyword inputs of one call.

    Returns:
        The calls in execution order. Node names are those of `torch.export` and are the same in every capture.

    Raises:
        CaptureError: `model` is no module, or torch.export cannot trace it.

    Source: torch.export, non-strict mode, training IR (ops are not decomposed, so that their names are those that
        the profiler prints).
    """
    module = original_module(model)
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"A graph needs a torch.nn.Module, got {type(model).__name__}.",
            hint="Pass the module itself, or a Workload whose model is one.",
        )
    program = _export(module, tuple(args), dict(kwargs or {}))
    nodes, frontier = read_nodes(program.graph_module)
    return GraphHandoff(graph=ComputationGraph(nodes=nodes), materialization_frontier=frontier)


def original_module(model: Any) -> Any:
    """Return the module that torch.compile wrapped, or `model` itself."""
    return getattr(model, "_orig_mod", model)


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    problems: list[str] = []
    for is_strict in (False, True):
        try:
            # Inference is what is captured: with grad on, export would wrap no_grad regions into submodules.
            with torch.no_grad():
                return torch.export.export(module, args, kwargs, strict=is_strict)
        except Exception as error:  # torch.export raises more than a dozen types, several of them private
            problems.append(f"{type(error).__name__}: {_first_line(error)}")
    raise CaptureError(
        f"{type(module).__name__} cannot be traced by torch.export ({problems[0]}).",
        hint="Control flow that depends on tensor values, .item() and unsupported input types stop a trace; the "
        "profile still attributes time to modules.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:200]
