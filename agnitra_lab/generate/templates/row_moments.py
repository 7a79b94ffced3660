"""Rows brought to mean 0 and variance 1: the Triton code that layer_norm and group_norm share.

A row that fits in a block is read once and centred in registers. A longer one is read twice: its moments are gathered
lane by lane in Welford's recurrence and merged by Chan's rule, never as E[x^2] - E[x]^2, which cancels. A row may also
be SPLIT over programs, which wait for each other's moments and read their parts again from the L2. Where SPLIT blocks
hold it, programs pass from block to block and from row to row, and the next block is read before the one before it is
waited for; where they do not, each loops over its part. Of more than may wait, one kernel leaves the moments of every
part, the next one merges them and normalises.
"""

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from agnitra_lab.generate.templates.arrivals import arrive, wait_for, wait_for_all
from agnitra_lab.generate.templates.moments import (
    _merge_moments,
    _merge_parts,
    _scale_of,
    _two_parts,
    _update_moments,
)
from agnitra_lab.generate.templates.row_parts import (
    _activated,
    _affine,
    _apply_kernel,
    _chunk_kernel,
    _leave,
    _part_moments,
    _relay_kernel,
    _row_moments,
    _spread,
    _sum_at,
    _waiting_kernel,
    _write_block,
    _write_part,
)
from agnitra_lab.generate.templates.row_points import MAX_WAITING


@triton.jit
def _block_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    summed_ptr,
    num_rows,
    num_cols,
    num_groups,
    stride_xm,
    stride_rm,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_cols)
    x_at = x_ptr + offs_m[:, None] * stride_xm + offs_n
    h = _sum_at(x_at, residual_ptr + offs_m[:, None] * stride_rm + offs_n, mask, dtype, HAS_RESIDUAL, "")
    out_at = offs_m[:, None] * num_cols + offs_n
    if HAS_RESIDUAL:
        tl.store(summed_ptr + out_at, h.to(dtype), mask=mask)
    # Before the sums, so that the loads do not wait for them.
    weight, bias = _affine(
        weight_ptr, bias_ptr, offs_m, 0, num_cols, num_groups, HAS_WEIGHT, HAS_BIAS, SPATIAL, BLOCK_N
    )
    total = num_cols * 1.0
    mean = tl.div_rn(tl.sum(h, axis=1), total)
    centred = tl.where(offs_n < num_cols, h - mean[:, None], 0.0)
    # What rounding left in the mean is taken out once more: the row is still in registers.
    shift = tl.div_rn(tl.sum(centred, axis=1), total)
    scale = _scale_of(tl.sum(centred * centred, axis=1) - total * shift * shift, total, eps)
    normed = (centred - shift[:, None]) * scale[:, None]
    tl.store(out_ptr + out_at, _activated(normed * weight + bias, IS_SILU).to(dtype), mask=mask)


