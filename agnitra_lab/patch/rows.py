"""Operations along the last dimension: which dimension a call means, what it really reads, and whose neighbours fuse.

Inductor writes softmax, losses and running sums as loops of its own and fuses the pointwise operations around them into
the same loop. A kernel of ours is opaque to it: the value before must be written out for it and the value after read
back. So such a kernel is only put where memory is read and written anyway: its input is given to the graph or comes
from a matrix product, a convolution or another kernel, as it is or as a view; its result leaves the graph or goes to
another such operation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from agnitra_lab.patch.context import RewriteContext, view_again
from agnitra_lab.patch.ops import (
    argument,
    fake_of,
    is_cast,
    is_view,
    is_widening,
    is_written_between,
    memory_root,
    op_name,
)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCERS = {
    "linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "sdpa", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
_CONSUMERS = _PRODUCERS | {"topk", "sort", "multinomial"}
_MERGING = {"contiguous", "view", "reshape", "flatten"}
_COPIES = {"contiguous", "reshape", "flatten", "reshape_as"}


def is_last_dim(dim: Any, node: Any) -> bool:
    """Whether `dim`, a number or a list of one, is the last dimension of a node's value."""
    fake = fake_of(node)
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return fake is not None and fake.dim() > 0 and isinstance(dim, int) and dim in (-1, fake.dim() - 1)


def rank(node: Any) -> int:
    """Return the number of dimensions of a node's value, 0 where it is not known."""
    fake = fake_of(node)
    return fake.dim() if fake is not None else 0


def has_same_rows(node: Any) -> bool:
    """Whether a node's value and its first argument have rows of one length, by their shapes."""
    before, after = fake_of(node.args[0]) if node.args else None, fake_of(node)
    return before is not None and after is not None and before.dim() >= 2 and before.shape[-1] == after.shape[-1]


def merges_rows(node: Any) -> bool:
    """Whether a node only puts the rows of its first argument one after another, in whatever leading dimensions."""
    return op_name(node) in _MERGING and has_same_rows(node)


def has_plain_rows(fake: Tensor) -> bool:
    """Whether a tensor can be viewed as [rows, columns] with contiguous columns, and none of its rows overlap."""
    if fake.dim() == 0 or fake.numel() == 0 or fake.stride(-1) != 1 or 0 in fake.stride():
        return False
    sizes, strides = fake.shape[:-1], fake.stride()[:-1]
    kept = [(int(size), int(stride)) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(kept))


def why_fused_before(node: fx.Node) -> str | None:
    """Return why the kernel would need a value that is not in memory yet, None when it is there anyway."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        if is_cast(node) and not _is_no_op(node):
            return f"its input is converted by {op_name(node)}, which Inductor fuses"
        if op_name(node) in _COPIES and _is_copy(node):
            return f"its input is copied by {op_name(node)}, which Inductor fuses"
        node = node.args[0]
    if node.op in ("placeholder", "get_attr") or op_name(node) in _PRODUCERS or _is_kernel(node):
        return None
    return f"its input comes from {node.name}, which Inductor fuses into a loop of its own"


def why_fused_after(node: fx.Node) -> str | None:
    """Return why the result would be read back for nothing, None when somebody needs it in memory."""
    if _is_needed(node):
        return None
    names = ", ".join(sorted(user.name for user in node.users)) or "nobody"
    return f"its result is used by {names}, which Inductor fuses into a loop of its own"


def _is_needed(node: fx.Node) -> bool:
    for user in node.users:
        if user.op == "output" or op_name(user) in _CONSUMERS or _is_kernel(user):
            return True
        is_same = is_view(user) and not (is_cast(user) and not _is_no_op(user))
        is_idle = op_name(user) == "dropout" and argument(user, 2, "training", True) is False
        if (is_same or is_idle) and _is_needed(user):
            return True
    return False


def _is_kernel(node: fx.Node) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith("agnitra_lab.generate")


def _is_no_op(cast: fx.Node) -> bool:
    before, after = fake_of(cast.args[0]), fake_of(cast)
    return before is not None and after is not None and before.dtype is after.dtype


def _is_copy(node: fx.Node) -> bool:
    before, after = fake_of(node.args[0]), fake_of(node)
    if before is None or after is None:
        return True
    if op_name(node) == "contiguous":
        return not before.is_contiguous()
    # Rows that merge are viewed; anything else that is not contiguous may be moved.
    return not (before.is_contiguous() or (has_plain_rows(before) and before.shape[-1] == after.shape[-1]))


@dataclass(frozen=True)
class Widened:
    """What a call's input is made of.

    Attributes:
        top: the call's input.
        bare: the value under all widening casts.
        views: those of its views that are made after a cast, outermost first.
        nodes: every node between `bare` and the call's input, outermost first.
    """

    top: fx.Node
    bare: fx.Node
    views: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    def fake(self) -> Tensor | None:
        """Return the fake tensor of the call's input as it was before it was widened, None when there is no such view.

        Its strides are not always those of the input: a cast makes a slice contiguous.
        """
        fake = fake_of(self.bare)
        try:
            for view in reversed(self.views):
                fake = view_again(view, fake) if fake is not None else None
        except RuntimeError:
            return None
        return fake

    def narrow(self, before: fx.Node, context: RewriteContext) -> fx.Node:
        """Return the call's input as it was before it was widened: h[:, 1:] for h.float()[:, 1:]."""
        value = self.bare
        for view in reversed(self.views):
            value = context.again(before, view, value)
        return value


def widened(node: Any) -> Widened:
    """Look through the widening casts of a value, and through its views as far as there are casts below them."""
    nodes: list[fx.Node] = []
    views: list[fx.Node] = []
    found = Widened(node, node, (), ())
    current: Any = node
    while is_widening(current) or _is_plain_view(current):
        nodes.append(current)
        if not is_widening(current):
            views.append(current)
        elif isinstance(current.args[0], fx.Node):
            found = Widened(node, current.args[0], tuple(views), tuple(nodes))
        current = current.args[0]
    return found


def _is_plain_view(node: Any) -> bool:
    """Whether a node is a view of one tensor by numbers alone, which can be taken of another tensor like it."""
    if not is_view(node) or is_cast(node):
        return False
    return fake_of(node) is not None and fake_of(node.args[0]) is not None and node.all_input_nodes == [node.args[0]]


def is_written(values: Sequence[fx.Node], first: fx.Node, last: fx.Node) -> bool:
    """Whether memory of any of the values is written from `first` up to `last`, both included."""
    return any(is_written_between(memory_root(value), first, last) for value in values)


def site_of(fake: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of a tensor over whose last dimension a kernel goes."""
    return math.prod(int(size) for size in fake.shape[:-1]), int(fake.shape[-1])
