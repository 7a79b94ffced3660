"""What a constant attention mask says: nothing, causal, or a band around the diagonal (sliding window)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e30
"""Added to any score a fused kernel keeps this value exactly, and times log2(e) it stays finite: the lowest number of
the dtype overflows there, which makes NaN of a row that sees no key."""


@dataclass(frozen=True)
class Band:
    """Query i sees the keys j with -left <= j - i <= right; None: no limit on that side."""

    left: int | None
    right: int | None

    @property
    def is_everything(self) -> bool:
        """Whether the mask hides no key."""
        return self.left is None and self.right is None

    def is_causal(self, num_queries: int, num_keys: int) -> bool:
        """Whether it is what `is_causal=True` means wherever SDPA backends agree: as many keys as queries."""
        return self.left is None and self.right == 0 and num_queries == num_keys


def has_dense_keys(mask: Tensor) -> bool:
    """Whether a mask's keys lie side by side, without which no fused kernel of a GPU takes it."""
    return mask.shape[-1] == 1 or mask.stride(-1) == 1


def is_hiding(value: float, dtype: torch.dtype) -> bool:
    """Whether a score of `value` gets the weight 0 beside any score that a model computes in `dtype`."""
    return value <= -1e9 or value <= torch.finfo(dtype).min


def allowed_keys(mask: Tensor) -> Tensor | None:
    """Return the boolean mask (True: seen) that an additive one amounts to, None when it is more than that.

    A mask with a row that sees no key is more: its finite values decide what such a row averages.

    Args:
        mask: [..., queries, keys], additive of a floating dtype.
    """
    floor = torch.tensor(max(torch.finfo(mask.dtype).min, -1e9), dtype=mask.dtype).item()
    seen = mask == 0
    if not bool((seen | (mask <= floor)).all()):
        return None
    return seen if bool(seen.any(-1).all()) else None


def band_of(seen: Tensor, num_queries: int, num_keys: int) -> Band | None:
    """Return the band that a boolean mask (True: seen) is, the same for every batch and head; None for others."""
    if seen.dim() < 2 or seen.shape[-1] not in (1, num_keys) or seen.shape[-2] not in (1, num_queries):
        return None
    flat = seen.reshape(-1, *seen.shape[-2:])
    if not bool((flat == flat[:1]).all()):
        return None
    mask = flat[0].expand(num_queries, num_keys)
    rows = torch.arange(num_queries, device=mask.device)
    columns = torch.arange(num_keys, device=mask.device)
    if not bool(mask.any(-1).all()):
        return None
    first = torch.where(mask, columns, num_keys).amin(-1)
    last = torch.where(mask, columns, -1).amax(-1)
    left, right = int((rows - first).max()), int((last - rows).max())
    expected = torch.ones_like(mask).tril(right).triu(-left)
    if not torch.equal(mask, expected):
        return None
    return Band(None if left >= num_queries - 1 else left, None if right >= num_keys - 1 else right)