@triton.jit
def _loop_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    summed_ptr,
    num_rows,
    num_cols,
    num_groups,
    stride_xm,
    stride_rm,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    mask_m = (offs_m < num_rows)[:, None]
    x_rows, residual_rows = x_ptr + offs_m[:, None] * stride_xm, residual_ptr + offs_m[:, None] * stride_rm
    lanes = tl.arange(0, BLOCK_N)[None, :]
    mean_lanes = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), dtype=tl.float32)
    m2_lanes = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + lanes
        mask_n = offs_n < num_cols
        h = _sum_at(x_rows + offs_n, residual_rows + offs_n, mask_m & mask_n, dtype, HAS_RESIDUAL, "")
        mean_lanes, m2_lanes = _update_moments(mean_lanes, m2_lanes, h, mask_n, start // BLOCK_N + 1)
    count = tl.cdiv(tl.maximum(num_cols - lanes, 0), BLOCK_N).to(tl.float32)
    mean, rest, m2 = _merge_moments(mean_lanes, m2_lanes, count, num_cols * 1.0)
    scale = _scale_of(m2, num_cols * 1.0, eps)
    # The second pass adds again instead of reading back `summed`: a store and a load of one address in one kernel would
    # need a barrier, and the inputs are still in the L2.
    for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + lanes
        mask = mask_m & (offs_n < num_cols)
        h = _sum_at(x_rows + offs_n, residual_rows + offs_n, mask, dtype, HAS_RESIDUAL, "")
        out_at = offs_m[:, None] * num_cols + offs_n
        if HAS_RESIDUAL:
            tl.store(summed_ptr + out_at, h.to(dtype), mask=mask)
        weight, bias = _affine(
            weight_ptr, bias_ptr, offs_m, start, num_cols, num_groups, HAS_WEIGHT, HAS_BIAS, SPATIAL, BLOCK_N
        )
        normed = (h - mean[:, None] - rest[:, None]) * scale[:, None]
        tl.store(out_ptr + out_at, _activated(normed * weight + bias, IS_SILU).to(dtype), mask=mask)


KERNELS = (
    arrive,
    wait_for,
    wait_for_all,
    _two_parts,
    _merge_moments,
    _merge_parts,
    _row_moments,
    _update_moments,
    _scale_of,
    _sum_at,
    _spread,
    _affine,
    _activated,
    _part_moments,
    _leave,
    _write_part,
    _write_block,
    _relay_kernel,
    _waiting_kernel,
    _block_kernel,
    _loop_kernel,
    _chunk_kernel,
    _apply_kernel,
)
"""What a rendered source needs: device functions, then the kernels of parts that wait (in blocks, in loops), of one
block, of a loop, and the two of a split."""
_RELAY_PROGRAMS = 4
"""For each multiprocessor: as many as may fit. Those that do not find nothing left."""
IS_COMPILED = isinstance(_block_kernel, triton.JITFunction)


def _launcher(kernel):
    # The interpreter's kernel is no JITFunction, and wrap_triton takes nothing else.
    return wrap_triton(kernel) if IS_COMPILED else kernel


def _most_waiting(device: torch.device) -> int:
    # A multiprocessor runs one program at least. The interpreter runs one after the other, and would wait for ever.
    is_known = IS_COMPILED and device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if is_known else 0


def normalise_rows(
    x_MN: torch.Tensor,
    residual_MN: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    summed: torch.Tensor | None,
    eps: float,
    config: tuple[int, int, int, int, int],
    *,
    num_groups: int = 1,
    spatial: int = 0,
    is_silu: bool = False,
) -> None:
    """Normalise every row of x (or of x + residual) into `out`, and leave the sum in `summed`.

    Args:
        x_MN: rows with contiguous columns and any row stride.
        residual_MN: like x, added first; then `summed` is given too.
        weight: contiguous; a value a column, or with `spatial` a value a channel (groups x columns / spatial).
        bias: as the weight.
        out: contiguous, M x N values in any shape.
        eps: added to the variance, which is the one over N.
        config: BLOCK_N, ROWS_PER_PROGRAM, SPLIT, num_warps, num_stages.
        num_groups: rows that follow one another with other channels.
        spatial: values of a row that share one channel; 0 for a weight a column.
        is_silu: apply SiLU to the result before it is rounded.
    """
    block_n, rows_per_program, split, num_warps, num_stages = config
    num_rows, num_cols = x_MN.shape
    affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "IS_SILU": is_silu, "SPATIAL": spatial}
    options = {"BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    stride_rm = 0 if residual_MN is None else residual_MN.stride(0)
    residual_MN = x_MN if residual_MN is None else residual_MN
    has_residual = summed is not None
    summed = x_MN if summed is None else summed
    tensors = (x_MN, residual_MN, x_MN if weight is None else weight, x_MN if bias is None else bias, out, summed)
    if split > 1:
        numbers = (num_groups, x_MN.stride(0), stride_rm, eps)
        _normalise_split(tensors, numbers, split, num_stages, has_residual, affine, options)
        return
    is_one_block = bool(num_cols <= block_n)
    looped = {} if is_one_block else {"NUM_STAGES": num_stages}
    launcher = _launcher(_block_kernel if is_one_block else _loop_kernel)
    launcher[((num_rows + rows_per_program - 1) // rows_per_program,)](
        *tensors, num_rows, num_cols, num_groups, x_MN.stride(0), stride_rm, eps, HAS_RESIDUAL=has_residual,
        ROWS_PER_PROGRAM=rows_per_program, **affine, **looped, **options,
    )  # fmt: skip


def _normalise_split(tensors, numbers, split, num_stages, has_residual, affine, options):
    x_MN, residual_MN, weight, bias, out, summed = tensors
    num_groups, stride_xm, stride_rm, eps = numbers
    num_rows, num_cols = x_MN.shape
    moments = torch.empty((num_rows, split, 3), dtype=torch.float32, device=x_MN.device)
    lanes = {"SPLIT": split, "SPLIT_LANES": 1 << (split - 1).bit_length()}
    is_held = bool(split * options["BLOCK_N"] >= num_cols)
    if not is_held:
        options["NUM_STAGES"] = num_stages
    if split <= min(_most_waiting(x_MN.device), MAX_WAITING):
        arrivals = torch.zeros(num_rows + 1, dtype=torch.int32, device=x_MN.device)
        if is_held:
            num_programs = min(num_rows * split, _RELAY_PROGRAMS * _most_waiting(x_MN.device))
            _launcher(_relay_kernel)[(num_programs,)](
                *tensors, moments, arrivals, num_rows, num_cols, num_groups, stride_xm, stride_rm, eps,
                HAS_RESIDUAL=has_residual, **lanes, **affine, **options,
            )  # fmt: skip
            return
        _launcher(_waiting_kernel)[(num_rows * split,)](
            *tensors, moments, arrivals, num_cols, num_groups, stride_xm, stride_rm, eps, HAS_RESIDUAL=has_residual,
            **lanes, **affine, **options,
        )  # fmt: skip
        return
    options["NUM_STAGES"] = num_stages
    _launcher(_chunk_kernel)[(num_rows * split,)](
        x_MN, residual_MN, summed, moments, num_rows, num_cols, stride_xm, stride_rm,
        HAS_RESIDUAL=has_residual, SPLIT=split, **options,
    )  # fmt: skip
    source, stride_m = (summed, num_cols) if has_residual else (x_MN, stride_xm)
    _launcher(_apply_kernel)[(num_rows * split,)](
        source, moments, weight, bias, out, num_rows, num_cols, num_groups, stride_m, eps, **lanes, **affine, **options,
    )  # fmt: skip
