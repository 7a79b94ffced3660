"""Rows out of padded memory into memory without gaps.

torch copies rows of an odd number of 16-bit values two bytes at a time and computes each address by itself: for GPT-2's
412 MB of logits 0.4 ms on an H200, twice what the memory allows. Here a program writes a stretch of the flat result in
whole vectors, and divides once.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

BLOCK = 4096
_LEAST_BYTES = 2**20
"""Less than this is copied before a kernel of ours is launched."""
_LARGEST_INDEX = 2**31 - 1
_LEAST_CAPABILITY = (8, 0)


def row_stride(leaf: Tensor) -> int | None:
    """Return the distance of rows in memory where a tensor is rows with gaps, one after the other; None otherwise."""
    if leaf.dim() < 2 or leaf.stride(-1) != 1 or leaf.stride(-2) <= leaf.shape[-1]:
        return None
    expected = leaf.stride(-2) * leaf.shape[-2]
    for dim in reversed(range(leaf.dim() - 2)):
        if leaf.shape[dim] != 1 and leaf.stride(dim) != expected:
            return None
        expected *= leaf.shape[dim]
    return leaf.stride(-2)


def copy_rows(leaf: Tensor, out: Tensor) -> bool:
    """Copy padded rows into contiguous memory, where a kernel of ours does that faster than torch.

    Args:
        leaf: [..., N] rows with gaps on a CUDA device.
        out: contiguous, of the same shape, dtype and device.

    Returns:
        Whether it was done; nothing was written otherwise.
    """
    stride = row_stride(leaf)
    if (
        stride is None
        or leaf.shape[-1] < BLOCK
        or leaf.device.type != "cuda"
        or leaf.numel() * leaf.element_size() < _LEAST_BYTES
        or leaf.numel() // leaf.shape[-1] * stride > _LARGEST_INDEX
        or not _has_kernels(leaf.device)
    ):
        return False
    gather(leaf, stride, out)
    return True


def gather(leaf: Tensor, stride: int, out: Tensor) -> None:
    """Launch the kernel: on a CUDA device, or in the interpreter."""
    from agnitra_lab.device.row_copy_kernel import gather_rows

    grid = (-(-leaf.numel() // BLOCK),)
    gather_rows[grid](leaf, out, leaf.numel(), leaf.shape[-1], stride, BLOCK=BLOCK, num_warps=4)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
