"""Triton kernel of the template rms_norm at BLOCK_N=2048, ROWS_PER_PROGRAM=1, num_warps=4, num_stages=1.

Launch it as kernel[grid](..., **CONSTANTS, **OPTIONS).
"""

import triton
import triton.language as tl

CONSTANTS = {"BLOCK_N": 2048, "ROWS_PER_PROGRAM": 1, "NUM_STAGES": 1}
OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    summed_ptr,
    num_rows,
    num_cols,
    stride_xm,
    stride_rm,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    mask_m = offs_m < num_rows
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    residual_rows = residual_ptr + offs_m[:, None] * stride_rm
    out_rows = out_ptr + offs_m[:, None] * num_cols
    summed_rows = summed_ptr + offs_m[:, None] * num_cols

    if IS_ONE_BLOCK:
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_cols
        mask = mask_m[:, None] & mask_n[None, :]
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            rounded = h.to(dtype)
            tl.store(summed_rows + offs_n[None, :], rounded, mask=mask)
            h = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(h * h, axis=1) / num_cols + tl.cast(eps, tl.float32))
        normed = h * scale[:, None]
        if CAST_BEFORE_WEIGHT:
            normed = normed.to(dtype).to(tl.float32)
        tl.store(out_rows + offs_n[None, :], (normed * weight[None, :]).to(dtype), mask=mask)
    else:
        acc = tl.zeros((ROWS_PER_PROGRAM, BLOCK_N), dtype=tl.float32)
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < num_cols)[None, :]
            h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
                h = h.to(dtype).to(tl.float32)
            acc += h * h
        scale = tl.rsqrt(tl.sum(acc, axis=1) / num_cols + tl.cast(eps, tl.float32))
        # The second pass adds again instead of reading back `summed`: a store and a load of one address in one kernel
        # would need a barrier, and the inputs are still in the L2.
        for start in tl.range(0, num_cols, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < num_cols
            mask = mask_m[:, None] & mask_n[None, :]
            weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(x_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
                rounded = h.to(dtype)
                tl.store(summed_rows + offs_n[None, :], rounded, mask=mask)
                h = rounded.to(tl.float32)
            normed = h * scale[:, None]
            if CAST_BEFORE_WEIGHT:
                normed = normed.to(dtype).to(tl.float32)
            tl.store(out_rows + offs_n[None, :], (normed * weight[None, :]).to(dtype), mask=mask)
