"""Triton kernel of the template decode_attention at BLOCK_N=64, SPLIT=16, num_warps=4, num_stages=2.

Launch it as kernel[grid](..., **CONSTANTS, **OPTIONS).
"""

import triton
import triton.language as tl

CONSTANTS = {"BLOCK_N": 64, "SPLIT": 16, "NUM_STAGES": 2}
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    num_kv_heads,
    num_keys,
    keys_per_part,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_ol,
    scale,
    NUM_QUERIES: tl.constexpr,
    NUM_R: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # 64-bit: a cache of a large batch passes 2^31 elements.
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    part = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < NUM_R
    mask_d = offs_d < HEAD_SIZE
    head = kv_head * (NUM_R // NUM_QUERIES) + offs_r // NUM_QUERIES
    query = offs_r % NUM_QUERIES

    q_rows = q_ptr + batch * stride_qb + head * stride_qh + query * stride_ql
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
    k_rows = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_rows = v_ptr + batch * stride_vb + kv_head * stride_vh
    mask_rows = mask_ptr + batch * stride_mb + head * stride_mh + query * stride_ml

    start = part * keys_per_part
    end = tl.minimum(start + keys_per_part, num_keys)
    highest = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for n in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        mask_kv = mask_n[:, None] & mask_d[None, :]
        k = tl.load(k_rows + offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :], mask=mask_kv, other=0.0)
        v = tl.load(v_rows + offs_n.to(tl.int64)[:, None] * stride_vs + offs_d[None, :], mask=mask_kv, other=0.0)
        # Scores in units of log2: exp2 is one instruction. "ieee": TF32 would round fp32 keys to 10 bits.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * tl.cast(scale * 1.4426950408889634, tl.float32)
        if MASK != 0:
            seen = mask_r[:, None] & mask_n[None, :]
            given = tl.load(mask_rows[:, None] + offs_n[None, :] * stride_ms, mask=seen, other=0)
            if MASK == 1:
                scores = tl.where(given != 0, scores, float("-inf"))
            else:
                scores += given.to(tl.float32) * 1.4426950408889634
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # Rows that saw no key yet subtract 0, not -inf from -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher

    mask_out = mask_r[:, None] & mask_d[None, :]
    if SPLIT == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = out_ptr + batch * stride_ob + head * stride_oh + query * stride_ol
        tl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_out)
    else:
        row = (tl.program_id(0).to(tl.int64) * NUM_R + offs_r) * SPLIT + part
        tl.store(partial_ptr + row[:, None] * HEAD_SIZE + offs_d[None, :], acc, mask=mask_out)
        tl.store(stats_ptr + row * 2, highest, mask=mask_r)
        tl.store(stats_ptr + row * 2 + 1, total, mask=mask_r)


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    out_ptr,
    num_kv_heads,
    stride_ob,
    stride_oh,
    stride_ol,
    NUM_QUERIES: tl.constexpr,
    NUM_R: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    r = row % NUM_R
    batch = (row // NUM_R // num_kv_heads).to(tl.int64)
    head = (row // NUM_R) % num_kv_heads * (NUM_R // NUM_QUERIES) + r // NUM_QUERIES
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    mask_p = offs_p < SPLIT
    mask_d = offs_d < HEAD_SIZE
    parts = row.to(tl.int64) * SPLIT + offs_p
    highest = tl.load(stats_ptr + parts * 2, mask=mask_p, other=float("-inf"))
    total = tl.load(stats_ptr + parts * 2 + 1, mask=mask_p, other=0.0)
    acc = tl.load(
        partial_ptr + parts[:, None] * HEAD_SIZE + offs_d[None, :], mask=mask_p[:, None] & mask_d[None, :], other=0.0
    )
    base = tl.max(highest, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    share = tl.exp2(highest - base)
    total = tl.sum(total * share, axis=0)
    out = tl.sum(acc * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    out_row = out_ptr + batch * stride_ob + head * stride_oh + (r % NUM_QUERIES) * stride_ol
    tl.store(out_row + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
