"""The Triton functions of the template skinny_gemm: two ways to multiply, what follows both, and the sum of parts.

`num_out` counts columns of the result: rows of W, or half of them where W holds a gate and its partner one after the
other. GATED is 1 where the gate comes first, 2 where it comes second.
"""

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Apply one of the template's ACTIVATIONS to fp32 values."""
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == 4:
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == 5:
        y = 1.0 / (1.0 + tl.exp(-y))
    return y


@triton.jit
def finish(
    y,
    up,
    bias,
    up_bias,
    residual,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """From fp32 sums of W's rows to values to store, rounding where separate ops would."""
    if HAS_BIAS:
        y += bias.to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    if ACTIVATION != 0:
        y = activate(y, ACTIVATION).to(dtype).to(tl.float32)
    if GATED != 0:
        if HAS_BIAS:
            up += up_bias.to(tl.float32)
        y = (y * up.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    return y.to(dtype)


@triton.jit
def reduce(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    num_rows,
    num_out,
    num_cols,
    stride_xm,
    stride_wn,
    stride_rm,
    eps,
    NUM_ROWS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_ALL_TILES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply few rows of x by whole rows of W in registers, all requested before anything is waited for."""
    dtype = out_ptr.dtype.element_ty
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    OUTS: tl.constexpr = BLOCK_N // 2 if GATED != 0 and BLOCK_N > 1 else BLOCK_N
    offs_n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    mask_n = offs_n < num_out
    offs_k = tl.arange(0, BLOCK_K)
    first_tile = tl.program_id(1) * NUM_TILES
    GATE_PART: tl.constexpr = 1 if GATED == 2 else 0
    # 64-bit row offsets: a vocabulary of 256 Ki rows of 16 Ki columns passes 2^31 elements.
    rows = w_ptr + (offs_n + GATE_PART * num_out).to(tl.int64)[:, None] * stride_wn
    up_rows = w_ptr + (offs_n + (1 - GATE_PART) * num_out).to(tl.int64)[:, None] * stride_wn

    # Everything that is read of W is requested here, before anything is waited for.
    tiles = ()
    up_tiles = ()
    for t in tl.static_range(NUM_TILES):
        cols = (first_tile + t) * BLOCK_K + offs_k
        mask = mask_n[:, None] if IS_EVEN else mask_n[:, None] & (cols < num_cols)[None, :]
        tiles += (tl.load(rows + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first"),)
        if GATED != 0:
            up_tiles += (tl.load(up_rows + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first"),)
    norm_tiles = ()
    if HAS_NORM:
        for t in tl.static_range(NUM_TILES):
            cols = (first_tile + t) * BLOCK_K + offs_k
            norm_tiles += (tl.load(norm_ptr + cols, mask=cols < num_cols, other=0.0),)
    bias = 0.0
    up_bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + GATE_PART * num_out + offs_n, mask=mask_n, other=0.0)
        if GATED != 0:
            up_bias = tl.load(bias_ptr + (1 - GATE_PART) * num_out + offs_n, mask=mask_n, other=0.0)
    if PDL == 2:
        tl.extra.cuda.gdc_wait()

    # All sums before the first store: past it, no load may be moved ahead, and each row of x would be waited for alone.
    residuals = ()
    if HAS_RESIDUAL and SPLIT == 1:
        for m in tl.static_range(NUM_ROWS):
            residuals += (tl.load(residual_ptr + m * stride_rm + offs_n, mask=mask_n, other=0.0),)
    sums = ()
    up_sums = ()
    for first in tl.static_range(0, NUM_ROWS, ROWS_AT_ONCE):
        x_tiles = ()
        for i in tl.static_range(ROWS_AT_ONCE):
            if first + i < NUM_ROWS:
                for t in tl.static_range(NUM_TILES):
                    cols = (first_tile + t) * BLOCK_K + offs_k
                    x_tiles += (tl.load(x_ptr + (first + i) * stride_xm + cols, mask=cols < num_cols, other=0.0),)
        for i in tl.static_range(ROWS_AT_ONCE):
            if first + i < NUM_ROWS:
                scale = 1.0
                if HAS_NORM:
                    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
                    for t in tl.static_range(NUM_ALL_TILES):
                        if SPLIT == 1:
                            x = x_tiles[i * NUM_TILES + t].to(tl.float32)
                        else:
                            cols = t * BLOCK_K + offs_k
                            x = tl.load(x_ptr + (first + i) * stride_xm + cols, mask=cols < num_cols, other=0.0)
                            x = x.to(tl.float32)
                        squares += x * x
                    scale = tl.rsqrt(tl.sum(squares, axis=0) / num_cols + tl.cast(eps, tl.float32))
                acc = tl.zeros((OUTS, BLOCK_K), dtype=tl.float32)
                up_acc = acc
                for t in tl.static_range(NUM_TILES):
                    x = x_tiles[i * NUM_TILES + t].to(tl.float32)
                    if HAS_NORM:
                        x = x * norm_tiles[t].to(tl.float32)
                    acc += tiles[t].to(tl.float32) * x[None, :]
                    if GATED != 0:
                        up_acc += up_tiles[t].to(tl.float32) * x[None, :]
                # A factor of the whole row, so it may come last: the products then do not wait for the sum of squares.
                sums += (tl.sum(acc, axis=1) * scale,)
                if GATED != 0:
                    up_sums += (tl.sum(up_acc, axis=1) * scale,)

    for m in tl.static_range(NUM_ROWS):
        y = sums[m]
        up = y
        if GATED != 0:
            up = up_sums[m]
        if SPLIT == 1:
            residual = 0.0
            if HAS_RESIDUAL:
                residual = residuals[m]
            y = finish(y, up, bias, up_bias, residual, dtype, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED)
            tl.store(out_ptr + m * num_out + offs_n, y, mask=mask_n)
        else:
            partial_row = partial_ptr + (tl.program_id(1) * NUM_ROWS + m) * num_out * (2 if GATED != 0 else 1)
            tl.store(partial_row + offs_n, y, mask=mask_n)
            if GATED != 0:
                tl.store(partial_row + num_out + offs_n, up, mask=mask_n)


@triton.jit
def dot(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    num_rows,
    num_out,
    num_cols,
    stride_xm,
    stride_wn,
    stride_rm,
    eps,
    NUM_TILES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Multiply up to 16 rows of x by W on tensor cores, W through a pipeline of shared memory."""
    dtype = out_ptr.dtype.element_ty
    OUTS: tl.constexpr = BLOCK_N // 2 if GATED != 0 and BLOCK_N > 16 else BLOCK_N
    offs_n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    mask_n = offs_n < num_out
    offs_m = tl.arange(0, 16)
    mask_m = offs_m < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    start = tl.program_id(1) * NUM_TILES * BLOCK_K
    end = tl.minimum(start + NUM_TILES * BLOCK_K, num_cols)
    GATE_PART: tl.constexpr = 1 if GATED == 2 else 0
    rows = w_ptr + (offs_n + GATE_PART * num_out).to(tl.int64)[:, None] * stride_wn
    up_rows = w_ptr + (offs_n + (1 - GATE_PART) * num_out).to(tl.int64)[:, None] * stride_wn
    x_rows = x_ptr + offs_m[:, None] * stride_xm

    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
        # One request for each 128-byte line of the first tiles: they come into the L2 while the kernel before ends.
        LINE: tl.constexpr = 1024 // dtype.primitive_bitwidth
        lines = start + tl.arange(0, (2 * BLOCK_K) // LINE) * LINE
        mask = mask_n[:, None] & (lines < end)[None, :]
        address = tl.where(mask, rows + lines[None, :], rows).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
        if GATED != 0:
            address = tl.where(mask, up_rows + lines[None, :], up_rows).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
            )
        tl.extra.cuda.gdc_wait()

    scale = tl.full((16,), 1.0, dtype=tl.float32)
    if HAS_NORM:
        squares = tl.zeros((16, BLOCK_K), dtype=tl.float32)
        for k in tl.range(0, num_cols, BLOCK_K, num_stages=2):
            mask_x = mask_m[:, None] & ((k + offs_k) < num_cols)[None, :]
            x = tl.load(x_rows + k + offs_k[None, :], mask=mask_x, other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis=1) / num_cols + tl.cast(eps, tl.float32))

    mask = mask_n[:, None] & mask_m[None, :]
    bias = 0.0
    up_bias = 0.0
    residual = 0.0
    if SPLIT == 1:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + GATE_PART * num_out + offs_n, mask=mask_n, other=0.0)[:, None]
            if GATED != 0:
                up_bias = tl.load(bias_ptr + (1 - GATE_PART) * num_out + offs_n, mask=mask_n, other=0.0)[:, None]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offs_m[None, :] * stride_rm + offs_n[:, None], mask=mask, other=0.0)

    acc = tl.zeros((OUTS, 16), dtype=tl.float32)
    up_acc = tl.zeros((OUTS, 16), dtype=tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=NUM_STAGES):
        cols = k + offs_k
        mask_k = cols < num_cols
        mask_w = mask_n[:, None] if IS_EVEN else mask_n[:, None] & mask_k[None, :]
        w = tl.load(rows + cols[None, :], mask=mask_w, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_rows + cols[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if HAS_NORM:
            norm = tl.load(norm_ptr + cols, mask=mask_k, other=0.0).to(tl.float32)
            normed = x.to(tl.float32) * scale[:, None]
            if CAST_BEFORE_WEIGHT:
                normed = normed.to(dtype).to(tl.float32)
            x = (normed * norm[None, :]).to(dtype)
        # "ieee": TF32 would round fp32 weights to 10 bits.
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if GATED != 0:
            up_w = tl.load(up_rows + cols[None, :], mask=mask_w, other=0.0, eviction_policy="evict_first")
            up_acc = tl.dot(up_w, tl.trans(x), up_acc, input_precision="ieee")

    if SPLIT == 1:
        y = finish(acc, up_acc, bias, up_bias, residual, dtype, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED)
        tl.store(out_ptr + offs_m[None, :] * num_out + offs_n[:, None], y, mask=mask)
    else:
        width = num_out * (2 if GATED != 0 else 1)
        partial = partial_ptr + (tl.program_id(1) * num_rows + offs_m[None, :]) * width + offs_n[:, None]
        tl.store(partial, acc, mask=mask)
        if GATED != 0:
            tl.store(partial + num_out, up_acc, mask=mask)


@triton.jit
def combine(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_out,
    stride_rm,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of K in order, and finish."""
    dtype = out_ptr.dtype.element_ty
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < num_out
    width = num_out * (2 if GATED != 0 else 1)
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(SPLIT):
        part = partial_ptr + (s * num_rows + m) * width + offs_n
        y += tl.load(part, mask=mask_n, other=0.0)
        if GATED != 0:
            up += tl.load(part + num_out, mask=mask_n, other=0.0)
    GATE_PART: tl.constexpr = 1 if GATED == 2 else 0
    bias = 0.0
    up_bias = 0.0
    residual = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + GATE_PART * num_out + offs_n, mask=mask_n, other=0.0)
        if GATED != 0:
            up_bias = tl.load(bias_ptr + (1 - GATE_PART) * num_out + offs_n, mask=mask_n, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m * stride_rm + offs_n, mask=mask_n, other=0.0)
    y = finish(y, up, bias, up_bias, residual, dtype, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED)
    tl.store(out_ptr + m * num_out + offs_n, y, mask=mask_n)
