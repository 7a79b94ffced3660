"""fp32 tensors as sums of two fp16 tensors with a scale for each row: what `split_gemm` multiplies.

With x scaled so that the row's largest value lies in [2^14, 2^15), hi = fp16(x) and lo = fp16((x - hi) * 2^11): 22 bits
and a sign for values down to 2^-29 of the largest, and an absolute error of 2^-51 of it below. Infinities and NaNs are
hi alone, and no value but 0 has a hi of 0, so that infinity times it is what it is in fp32.

One pass over the tensor where rows are contiguous; where columns are, a pass for the largest values and one that turns
the tensor while it splits, so that the parts always come with K innermost.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

_COLUMN_SPLIT = 16
_COLUMN_BLOCK = 64


@triton.jit
def _exponent_of(amax):
    """Return the exponent of the scale that puts amax into [2^14, 2^15)."""
    return tl.minimum(141 - (amax.to(tl.int32, bitcast=True) >> 23), 126)


@triton.jit
def _split_values(x, exponent):
    """Return both parts of x."""
    scaled = x * ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    hi = scaled.to(tl.float16)
    # The least fp16 value stands for all that would vanish: infinity times it is infinity, times 0 it is NaN.
    least = tl.where(x > 0, 5.9604644775390625e-08, -5.9604644775390625e-08).to(tl.float16)
    hi = tl.where((x != 0) & (hi == 0), least, hi)
    lo = tl.where(tl.abs(x) < float("inf"), (scaled - hi.to(tl.float32)) * 2048.0, 0.0).to(tl.float16)
    return hi, lo


@triton.jit
def _split_rows(
    x_ptr,
    parts_ptr,
    exponent_ptr,
    num_k,
    rows_per_batch,
    stride_xb,
    stride_xr,
    stride_part,
    pitch,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + (row // rows_per_batch) * stride_xb + (row % rows_per_batch) * stride_xr
    hi_row = parts_ptr + row * pitch
    lo_row = hi_row + stride_part
    offs_k = tl.arange(0, BLOCK)
    if IS_ONE_BLOCK:
        x = tl.load(x_row + offs_k, mask=offs_k < num_k, other=0.0)
        size = tl.abs(x)
        amax = tl.max(tl.where(size < float("inf"), size, 0.0), axis=0)
        exponent = _exponent_of(amax)
        hi, lo = _split_values(x, exponent)
        tl.store(hi_row + offs_k, hi, mask=offs_k < num_k)
        tl.store(lo_row + offs_k, lo, mask=offs_k < num_k)
        tl.store(exponent_ptr + row, exponent)
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in tl.range(0, num_k, BLOCK):
            size = tl.abs(tl.load(x_row + start + offs_k, mask=start + offs_k < num_k, other=0.0))
            largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
        exponent = _exponent_of(tl.max(largest, axis=0))
        for start in tl.range(0, num_k, BLOCK):
            mask = start + offs_k < num_k
            x = tl.load(x_row + start + offs_k, mask=mask, other=0.0)
            hi, lo = _split_values(x, exponent)
            tl.store(hi_row + start + offs_k, hi, mask=mask)
            tl.store(lo_row + start + offs_k, lo, mask=mask)
        tl.store(exponent_ptr + row, exponent)


@triton.jit
def _largest_of_columns(
    x_ptr, largest_ptr, num_cols, num_k, stride_xb, stride_xk, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.program_id(1) * 16 + tl.arange(0, 16)
    batch = tl.program_id(2).to(tl.int64)
    x_columns = x_ptr + batch * stride_xb + offs_n[None, :]
    largest = tl.zeros((16, BLOCK), dtype=tl.float32)
    for start in tl.range(0, num_k, 16 * SPLIT):
        rows = (start + offs_k).to(tl.int64)[:, None]
        mask = (rows < num_k) & (offs_n < num_cols)[None, :]
        size = tl.abs(tl.load(x_columns + rows * stride_xk, mask=mask, other=0.0))
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    out = largest_ptr + (batch * SPLIT + tl.program_id(1)) * num_cols + offs_n
    tl.store(out, tl.max(largest, axis=0), mask=offs_n < num_cols)


@triton.jit
def _split_columns(
    x_ptr,
    largest_ptr,
    parts_ptr,
    exponent_ptr,
    num_cols,
    num_k,
    stride_xb,
    stride_xk,
    stride_part,
    pitch,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    mask_n, mask_k = offs_n < num_cols, offs_k < num_k
    splits = (batch * SPLIT + tl.arange(0, SPLIT)) * num_cols
    found = tl.load(largest_ptr + splits[:, None] + offs_n[None, :], mask=mask_n[None, :], other=0.0)
    exponent = _exponent_of(tl.max(found, axis=0))
    rows = offs_k.to(tl.int64)[:, None]
    x = tl.load(
        x_ptr + batch * stride_xb + rows * stride_xk + offs_n[None, :],
        mask=mask_k[:, None] & mask_n[None, :],
        other=0.0,
    )
    hi, lo = _split_values(x, exponent[None, :])
    out_rows = (batch * num_cols + offs_n)[:, None] * pitch + offs_k[None, :]
    mask = mask_n[:, None] & mask_k[None, :]
    tl.store(parts_ptr + out_rows, tl.trans(hi), mask=mask)
    tl.store(parts_ptr + stride_part + out_rows, tl.trans(lo), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(exponent_ptr + batch * num_cols + offs_n, exponent, mask=mask_n)


_IS_COMPILED = isinstance(_split_rows, triton.JITFunction)
# In the order in which a rendered source needs them.
KERNELS = (_exponent_of, _split_values, _split_rows, _largest_of_columns, _split_columns)


@triton_op("agnitra::split_fp16", mutates_args=())
def split_fp16(x_BRK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split batches of rows.

    Args:
        x_BRK: fp32, [batches, rows, K], any strides; copied first where neither rows nor columns are contiguous.

    Returns:
        Both parts, fp16, [2, batches * rows, K rounded up to 8] (what lies past K is never written), and the exponents
        of the scales, int32, [batches * rows].
    """
    num_batches, num_rows, num_k = x_BRK.shape
    # Descriptors want rows that begin at multiples of 16 bytes.
    pitch = (num_k + 7) // 8 * 8
    parts = torch.empty((2, num_batches * num_rows, pitch), dtype=torch.float16, device=x_BRK.device)
    exponent = torch.empty((num_batches * num_rows,), dtype=torch.int32, device=x_BRK.device)
    if x_BRK.stride(2) != 1 and x_BRK.stride(1) != 1:
        x_BRK = x_BRK.contiguous()
    if x_BRK.stride(2) == 1:
        _launch_rows(x_BRK, parts, exponent)
    else:
        _launch_columns(x_BRK, parts, exponent)
    return parts, exponent


