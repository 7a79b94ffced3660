"""The Triton functions of the template cached_attention: the new token's rotation, and attention over a part.

FORM is how pairs lie in a head: 0 no rotation, 1 the halves of the first ROTARY values, 2 neighbours. ANGLES is what of
a row of cos and sin belongs to value d: 0 d itself, 1 d modulo ROTARY / 2, 2 d / 2.
"""

import triton
import triton.language as tl

from agnitra_lab.generate.templates.attention_blocks import keys, seen


@triton.jit
def turn(
    rows,
    cos_rows,
    sin_rows,
    weight_ptr,
    mask_r,
    stride_cd,
    stride_sd,
    eps,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FORM: tl.constexpr,
    ROTARY: tl.constexpr,
    ANGLES: tl.constexpr,
):
    """Load rows of one head each, norm them and rotate them; fp32 throughout."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_r[:, None] & (offs_d < HEAD_SIZE)[None, :]
    x = tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    norm = tl.full((BLOCK_D,), 1.0, dtype=tl.float32)
    scale = tl.sum(x * x, axis=1)
    if HAS_NORM:
        scale = tl.rsqrt(scale / HEAD_SIZE + tl.cast(eps, tl.float32))
        norm = tl.load(weight_ptr + offs_d, mask=offs_d < HEAD_SIZE, other=0.0).to(tl.float32)
        x = x * scale[:, None] * norm[None, :]
    if FORM != 0:
        HALF: tl.constexpr = ROTARY // 2
        is_turned = offs_d < ROTARY
        if FORM == 1:
            is_first = offs_d < HALF
            other = tl.where(is_first, offs_d + HALF, offs_d - HALF)
        else:
            is_first = offs_d % 2 == 0
            other = tl.where(is_first, offs_d + 1, offs_d - 1)
        other = tl.where(is_turned, other, 0)
        angle = offs_d
        if ANGLES == 1:
            angle = offs_d % HALF
        if ANGLES == 2:
            angle = offs_d // 2
        mask = mask_r[:, None] & is_turned[None, :]
        y = tl.load(rows[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm = tl.load(weight_ptr + other, mask=is_turned, other=0.0).to(tl.float32)
            y = y * scale[:, None] * norm[None, :]
        cos = tl.load(cos_rows[:, None] + (angle * stride_cd)[None, :], mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(sin_rows[:, None] + (angle * stride_sd)[None, :], mask=mask, other=0.0).to(tl.float32)
        x = x * cos + tl.where(is_first[None, :], -y, y) * sin
    return x


@triton.jit
def prefetch(rows, stride, start, end, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for the 128-byte lines of some keys, to have them in the L2; nothing is read yet."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    NUM_LINES: tl.constexpr = BLOCK_D // LINE if BLOCK_D > LINE else 1
    offs_n = start + tl.arange(0, BLOCK_N)
    lines = tl.arange(0, NUM_LINES) * LINE
    mask = (offs_n < end)[:, None] & (lines < HEAD_SIZE)[None, :]
    address = rows + offs_n.to(tl.int64)[:, None] * stride + lines[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [tl.where(mask, address, rows).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def old(offs_n, end, slots, NUM_QUERIES: tl.constexpr):
    """Say which keys of a block are there and lie in no slot of a new token."""
    mask_n = offs_n < end
    for t in tl.static_range(NUM_QUERIES):
        mask_n = mask_n & (offs_n != slots[t])
    return mask_n


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    mask_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    num_kv_heads,
    num_keys,
    keys_per_part,
    first_position,
    stride_p,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_kcb,
    stride_kch,
    stride_kcs,
    stride_vcb,
    stride_vch,
    stride_vcs,
    stride_cb,
    stride_cl,
    stride_cd,
    stride_sb,
    stride_sl,
    stride_sd,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_ol,
    scale,
    q_eps,
    k_eps,
    NUM_QUERIES: tl.constexpr,
    NUM_R: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    FORM: tl.constexpr,
    ROTARY: tl.constexpr,
    ANGLES: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Turn the new queries and keys, write these into the cache, and attend to one part of its keys."""
    dtype = k_cache_ptr.dtype.element_ty
    # 64-bit: a cache of a large batch passes 2^31 elements.
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    part = tl.program_id(1)
    start = part * keys_per_part
    end = tl.minimum(start + keys_per_part, num_keys)
    k_rows = k_cache_ptr + batch * stride_kcb + kv_head * stride_kch
    v_rows = v_cache_ptr + batch * stride_vcb + kv_head * stride_vch
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch(k_rows, stride_kcs, start, end, HEAD_SIZE, BLOCK_D, BLOCK_N)
        prefetch(v_rows, stride_vcs, start, end, HEAD_SIZE, BLOCK_D, BLOCK_N)
        tl.extra.cuda.gdc_wait()

    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < NUM_R
    mask_d = offs_d < HEAD_SIZE
    head = kv_head * (NUM_R // NUM_QUERIES) + offs_r // NUM_QUERIES
    query = offs_r % NUM_QUERIES
    # Requests that wait for nothing come first, in one trip to the L2: slots, the first keys and values, their mask.
    slots = ()
    owns = ()
    for t in tl.static_range(NUM_QUERIES):
        if HAS_POSITION:
            slot = tl.load(position_ptr + t * stride_p).to(tl.int64)
            slot = tl.where(slot < 0, slot + num_keys, slot)
        else:
            slot = tl.cast(first_position + t, tl.int64)
        slots += (slot,)
        owns += ((slot >= start) & (slot < end),)
    mask_rows = mask_ptr + batch * stride_mb + head * stride_mh + query * stride_ml
    offs_n = start + tl.arange(0, BLOCK_N)
    k, v, given = keys(
        k_rows, v_rows, mask_rows, offs_n, offs_n < end, mask_r, stride_kcs, stride_vcs, stride_ms,
        HEAD_SIZE, BLOCK_D, MASK,
    )  # fmt: skip

    cos_rows = cos_ptr + batch * stride_cb
    sin_rows = sin_ptr + batch * stride_sb
    q = turn(
        q_ptr + batch * stride_qb + head * stride_qh + query * stride_ql,
        cos_rows + query * stride_cl, sin_rows + query * stride_sl,
        q_norm_ptr, mask_r, stride_cd, stride_sd, q_eps,
        HEAD_SIZE, BLOCK_D, HAS_Q_NORM, FORM, ROTARY, ANGLES,
    ).to(dtype)  # fmt: skip
    # Scores in units of log2: exp2 is one instruction.
    factor = tl.cast(scale * 1.4426950408889634, tl.float32)

    # The new keys and values: from registers, in the part that their slots lie in, which alone writes these slots.
    one = tl.full((1,), 1, dtype=tl.int1)
    zero = tl.arange(0, 1)
    sights = ()
    new_ks = ()
    new_vs = ()
    for t in tl.static_range(NUM_QUERIES):
        new_ks += (
            turn(
                k_ptr + batch * stride_kb + kv_head * stride_kh + t * stride_kl + zero,
                cos_rows + t * stride_cl + zero, sin_rows + t * stride_sl + zero,
                k_norm_ptr, one, stride_cd, stride_sd, k_eps,
                HEAD_SIZE, BLOCK_D, HAS_K_NORM, FORM, ROTARY, ANGLES,
            ).to(dtype),
        )  # fmt: skip
        v_row = v_ptr + batch * stride_vb + kv_head * stride_vh + t * stride_vl
        new_vs += (tl.load(v_row + offs_d, mask=mask_d, other=0.0),)
        sight = zero
        if MASK != 0:
            sight = tl.load(mask_rows + slots[t] * stride_ms, mask=mask_r & owns[t], other=0)
        sights += (sight,)

    highest = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    mask_n = old(offs_n, end, slots, NUM_QUERIES)
    # What a slot held before may be anything: no NaN of it may meet a weight of zero.
    v = tl.where(mask_n[:, None], v, 0.0)
    highest, total, acc = seen(q, k, v, given, mask_n, factor, highest, total, acc, MASK)
    for n in tl.range(start + BLOCK_N, end, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = old(offs_n, end, slots, NUM_QUERIES)
        k, v, given = keys(
            k_rows, v_rows, mask_rows, offs_n, mask_n, mask_r, stride_kcs, stride_vcs, stride_ms,
            HEAD_SIZE, BLOCK_D, MASK,
        )  # fmt: skip
        highest, total, acc = seen(q, k, v, given, mask_n, factor, highest, total, acc, MASK)

    # They come last: their scores then wait for nothing that the keys in memory could be asked for before.
    for t in tl.static_range(NUM_QUERIES):
        tl.store((k_rows + slots[t] * stride_kcs + offs_d)[None, :], new_ks[t], mask=(mask_d & owns[t])[None, :])
        tl.store(v_rows + slots[t] * stride_vcs + offs_d, new_vs[t], mask=mask_d & owns[t])
        score = tl.sum(q.to(tl.float32) * new_ks[t].to(tl.float32), axis=1) * factor
        if MASK == 1:
            score = tl.where(sights[t] != 0, score, float("-inf"))
        if MASK == 2:
            score += sights[t].to(tl.float32) * 1.4426950408889634
        score = tl.where(owns[t], score, float("-inf"))
        higher = tl.maximum(highest, score)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base)
        shrink = tl.exp2(highest - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * new_vs[t].to(tl.float32)[None, :]
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
