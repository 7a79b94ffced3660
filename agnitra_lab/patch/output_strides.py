"""The strides of a call's results, given back where compiled code has others.

Inductor pads the rows of a product whose width no tensor core takes (50,257 logits become rows of 50,264) and returns a
view of the padded memory. A caller who flattens the original's result could not flatten that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from agnitra_lab.device.row_copy import copy_rows
from agnitra_lab.patch.layouts import is_dense

Strides = tuple[int, ...]


def strides_of(outputs: Any) -> list[Strides | None]:
    """Return the strides of each leaf of a result; None for what is no tensor, or a view with gaps or overlaps."""
    return [
        leaf.stride() if isinstance(leaf, Tensor) and leaf.layout is torch.strided and is_dense(leaf) else None
        for leaf in _pytree.tree_leaves(outputs)
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
        leaves = _pytree.tree_leaves(outputs)
        own = iter(is_own)
        self._wanted: dict[int, Strides] = {}
        for index, (leaf, strides) in enumerate(zip(leaves, wanted, strict=False)):
            if isinstance(leaf, Tensor) and next(own, False) and strides is not None and _differs(leaf, strides):
                self._wanted[index] = strides

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def of(self, num_leaves: int) -> list[Strides | None]:
        """Return the strides to give to each leaf, None where it has them."""
        return [self._wanted.get(index) for index in range(num_leaves)]

    def __call__(self, outputs: Any) -> Any:
        """Return the result with the original's strides; leaves that lack them are copied."""
        if not self._wanted:
            return outputs
        if isinstance(outputs, Tensor):
            return copied(outputs, self._wanted[0])
        leaves, structure = _pytree.tree_flatten(outputs)
        for index, strides in self._wanted.items():
            leaves[index] = copied(leaves[index], strides)
        return _pytree.tree_unflatten(leaves, structure)


def copied(leaf: Tensor, strides: Strides | None) -> Tensor:
    """Return a copy with these strides; None for the leaf's own."""
    if strides is None:
        return leaf.clone()
    out = torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device)
    return out if out.is_contiguous() and copy_rows(leaf, out) else out.copy_(leaf)


def _differs(leaf: Tensor, strides: Strides) -> bool:
    # The stride of a dimension of size 1 is never used, and torch leaves it free.
    if leaf.layout is not torch.strided or leaf.dim() != len(strides) or leaf.numel() == 0:
        return False
    return any(size > 1 and have != want for size, have, want in zip(leaf.shape, leaf.stride(), strides, strict=True))
