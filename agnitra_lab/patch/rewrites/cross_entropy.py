"""The cross-entropy of logits becomes one kernel that reads each logit once and keeps nothing.

Trigger: F.cross_entropy, nn.CrossEntropyLoss, F.nll_loss(F.log_softmax(x, 1)), or -gather of a log-softmax's targets
(the gather itself); casts that widen the logits, views that merge tokens and the copy of a shifted slice are left out.
Rule: the logits are in memory anyway (`agnitra_lab.patch.rows`); a cap or a scale before them is Inductor's to fuse.
Algebra: log(sum(exp(x))) - x[target] in fp32, label smoothing as in torch; means and sums stay torch's.
Guard: int64 class indices, no class weights, logits in float32, bfloat16 or float16 with contiguous classes (also as
[N, C, d] when C lies innermost), tokens in at most two levels of strides, nothing written in between.
Source: Milakov and Gimelshein, arXiv 1805.02867; Liger Kernel (Hsu et al., arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.ops import argument, fake_of, is_widening, op_name
from agnitra_lab.patch.rewrites.softmax import softmax_dim
from agnitra_lab.patch.rows import (
    KERNEL_DTYPES,
    Widened,
    has_plain_rows,
    is_last_dim,
    is_written,
    merges_rows,
    rank,
    why_fused_before,
    widened,
)

ACTION = "cross_entropy"
_NAMES = {
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
    ),
    "nll_loss": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}  # fmt: skip
_DEFAULTS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
# Reductions as torch._C._nn counts them.
_REDUCTIONS = {"none": "none", "mean": "mean", "sum": "sum", 0: "none", 1: "mean", 2: "sum"}


@dataclass(frozen=True)
class Loss:
    """One cross-entropy: its logits, its classes and how they count."""

    x: fx.Node
    target: fx.Node
    rules: dict[str, Any]
    """ignore_index, label_smoothing and reduction."""
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    """All nodes of the pattern, in graph order."""
    class_dim: int = 1
    is_gather: bool = False


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each loss by the kernel.

    Returns:
        One descriptor per loss.
    """
    descriptors = []
    num_found = 0
    for node in list(graph_module.graph.nodes):
        found = match_loss(node)
        if found is None:
            continue
        num_found += 1
        if isinstance(found, str):
            context.refuse(ACTION, found)
            continue
        merged = _merges(found)
        source = widened(merged[-1].args[0] if merged else found.x)
        problem = _why_not(found, source, merged)
        if problem:
            context.refuse(ACTION, problem)
            continue
        x, bare = fake_of(found.x), fake_of(source.bare)
        assert x is not None and bare is not None
        num_classes = int(x.shape[found.class_dim])
        kernel = context.kernel(ACTION, (x.numel() // num_classes, num_classes), bare.dtype)
        if kernel is not None:
            gone = [*reversed([*merged, *source.nodes]), *found.nodes]
            descriptors.append(_replace(found, source, gone, kernel, context))
    if not num_found:
        context.refuse(ACTION, "the graph has no cross-entropy over classes")
    return descriptors


def match_loss(node: fx.Node) -> Loss | str | None:
    """Match one spelling of a loss; a text says why a loss that is there cannot be taken."""
    name = op_name(node)
    if name == "gather":
        return _match_gather(node)
    if name not in _NAMES:
        return None
    given = {key: argument(node, index, key, _DEFAULTS.get(key)) for index, key in enumerate(_NAMES[name])}
    x, target = given["input"], given["target"]
    if given["weight"] is not None:
        return "the classes have weights"
    if given["size_average"] is not None or given["reduce"] is not None or given["reduction"] not in _REDUCTIONS:
        return "its reduction is not none, mean or sum"
    fake, target_fake = fake_of(x), fake_of(target)
    if fake is None or target_fake is None:
        return "shapes are not known"
    if fake.dim() < 2 or target_fake.dtype is not torch.int64:
        return "its targets are not int64 classes of a batch"
    rules = {
        "ignore_index": int(given["ignore_index"]),
        "label_smoothing": float(given.get("label_smoothing", 0.0)),
        "reduction": _REDUCTIONS[given["reduction"]],
    }
    class_dim = fake.dim() - 1 if fake.dim() == 2 else 1
    if name == "cross_entropy":
        return Loss(x, target, rules, node, (node,), class_dim)
    views = _merging_views(x) if class_dim == fake.dim() - 1 else []
    chances: Any = views[-1].args[0] if views else x
    if op_name(chances) != "log_softmax":
        return "the nll_loss does not follow a log_softmax directly"
    class_dim = rank(chances) - 1 if views else class_dim
    problem = _why_not_log_softmax(chances, class_dim)
    nodes = (chances, *reversed(views), node)
    return problem or Loss(argument(chances, 0, "input"), target, rules, node, nodes, class_dim)


def _merging_views(node: Any) -> list[fx.Node]:
    """Return the views that only put rows one after another and that nobody else reads, outermost first."""
    found: list[fx.Node] = []
    while merges_rows(node) and len(node.users) == 1:
        found.append(node)
        node = node.args[0]
    return found


def _match_gather(node: fx.Node) -> Loss | str | None:
    x, index = argument(node, 0, "input"), argument(node, 2, "index")
    if op_name(x) != "log_softmax" or not is_last_dim(argument(node, 1, "dim"), x):
        return None
    fake, index_fake = fake_of(x), fake_of(index)
    if fake is None or index_fake is None or tuple(index_fake.shape) != (*fake.shape[:-1], 1):
        return "not one value of each row is gathered"
    rules = {"ignore_index": _DEFAULTS["ignore_index"], "label_smoothing": 0.0, "reduction": "none"}
    class_dim = fake.dim() - 1
    problem = _why_not_log_softmax(x, class_dim)
    return problem or Loss(argument(x, 0, "input"), index, rules, node, (x, node), class_dim, is_gather=True)


def _why_not_log_softmax(node: fx.Node, class_dim: int) -> str | None:
    x, fake = fake_of(argument(node, 0, "input")), fake_of(node)
    dim = softmax_dim(node)
    if x is None or fake is None or not isinstance(dim, int) or dim % x.dim() != class_dim:
        return "the log_softmax is over another dimension than the classes"
    if torch.promote_types(x.dtype, fake.dtype) is not fake.dtype:
        return "its input is rounded before the log_softmax"
    return "the log_softmax is used elsewhere too" if len(node.users) != 1 else None


def _merges(found: Loss) -> list[fx.Node]:
    """Return the nodes that only put the tokens' rows one after another, outermost first."""
    x = fake_of(found.x)
    nodes: list[fx.Node] = []
    if x is None or found.class_dim != x.dim() - 1:
        return nodes
    node: Any = found.x
    while merges_rows(node) or (is_widening(node) and nodes):
        nodes.append(node)
        node = node.args[0]
    return nodes


def _why_not(found: Loss, source: Widened, merged: Sequence[fx.Node]) -> str | None:
    logits, x, result = source.fake(), fake_of(found.x), fake_of(found.result)
    if logits is None or x is None or result is None:
        return "shapes are not known"
    # Those on the way count too: a loss in float64 is not computed in float32.
    dtypes = [logits.dtype, x.dtype, result.dtype]
    if any(dtype not in KERNEL_DTYPES for dtype in dtypes):
        return f"its dtypes are {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    rows = logits if found.class_dim == x.dim() - 1 else logits.movedim(1, -1)
    if rows.numel() == 0 or rows.stride(-1) != 1 or 0 in rows.stride() or (rows.dim() > 3 and not has_plain_rows(rows)):
        return "the classes of a token are not contiguous"
    chain = [*merged, *source.nodes]
    first = chain[-1] if chain else found.nodes[0]
    if is_written([source.bare, found.target, found.x, *found.nodes], first, found.result):
        return "its logits or targets are written in between"
    return why_fused_before(source.bare)


def _replace(
    found: Loss, source: Widened, gone: Sequence[fx.Node], kernel: Kernel, context: RewriteContext
) -> PatchDescriptor:
    result, x = fake_of(found.result), fake_of(found.x)
    assert result is not None and x is not None
    config: dict[str, JsonValue] = {"kernel": kernel.config.key(), "shape": [int(size) for size in x.shape]}
    descriptor = context.describe(
        ACTION, found.result, gone, f"kernel {kernel.name}", config | found.rules, kernel.content_hash
    )

    def insert(target: Any, value: fx.Node, *args: Any) -> fx.Node:
        node = context.call(found.result, target, value, *args)
        node.meta["example_value"] = target(value.meta["example_value"], *args)
        return node

    logits = source.narrow(found.result, context)
    if found.class_dim != x.dim() - 1:
        logits = insert(torch.movedim, logits, 1, -1)
    shape = tuple(int(size) for size in logits.meta["example_value"].shape[:-1])
    target = insert(torch.squeeze, found.target, -1) if found.is_gather else found.target
    if tuple(target.meta["example_value"].shape) != shape:
        target = insert(torch.reshape, target, shape)
    loss = context.call(found.result, kernel.call, logits, target, **found.rules, out_dtype=result.dtype)
    loss.meta["example_value"] = result
    if found.rules["reduction"] == "none":
        loss.meta["example_value"] = result.new_empty(shape)
        loss = insert(torch.neg, loss) if found.is_gather else loss
        if tuple(result.shape) != shape:
            loss = insert(torch.reshape, loss, tuple(int(size) for size in result.shape))
    found.result.replace_all_uses_with(loss)
    erase_unused(gone)
    return descriptor
