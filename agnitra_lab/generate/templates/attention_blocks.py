"""One block of keys: loading it, and attending to it. What the two attentions over a cache share. No template itself.

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
