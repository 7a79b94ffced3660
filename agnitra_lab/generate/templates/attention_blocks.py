"""One block of keys, loaded and attended to, and the sum of parts: what the two attentions over a cache share.

No template itself.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.1.
"""

import triton
import triton.language as tl


@triton.jit
def keys(
    k_rows,
    v_rows,
    mask_rows,
    offs_n,
    mask_n,
    mask_r,
    stride_kcs,
    stride_vcs,
    stride_ms,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
):
    """Load a block of keys, its values and its mask."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < HEAD_SIZE)[None, :]
    k = tl.load(k_rows + offs_n.to(tl.int64)[:, None] * stride_kcs + offs_d[None, :], mask=mask, other=0.0)
    v = tl.load(v_rows + offs_n.to(tl.int64)[:, None] * stride_vcs + offs_d[None, :], mask=mask, other=0.0)
    given = mask_n
    if MASK != 0:
        mask = mask_r[:, None] & mask_n[None, :]
        given = tl.load(mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_ms, mask=mask, other=0)
    return k, v, given


@triton.jit
def seen(q, k, v, given, mask_n, factor, highest, total, acc, MASK: tl.constexpr):
    """Attend to a block of keys; return the new maximum, sum and result."""
    # "ieee": TF32 would round fp32 keys to 10 bits.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASK == 1:
        scores = tl.where(given != 0, scores, float("-inf"))
    if MASK == 2:
        scores += given.to(tl.float32) * 1.4426950408889634
    scores = tl.where(mask_n[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    # Rows that saw no key yet subtract 0, not -inf from -inf.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def join(
    partial_ptr,
    stats_ptr,
    out_ptr,
    group,
    offs_r,
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
    """Write rows of one key/value head: what the parts of its keys gave, each by its share of the exponentials."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < NUM_R
    mask_d = offs_d < HEAD_SIZE
    rows = group.to(tl.int64) * NUM_R + offs_r
    highest = tl.full(offs_r.shape, float("-inf"), dtype=tl.float32)
    total = tl.zeros(offs_r.shape, dtype=tl.float32)
    acc = tl.zeros([offs_r.shape[0], BLOCK_D], dtype=tl.float32)
    for first in tl.range(0, SPLIT, BLOCK_P, num_stages=1):
        offs_p = first + tl.arange(0, BLOCK_P)
        # The parts are the slowest dimension: the threads lie along a part, and each adds its own values.
        parts = rows[None, :] * SPLIT + offs_p[:, None]
        mask = (offs_p < SPLIT)[:, None] & mask_r[None, :]
        # Past the L1: other multiprocessors wrote these.
        x = tl.load(
            partial_ptr + parts[:, :, None] * HEAD_SIZE + offs_d[None, None, :],
            mask=mask[:, :, None] & mask_d[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        high = tl.load(stats_ptr + parts * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        weight = tl.load(stats_ptr + parts * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(high, axis=0))
        # Rows that saw no key at all subtract 0, not -inf from -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(high - base[None, :])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight * share, axis=0)
        acc = acc * shrink[:, None] + tl.sum(x * share[:, :, None], axis=0)
        highest = higher
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    batch = (group // num_kv_heads).to(tl.int64)
    head = group % num_kv_heads * (NUM_R // NUM_QUERIES) + offs_r // NUM_QUERIES
    out_rows = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + (offs_r % NUM_QUERIES) * stride_ol
    mask = mask_r[:, None] & mask_d[None, :]
    tl.store(out_rows[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_parts(
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
    PDL: tl.constexpr,
):
    """Join the parts of one row, as a kernel of its own."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    join(
        partial_ptr, stats_ptr, out_ptr, row // NUM_R, row % NUM_R + tl.arange(0, 1), num_kv_heads,
        stride_ob, stride_oh, stride_ol, NUM_QUERIES, NUM_R, HEAD_SIZE, BLOCK_D, BLOCK_P, SPLIT,
    )  # fmt: skip
