"""The Triton kernels of `depthwise_conv`: a lane computes a block of outputs of one channel, or of a few channels.

Both are written lane by lane: a tensor has one entry, or one vector of neighbours, for each thread, and what is more
than that is a tuple. So a value that was loaded stays in its register for all the taps that need it, and no layout has
to change. Extents, strides and taps are constants: addresses become immediates, and the sum over taps straight code.

Legend: D, H, W depth, height and width, of the input and of the output; K taps of a dimension; S stride; P padding
before the first value; R dilation.
"""

# Triton knows the sum of two tuples, and no unpacking; and a tuple that grows in a loop has no one type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from agnitra_lab.generate.templates.skinny_gemm_kernels import activate


@triton.jit
def _halves(parts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    # Even columns first, then odd ones: after the last halving they stand in their order.
    evens, odds = (), ()
    for place in tl.static_range(len(parts)):
        if WIDTH == 2:
            even, odd = tl.split(parts[place])
        else:
            even, odd = tl.split(tl.reshape(parts[place], (LANES, WIDTH // 2, 2)))
        evens, odds = evens + (even,), odds + (odd,)
    return evens + odds


@triton.jit
def _columns(tile, LANES: tl.constexpr, WIDTH: tl.constexpr):
    # [LANES, WIDTH] -> WIDTH tensors [LANES]: each lane's vector, taken apart where it lies.
    if WIDTH == 1:
        parts = (tl.reshape(tile, (LANES,)),)
    elif WIDTH == 2:
        parts = _halves((tile,), LANES, 2)
    elif WIDTH == 4:
        parts = _halves(_halves((tile,), LANES, 4), LANES, 2)
    else:
        parts = _halves(_halves(_halves((tile,), LANES, 8), LANES, 4), LANES, 2)
    return parts


@triton.jit
def _pairs(parts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    # Half as many tensors, each of WIDTH columns.
    joined = ()
    for place in tl.static_range(len(parts) // 2):
        pair = tl.join(parts[place], parts[place + len(parts) // 2])
        joined = joined + (tl.reshape(pair, (LANES, WIDTH)),)
    return joined


@triton.jit
def _tile(parts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    # WIDTH tensors [LANES] -> [LANES, WIDTH].
    if WIDTH == 1:
        tile = tl.reshape(parts[0], (LANES, 1))
    elif WIDTH == 2:
        tile = _pairs(parts, LANES, 2)[0]
    elif WIDTH == 4:
        tile = _pairs(_pairs(parts, LANES, 2), LANES, 4)[0]
    else:
        tile = _pairs(_pairs(_pairs(parts, LANES, 2), LANES, 4), LANES, 8)[0]
    return tile


@triton.jit
def _input_row(
    row_at,
    w_first,
    limit,
    W: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Columns of one input row as fp32, in vectors of WIDTH: FIRST to LAST, counted from w_first. Zeros outside the row,
    # which ends at `limit`. Negative places are large without a sign: one comparison for both ends.
    columns = ()
    inner = tl.arange(0, WIDTH)[None, :]
    for vector in tl.static_range(FIRST, LAST + 1):
        mask = ((w_first + vector * WIDTH).to(tl.uint32) < limit.to(tl.uint32))[:, None]
        tile = tl.load(row_at[:, None] + (vector * WIDTH + inner), mask=mask, other=0.0)
        columns = columns + _columns(tile.to(tl.float32), LANES, WIDTH)
    return columns


@triton.jit
def _add_taps(
    acc,
    columns,
    weights,
    ROW: tl.constexpr,
    TAP: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    KW: tl.constexpr,
    SW: tl.constexpr,
    RW: tl.constexpr,
):
    # One row of taps, weights TAP to TAP + KW - 1, for the WIDTH outputs of block row ROW: output v reads the columns
    # START + v SW + k RW.
    updated = ()
    for place in tl.static_range(len(acc)):
        value = acc[place]
        if place // WIDTH == ROW:
            for k in tl.static_range(KW):
                value = tl.fma(columns[START + place % WIDTH * SW + k * RW], weights[TAP + k], value)
        updated = updated + (value,)
    return updated


@triton.jit
def _slice(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    # Triton's tuples take no slices with constants for bounds.
    chosen = ()
    for place in tl.static_range(COUNT):
        chosen = chosen + (parts[FIRST + place],)
    return chosen


@triton.jit
def _planes_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_lanes,
    NUM_CHANNELS: tl.constexpr,
    D_IN: tl.constexpr,
    H_IN: tl.constexpr,
    W_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RD: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_UNROLLED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    LANES: tl.constexpr,
):
    W_BLOCKS: tl.constexpr = (W_OUT + BLOCK_W - 1) // BLOCK_W
    H_BLOCKS: tl.constexpr = (H_OUT + BLOCK_H - 1) // BLOCK_H
    # Lanes past the end repeat the last one, and store its values once more: nothing needs a mask for them.
    lane = tl.minimum(tl.program_id(0) * LANES + tl.arange(0, LANES), num_lanes - 1)
    w_block, lane = lane % W_BLOCKS, lane // W_BLOCKS
    h_block, lane = lane % H_BLOCKS, lane // H_BLOCKS
    d_out, plane = lane % D_OUT, lane // D_OUT
    channel = plane % NUM_CHANNELS
    w_at = weight_ptr + channel * (KD * KH * KW)
    d_first, h_first, w_first = d_out * SD - PD, h_block * (BLOCK_H * SH) - PH, w_block * (BLOCK_W * SW)
    # 64-bit plane offsets: a batch of images passes 2^31 elements.
    x_at = x_ptr + (plane // MULTIPLIER).to(tl.int64) * (D_IN * H_IN * W_IN)
    x_at += (d_first * H_IN + h_first) * W_IN + w_first
    # The columns that the block's outputs read, in vectors. Those of an odd row lie across its end: single values then.
    PAD_VECTORS: tl.constexpr = PW  # Python and the kernel divide alike where nothing is negative.
    WIDTH: tl.constexpr = BLOCK_W if W_IN % BLOCK_W == 0 else 1
    FIRST: tl.constexpr = (PAD_VECTORS * WIDTH - PW) // WIDTH - PAD_VECTORS
    LAST: tl.constexpr = (PAD_VECTORS * WIDTH - PW + (BLOCK_W - 1) * SW + (KW - 1) * RW) // WIDTH - PAD_VECTORS
    START: tl.constexpr = -PW - FIRST * WIDTH
    first = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + channel).to(tl.float32)
    acc = ()
    for _ in tl.static_range(BLOCK_H * BLOCK_W):
        acc = acc + (first,)
    if IS_UNROLLED:
        weights = ()
        for tap in tl.static_range(KD * KH * KW):
            weights = weights + (tl.load(w_at + tap).to(tl.float32),)
        for kd in tl.static_range(KD):
            is_inside_d = (d_first + kd * RD).to(tl.uint32) < D_IN
            for row in tl.static_range((BLOCK_H - 1) * SH + (KH - 1) * RH + 1):
                limit = tl.where(is_inside_d & ((h_first + row).to(tl.uint32) < H_IN), W_IN, 0)
                row_at = x_at + (kd * RD * H_IN + row) * W_IN
                columns = _input_row(row_at, w_first, limit, W_IN, FIRST, LAST, LANES, WIDTH)
                for h in tl.static_range(BLOCK_H):
                    if row >= h * SH and (row - h * SH) % RH == 0 and (row - h * SH) // RH < KH:
                        acc = _add_taps(
                            acc, columns, weights, h, (kd * KH + (row - h * SH) // RH) * KW, START, BLOCK_W, KW, SW, RW
                        )
    else:
        for step in tl.range(0, KD * KH):
            weights = ()
            for k in tl.static_range(KW):
                weights = weights + (tl.load(w_at + step * KW + k).to(tl.float32),)
            kd, kh = step // KH, step % KH
            is_inside_d = (d_first + kd * RD).to(tl.uint32) < D_IN
            for h in tl.static_range(BLOCK_H):
                row = kh * RH + h * SH
                limit = tl.where(is_inside_d & ((h_first + row).to(tl.uint32) < H_IN), W_IN, 0)
                row_at = x_at + (kd * RD * H_IN + row) * W_IN
                columns = _input_row(row_at, w_first, limit, W_IN, FIRST, LAST, LANES, WIDTH)
                acc = _add_taps(acc, columns, weights, h, 0, START, BLOCK_W, KW, SW, RW)
    dtype = out_ptr.dtype.element_ty
    h_out, w_out = h_block * BLOCK_H, w_block * BLOCK_W
    out_at = out_ptr + (plane.to(tl.int64) * D_OUT + d_out) * (H_OUT * W_OUT) + h_out * W_OUT + w_out
    inner = tl.arange(0, BLOCK_W)[None, :]
    for h in tl.static_range(BLOCK_H):
        tile = _tile(_slice(acc, h * BLOCK_W, BLOCK_W), LANES, BLOCK_W).to(dtype)
        if ACTIVATION != 0:
            # Rounded before and after, as two ops would.
            tile = activate(tile.to(tl.float32), ACTIVATION).to(dtype)
        mask = (h_out + h < H_OUT)[:, None]
        if W_OUT % BLOCK_W != 0:
            mask = mask & (w_out[:, None] + inner < W_OUT)
        tl.store(out_at[:, None] + (h * W_OUT + inner), tile, mask=mask)


@triton.jit
def _channels_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_places,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_XN: tl.constexpr,
    STRIDE_XD: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_XW: tl.constexpr,
    D_IN: tl.constexpr,
    H_IN: tl.constexpr,
    W_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RD: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES_C: tl.constexpr,
    LANES: tl.constexpr,
):
    W_BLOCKS: tl.constexpr = (W_OUT + BLOCK_W - 1) // BLOCK_W
    # LANES_C lanes stand side by side over the channels, the others over blocks of a row and the rows below: these
    # share what they read through the L1.
    c_blocks = (NUM_CHANNELS + LANES_C * BLOCK_C - 1) // (LANES_C * BLOCK_C)
    lane = tl.arange(0, LANES)
    c_first = ((tl.program_id(0) % c_blocks) * LANES_C + lane % LANES_C) * BLOCK_C
    place = (tl.program_id(0) // c_blocks) * (LANES // LANES_C) + lane // LANES_C
    place = tl.minimum(place, num_places - 1)
    w_block, row = place % W_BLOCKS, place // W_BLOCKS
    h_out, image = row % H_OUT, row // H_OUT
    d_out, image = image % D_OUT, image // D_OUT
    d_first, h_first, w_first = d_out * SD - PD, h_out * SH - PH, w_block * (BLOCK_W * SW) - PW
    offs_c = c_first[:, None] + tl.arange(0, BLOCK_C)[None, :]
    # A vector of channels is inside or outside as a whole where it divides their number.
    mask_c = (c_first < NUM_CHANNELS)[:, None] if IS_WHOLE else offs_c < NUM_CHANNELS
    x_at = x_ptr + image.to(tl.int64)[:, None] * STRIDE_XN + offs_c // MULTIPLIER
    acc = ()
    first = tl.zeros((LANES, BLOCK_C), tl.float32)
    if HAS_BIAS:
        first += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    for _ in tl.static_range(BLOCK_W):
        acc = acc + (first,)
    for step in tl.range(0, KD * KH):
        d_in, h_in = d_first + step // KH * RD, h_first + step % KH * RH
        is_inside = (d_in.to(tl.uint32) < D_IN) & (h_in.to(tl.uint32) < H_IN) & (c_first < NUM_CHANNELS)
        limit = tl.where(is_inside, W_IN, 0).to(tl.uint32)
        row_at = x_at + (d_in.to(tl.int64) * STRIDE_XD + h_in.to(tl.int64) * STRIDE_XH)[:, None]
        row_at += (w_first.to(tl.int64) * STRIDE_XW)[:, None]
        w_at = weight_ptr + step * KW * NUM_CHANNELS + offs_c
        weights = ()
        for column in tl.static_range((BLOCK_W - 1) * SW + (KW - 1) * RW + 1):
            # A weight is loaded where the first output needs it, and its registers are free after the last one.
            if column % RW == 0 and column // RW < KW:
                weights = weights + (tl.load(w_at + column // RW * NUM_CHANNELS, mask=mask_c, other=0.0),)
            # A column that no tap reads, between strides, is a dead load, and the compiler drops it.
            mask = ((w_first + column).to(tl.uint32) < limit)[:, None]
            if not IS_WHOLE:
                mask = mask & mask_c
            x = tl.load(row_at + column * STRIDE_XW, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for v in tl.static_range(BLOCK_W):
                value = acc[v]
                if column >= v * SW and (column - v * SW) % RW == 0 and (column - v * SW) // RW < KW:
                    value = tl.fma(x, weights[(column - v * SW) // RW].to(tl.float32), value)
                updated = updated + (value,)
            acc = updated
    dtype = out_ptr.dtype.element_ty
    out_at = out_ptr + ((row.to(tl.int64) * W_OUT + w_block * BLOCK_W) * NUM_CHANNELS)[:, None] + offs_c
    for v in tl.static_range(BLOCK_W):
        tile = acc[v].to(dtype)
        if ACTIVATION != 0:
            # Rounded before and after, as two ops would.
            tile = activate(tile.to(tl.float32), ACTIVATION).to(dtype)
        mask = mask_c & (w_block * BLOCK_W + v < W_OUT)[:, None]
        tl.store(out_at + v * NUM_CHANNELS, tile, mask=mask)


KERNELS = (activate, _halves, _columns, _pairs, _tile, _input_row, _add_taps, _slice, _planes_kernel, _channels_kernel)
"""What a rendered source needs: device functions, then the kernels for the two layouts."""
IS_COMPILED = isinstance(_planes_kernel, triton.JITFunction)