def _launch_rows(x_BRK: torch.Tensor, parts: torch.Tensor, exponent: torch.Tensor) -> None:
    num_batches, num_rows, num_k = x_BRK.shape
    block = min(8192, max(128, triton.next_power_of_2(num_k)))
    launcher = wrap_triton(_split_rows) if _IS_COMPILED else _split_rows
    launcher[(num_batches * num_rows,)](
        x_BRK,
        parts,
        exponent,
        num_k,
        num_rows,
        x_BRK.stride(0),
        x_BRK.stride(1),
        parts.stride(0),
        parts.stride(1),
        IS_ONE_BLOCK=bool(num_k <= block),
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )


def _launch_columns(x_BRK: torch.Tensor, parts: torch.Tensor, exponent: torch.Tensor) -> None:
    num_batches, num_rows, num_k = x_BRK.shape
    largest = torch.empty((num_batches, _COLUMN_SPLIT, num_rows), dtype=torch.float32, device=x_BRK.device)
    launcher = wrap_triton(_largest_of_columns) if _IS_COMPILED else _largest_of_columns
    launcher[((num_rows + 127) // 128, _COLUMN_SPLIT, num_batches)](
        x_BRK,
        largest,
        num_rows,
        num_k,
        x_BRK.stride(0),
        x_BRK.stride(2),
        SPLIT=_COLUMN_SPLIT,
        BLOCK=128,
        num_warps=4,
    )
    launcher = wrap_triton(_split_columns) if _IS_COMPILED else _split_columns
    blocks = ((num_rows + _COLUMN_BLOCK - 1) // _COLUMN_BLOCK, (num_k + _COLUMN_BLOCK - 1) // _COLUMN_BLOCK)
    launcher[(*blocks, num_batches)](
        x_BRK,
        largest,
        parts,
        exponent,
        num_rows,
        num_k,
        x_BRK.stride(0),
        x_BRK.stride(2),
        parts.stride(0),
        parts.stride(1),
        SPLIT=_COLUMN_SPLIT,
        BLOCK=_COLUMN_BLOCK,
        num_warps=4,
    )
