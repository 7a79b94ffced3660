"""Rows that several programs share, and what every kernel of `row_moments` does to a value. No template itself.

Each of SPLIT programs gathers the moments of its part and leaves them. Programs that wait for each other then merge all
parts and write their own, read once more from the L2; where they may not wait, a second kernel does. Where the parts
are single blocks, programs take block after block of all rows, and write each after they have read the next.
"""

import triton
import triton.language as tl

from agnitra_lab.generate.templates.arrivals import arrive, wait_for, wait_for_all
from agnitra_lab.generate.templates.moments import (
    _merge_moments,
    _merge_parts,
    _scale_of,
    _two_parts,
    _update_moments,
)


@triton.jit
def _sum_at(x_at, residual_at, mask, dtype: tl.constexpr, HAS_RESIDUAL: tl.constexpr, POLICY: tl.constexpr):
    h = tl.load(x_at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        h = h.to(dtype).to(tl.float32)
    return h


@triton.jit
def _spread(values, ROWS: tl.constexpr, COUNT: tl.constexpr, ALIKE: tl.constexpr):
    # Each value ALIKE times, one after the other.
    wide = tl.broadcast_to(tl.reshape(values, (ROWS, COUNT, 1)), (ROWS, COUNT, ALIKE))
    return tl.reshape(wide, (ROWS, COUNT * ALIKE))


@triton.jit
def _affine(
    weight_ptr,
    bias_ptr,
    offs_m,
    start,
    num_cols,
    num_groups,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Values that lie in one vector of a thread and share their weight are looked up as one.
    ALIKE: tl.constexpr = 1 if SPATIAL % 4 != 0 or SPATIAL == 0 else (8 if SPATIAL % 8 == 0 else 4)
    offs_n = start + ALIKE * tl.arange(0, BLOCK_N // ALIKE)
    mask = (offs_n < num_cols)[None, :]
    if SPATIAL == 0:
        index = offs_n[None, :]
    else:
        # A row is one group: each run of SPATIAL values has one channel's weight. SPATIAL is a constant because a
        # division by a variable for each value would cost more than the memory does.
        first = ((offs_m % num_groups).to(tl.int32) * (num_cols // SPATIAL))[:, None]
        if SPATIAL % BLOCK_N == 0:
            index = first + start // SPATIAL
            mask = first >= 0
        else:
            index = first + (offs_n // SPATIAL)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
        if ALIKE > 1 and SPATIAL % BLOCK_N != 0:
            weight = _spread(weight, offs_m.shape[0], BLOCK_N // ALIKE, ALIKE)
    else:
        weight = tl.full((1, 1), 1.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + index, mask=mask, other=0.0).to(tl.float32)
        if ALIKE > 1 and SPATIAL % BLOCK_N != 0:
            bias = _spread(bias, offs_m.shape[0], BLOCK_N // ALIKE, ALIKE)
    else:
        bias = tl.full((1, 1), 0.0, tl.float32)
    return weight, bias


@triton.jit
def _activated(value, IS_SILU: tl.constexpr):
    if IS_SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def _part_moments(
    x_row,
    residual_row,
    summed_row,
    part,
    num_cols,
    HAS_RESIDUAL: tl.constexpr,
    IS_KEPT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Every SPLIT-th block of a row, so that what runs at one time reads neighbouring memory. Long runs are at the mercy
    # of their stride: 128 KB took 726 us where 64 KB took 298 (16 x 4194304 fp32, H100).
    dtype = summed_row.dtype.element_ty
    POLICY: tl.constexpr = "evict_last" if IS_KEPT else ""
    lanes = tl.arange(0, BLOCK_N)[None, :]
    mean_lanes = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    m2_lanes = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for start in tl.range(part * BLOCK_N, num_cols, SPLIT * BLOCK_N, num_stages=NUM_STAGES):
        offs_n = start + lanes
        mask = offs_n < num_cols
        h = _sum_at(x_row + offs_n, residual_row + offs_n, mask, dtype, HAS_RESIDUAL, POLICY)
        if HAS_RESIDUAL:
            tl.store(summed_row + offs_n, h.to(dtype), mask=mask, eviction_policy=POLICY)
        mean_lanes, m2_lanes = _update_moments(mean_lanes, m2_lanes, h, mask, start // (SPLIT * BLOCK_N) + 1)
    count = tl.cdiv(tl.maximum(num_cols - part * BLOCK_N - lanes, 0), SPLIT * BLOCK_N).to(tl.float32)
    return _merge_moments(mean_lanes, m2_lanes, count, tl.maximum(tl.sum(count), 1.0))


@triton.jit
def _leave(moments_ptr, place, mean, rest, m2):
    at = moments_ptr + place * 3 + tl.arange(0, 1)
    tl.store(at, mean)
    tl.store(at + 1, rest)
    tl.store(at + 2, m2)


@triton.jit
def _chunk_kernel(
    x_ptr,
    residual_ptr,
    summed_ptr,
    moments_ptr,
    num_rows,
    num_cols,
    stride_xm,
    stride_rm,
    HAS_RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Programs next to each other have the same blocks of different rows, which then share a read of the weight.
    row = (tl.program_id(0) % num_rows).to(tl.int64)
    part = tl.program_id(0) // num_rows
    x_row, residual_row = x_ptr + row * stride_xm, residual_ptr + row * stride_rm
    mean, rest, m2 = _part_moments(
        x_row, residual_row, summed_ptr + row * num_cols, part, num_cols, HAS_RESIDUAL, False, SPLIT, BLOCK_N,
        NUM_STAGES,
    )  # fmt: skip
    _leave(moments_ptr, row * SPLIT + part, mean, rest, m2)


@triton.jit
def _row_moments(
    moments_ptr, row, num_cols, CACHE: tl.constexpr, SPLIT: tl.constexpr, SPLIT_LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    CYCLE: tl.constexpr = SPLIT * BLOCK_N
    parts = tl.arange(0, SPLIT_LANES)
    beyond = num_cols % CYCLE - parts * BLOCK_N
    count = num_cols // CYCLE * BLOCK_N + tl.minimum(tl.maximum(beyond, 0), BLOCK_N)
    count = tl.where(parts < SPLIT, count, 0)
    moments = moments_ptr + (row * SPLIT + parts) * 3
    # A part without values has nothing in memory.
    mean = tl.load(moments, mask=count > 0, other=0.0, cache_modifier=CACHE)
    rest = tl.load(moments + 1, mask=count > 0, other=0.0, cache_modifier=CACHE)
    m2 = tl.load(moments + 2, mask=count > 0, other=0.0, cache_modifier=CACHE)
    return _merge_parts(mean, rest, m2, count.to(tl.float32), num_cols * 1.0)


@triton.jit
def _write_part(
    x_row,
    out_row,
    weight_ptr,
    bias_ptr,
    offs_m,
    part,
    num_cols,
    num_groups,
    mean,
    rest,
    scale,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    SPATIAL: tl.constexpr,
    IS_KEPT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Backwards: what was read last is still in the L2.
    CYCLE: tl.constexpr = SPLIT * BLOCK_N
    POLICY: tl.constexpr = "evict_first" if IS_KEPT else ""
    first = part * BLOCK_N
    num_steps = tl.cdiv(tl.maximum(num_cols - first, 0), CYCLE)
    for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
        start = first + (num_steps - 1 - step) * CYCLE
        offs_n = (start + tl.arange(0, BLOCK_N))[None, :]
        mask = offs_n < num_cols
        h = tl.load(x_row + offs_n, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
        weight, bias = _affine(
            weight_ptr, bias_ptr, offs_m, start, num_cols, num_groups, HAS_WEIGHT, HAS_BIAS, SPATIAL, BLOCK_N
        )
        out = _activated((h - mean - rest) * scale * weight + bias, IS_SILU).to(out_row.dtype.element_ty)
        tl.store(out_row + offs_n, out, mask=mask, eviction_policy=POLICY)


@triton.jit
def _apply_kernel(
    x_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_cols,
    num_groups,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    SPATIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Backwards, programs and blocks: what the kernel before read last is still in the L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid % num_rows).to(tl.int64)
    mean, rest, m2 = _row_moments(moments_ptr, row, num_cols, "", SPLIT, SPLIT_LANES, BLOCK_N)
    scale = _scale_of(m2, num_cols * 1.0, eps)
    _write_part(
        x_ptr + row * stride_xm, out_ptr + row * num_cols, weight_ptr, bias_ptr, row + tl.arange(0, 1).to(tl.int64),
        pid // num_rows, num_cols, num_groups, mean, rest, scale, HAS_WEIGHT, HAS_BIAS, IS_SILU, SPATIAL, False, SPLIT,
        BLOCK_N, NUM_STAGES,
    )  # fmt: skip


@triton.jit
def _waiting_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    summed_ptr,
    moments_ptr,
    count_ptr,
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
    SPLIT: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # By ticket, as in `_relay_kernel`.
    ticket = tl.atomic_add(count_ptr, 1, sem="relaxed")
    row, part = (ticket // SPLIT).to(tl.int64), ticket % SPLIT
    x_row, summed_row = x_ptr + row * stride_xm, summed_ptr + row * num_cols
    mean, rest, m2 = _part_moments(
        x_row, residual_ptr + row * stride_rm, summed_row, part, num_cols, HAS_RESIDUAL, True, SPLIT, BLOCK_N,
        NUM_STAGES,
    )  # fmt: skip
    _leave(moments_ptr, ticket, mean, rest, m2)
    wait_for_all(count_ptr + 1 + row, SPLIT)
    # Past the L1: other multiprocessors wrote these.
    mean, rest, m2 = _row_moments(moments_ptr, row, num_cols, ".cg", SPLIT, SPLIT_LANES, BLOCK_N)
    scale = _scale_of(m2, num_cols * 1.0, eps)
    # The sum is this program's own, stored before the barriers of the waiting.
    source_row = summed_row if HAS_RESIDUAL else x_row
    _write_part(
        source_row, out_ptr + row * num_cols, weight_ptr, bias_ptr, row + tl.arange(0, 1).to(tl.int64), part, num_cols,
        num_groups, mean, rest, scale, HAS_WEIGHT, HAS_BIAS, IS_SILU, SPATIAL, True, SPLIT, BLOCK_N, NUM_STAGES,
    )  # fmt: skip


@triton.jit
def _write_block(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    moments_ptr,
    count_ptr,
    ticket,
    num_cols,
    num_groups,
    stride_xm,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    SPATIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, start = (ticket // SPLIT).to(tl.int64), (ticket % SPLIT) * BLOCK_N
    wait_for(count_ptr + 1 + row, SPLIT)
    offs_n = start + tl.arange(0, BLOCK_N)[None, :]
    mask = offs_n < num_cols
    h = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # Past the L1: other multiprocessors wrote these.
    mean, rest, m2 = _row_moments(moments_ptr, row, num_cols, ".cg", SPLIT, SPLIT_LANES, BLOCK_N)
    scale = _scale_of(m2, num_cols * 1.0, eps)
    weight, bias = _affine(
        weight_ptr, bias_ptr, row + tl.arange(0, 1).to(tl.int64), start, num_cols, num_groups, HAS_WEIGHT, HAS_BIAS,
        SPATIAL, BLOCK_N,
    )  # fmt: skip
    out = _activated((h - mean - rest) * scale * weight + bias, IS_SILU)
    tl.store(out_ptr + row * num_cols + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relay_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    summed_ptr,
    moments_ptr,
    count_ptr,
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
    SPLIT: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    # What is read again is in the L2: all programs together are two rows ahead at most. To keep it in registers until
    # then took 186 us where this takes 193 (256 x 294912 fp32, H200), and 76 where this takes 50 (128 x 262144 bf16).
    source_ptr, stride_m = (summed_ptr, num_cols) if HAS_RESIDUAL else (x_ptr, stride_xm)
    mine = -1
    # By ticket: all those that a program waits for have begun, whatever the order in which the device starts them.
    # Whoever waits has left the moments of both blocks that it took, so a row that is split into no more than twice as
    # many blocks as programs run is complete at some time.
    ticket = tl.atomic_add(count_ptr, 1, sem="relaxed")
    while ticket < num_rows * SPLIT:
        row, start = (ticket // SPLIT).to(tl.int64), (ticket % SPLIT) * BLOCK_N
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = offs_n < num_cols
        x_at, residual_at = x_ptr + row * stride_xm + offs_n, residual_ptr + row * stride_rm + offs_n
        h = _sum_at(x_at, residual_at, mask, dtype, HAS_RESIDUAL, "evict_last")
        if HAS_RESIDUAL:
            tl.store(summed_ptr + row * num_cols + offs_n, h.to(dtype), mask=mask)
        total = tl.minimum(num_cols - start, BLOCK_N) * 1.0
        mean = tl.div_rn(tl.sum(h, axis=1), total)
        centred = tl.where(mask, h - mean[:, None], 0.0)
        shift = tl.div_rn(tl.sum(centred, axis=1), total)
        mean, rest = _two_parts(mean, shift)
        _leave(moments_ptr, ticket, mean, rest, tl.sum(centred * centred, axis=1) - total * shift * shift)
        arrive(count_ptr + 1 + row)
        # The block before, while the others of this row arrive.
        if mine >= 0:
            _write_block(
                source_ptr, weight_ptr, bias_ptr, out_ptr, moments_ptr, count_ptr, mine, num_cols, num_groups, stride_m,
                eps, HAS_WEIGHT, HAS_BIAS, IS_SILU, SPATIAL, SPLIT, SPLIT_LANES, BLOCK_N,
            )  # fmt: skip
        mine = ticket
        ticket = tl.atomic_add(count_ptr, 1, sem="relaxed")
    if mine >= 0:
        _write_block(
            source_ptr, weight_ptr, bias_ptr, out_ptr, moments_ptr, count_ptr, mine, num_cols, num_groups, stride_m,
            eps, HAS_WEIGHT, HAS_BIAS, IS_SILU, SPATIAL, SPLIT, SPLIT_LANES, BLOCK_N,
        )  # fmt: skip
