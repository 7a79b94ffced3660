"""The strides of a call's results, given back where compiled code has others.

Inductor pads the rows of a product whose width no tensor core takes (50,257 logits become rows of 50,264) and returns a
view of the padded memory. A caller who flattens the original's result could not flatten that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.device.row_copy import copy_rows
from agnitra_lab.graph.tree import tensors
from agnitra_lab.patch.layouts import is_dense

Strides = tuple[int, ...]
_MOST_SPREAD = 8
"""Times its own size that a result may take for its strides' sake."""


def strides_of(outputs: Any) -> list[Strides | None]:
    """Return the strides of each tensor of a result; None for a view whose elements overlap or lie far apart."""
    return [
        tensor.stride() if tensor.layout is torch.strided and _is_compact(tensor) else None
        for _, tensor in tensors(outputs)
    ]


class OutputStrides:
    """Which results of a compiled call have other strides than the original's, and what those are.

    Args:
        wanted: the original's, as `strides_of` gives them.
        outputs: what the compiled call returned for the same inputs.
        is_own: of each tensor among them, whether it is memory of the call's own; others stay as they are, because a
            copy would be no alias any more.
    """

    def __init__(self, wanted: Sequence[Strides | None], outputs: Any, is_own: Sequence[bool]) -> None:
        self._wanted: dict[int, Strides] = {}
        for index, ((_, tensor), strides, own) in enumerate(zip(tensors(outputs), wanted, is_own, strict=False)):
            if own and strides is not None and _differs(tensor, strides):
                self._wanted[index] = strides

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def of(self, num_tensors: int) -> list[Strides | None]:
        """Return the strides to give to each tensor, None where it has them."""
        return [self._wanted.get(index) for index in range(num_tensors)]

    def given_to(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return these tensors with the original's strides, copies where they lack them."""
        pairs = zip(found, self.of(len(found)), strict=True)
        return [tensor if layout is None else copied(tensor, layout) for tensor, layout in pairs]


def copied(leaf: Tensor, strides: Strides | None) -> Tensor:
    """Return a copy with these strides; None for the leaf's own."""
    if strides is None:
        return leaf.clone()
    out = torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device)
    return out if out.is_contiguous() and copy_rows(leaf, out) else out.copy_(leaf)


def _is_compact(tensor: Tensor) -> bool:
    """Whether memory with these strides is no waste, and none of it is two elements'.

    A window's keys are the end of all keys; the last token's logits are one row of thousands, and stay as they come.
    """
    if is_dense(tensor):
        return True
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return False
        span += (size - 1) * stride
    return 0 < span <= _MOST_SPREAD * tensor.numel()


def _differs(leaf: Tensor, strides: Strides) -> bool:
    # The stride of a dimension of size 1 is never used, and torch leaves it free.
    if leaf.layout is not torch.strided or leaf.dim() != len(strides) or leaf.numel() == 0:
        return False
    return any(size > 1 and have != want for size, have, want in zip(leaf.shape, leaf.stride(), strides, strict=True))
