"""Triton kernel of the template swiglu at BLOCK_N=1024, ROWS_PER_PROGRAM=1, num_warps=4, num_stages=1.

Launch it as kernel[grid](..., **CONSTANTS, **OPTIONS).
"""

import triton
import triton.language as tl

CONSTANTS = {"BLOCK_N": 1024, "ROWS_PER_PROGRAM": 1}
OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride_gm,
    stride_um,
    ROUND_SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    ACTIVATION: tl.constexpr = 0,
):
    num_blocks = tl.cdiv(num_cols, BLOCK_N)
    pid = tl.program_id(0)
    # 64-bit row offsets: a prefill batch passes 2^31 elements.
    offs_m = (pid // num_blocks).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
    offs_n = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_cols)[None, :]
    gate = tl.load(gate_ptr + offs_m[:, None] * stride_gm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_m[:, None] * stride_um + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if ACTIVATION == 1:
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == 2:
        # 0.5 (1 + tanh(u)) is the sigmoid of 2u: no cancellation where tanh nears -1.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        activated = gate / (1.0 + tl.exp(-inner))
    elif ACTIVATION == 3:
        # A comparison, because a maximum would swallow NaN.
        activated = tl.where(gate < 0.0, 0.0, gate)
    elif ACTIVATION == 4:
        activated = 1.0 / (1.0 + tl.exp(-gate))
    else:
        activated = gate / (1.0 + tl.exp(-gate))
    if ROUND_SILU:
        activated = activated.to(dtype).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * num_cols + offs_n[None, :], (activated * up).to(dtype), mask=mask)
