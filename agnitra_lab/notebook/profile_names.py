"""Names on the profile card, short enough to read: nodes, ops, kernels, modules and source lines."""

from __future__ import annotations

import re
from pathlib import PurePath

from agnitra_lab.contracts.telemetry import KernelEvent, NodeEvent, OpEvent
from agnitra_lab.report import numbers

_MAX_FUSED_NAMES = 2
_MAX_SOURCE = 32
NO_OWNER = "no known owner"
_OWNERS = {"param_grad": "parameter gradients", "optimizer": "optimiser"}
_METHODS = {
    "order": "op order",
    "partial_order": "most of the ops",
    "sequence_number": "forward op",
    "hook": "gradient hook",
    "range": "torch range",
    "provenance": "kernel source",
    "replay": "launch order",
    "reference": "another capture",
    "compiled region": "compiled region",
    "module": "module marker",
    "fx_node": "op order",
    "outside_graph": "no module ran",
}


def node_name(node: str | None, op: str | None = None) -> str:
    """A node's short name: a fused set by its first two names and how many there are besides; without a node the op."""
    if not node:
        return short_op(op) if op else "no node"
    if is_other_owner(node):
        kind, _, name = node.partition(":")
        return f"gradient of {name}" if kind == "param_grad" else f"optimiser {name}"
    names = node.split(" + ")
    num_others = len(names) - _MAX_FUSED_NAMES
    return " + ".join(names[:_MAX_FUSED_NAMES]) + (f" +{num_others}" if num_others > 0 else "")


def is_other_owner(node: str) -> bool:
    """Whether a row's node names a parameter's gradient or an optimiser, which are no nodes of a graph."""
    return node.startswith(("param_grad:", "optimizer:"))


def short_op(op: str) -> str:
    """An op's or kernel's name without what many share: namespaces, template arguments, call arguments."""
    name = op.removeprefix("void ").replace("(anonymous namespace)::", "")
    if "<" not in name and "(" not in name:
        return name.removeprefix("aten::")
    return re.split(r"[<(]", name, maxsplit=1)[0].rsplit("::", 1)[-1].strip() or name


def place_of(event: OpEvent | NodeEvent | KernelEvent) -> str:
    """The module that ran a row, or else the part of the program that did."""
    if event.module_path is not None:
        return event.module_path or "the root module"
    if event.owner is None and event.method is None:
        return NO_OWNER
    return _OWNERS.get(event.owner or "", "outside the graph")


def short_source(source: str) -> str:
    """A source line's file name and number, without the folders."""
    return numbers.shortened(PurePath(source.replace("\\", "/")).name or source, _MAX_SOURCE)


def method_name(event: OpEvent | NodeEvent) -> str | None:
    """How a row's place is known, in a word or two; None where nothing is known."""
    if event.method is None:
        return None
    word = _METHODS[event.method]
    if event.confidence is None or event.confidence >= 0.995:
        return word
    return f"{word}, {100 * event.confidence:.0f}% sure"
