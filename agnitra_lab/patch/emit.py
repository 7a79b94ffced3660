"""New nodes that know their fake value, so that rewrites after them can match on what they give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import fake_of


def emit(
    context: RewriteContext, before: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert a call of a function, or of the method of that name, before a node."""
    if isinstance(target, str):
        with before.graph.inserting_before(before):
            node = before.graph.call_method(target, args, kwargs)
    else:
        node = context.call(before, target, *args, **kwargs)
    return _with_fake(node)


def emit_copy(node: fx.Node, mapping: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    """Insert the same call before a node, with some of its arguments exchanged."""
    with before.graph.inserting_before(before):
        copied = before.graph.node_copy(node, lambda old: mapping.get(old, old))
    return _with_fake(copied)


def _with_fake(node: fx.Node) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_of)
    modes = [mode for used in node.all_input_nodes if (mode := getattr(fake_of(used), "fake_mode", None)) is not None]
    with torch.no_grad(), modes[0] if modes else nullcontext():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node
