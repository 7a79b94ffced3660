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
    """Add up what the parts of the keys gave one row, each by its share of the exponentials."""
    row = tl.program_id(0)
    r = row % NUM_R
    batch = (row // NUM_R // num_kv_heads).to(tl.int64)
    head = (row // NUM_R) % num_kv_heads * (NUM_R // NUM_QUERIES) + r // NUM_QUERIES
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    mask_p = offs_p < SPLIT
    mask_d = offs_d < HEAD_SIZE
    parts = row.to(tl.int64) * SPLIT + offs_p
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
