"""The Triton function of `row_copy`, apart from it because importing Triton takes as long as much else together."""

import triton
import triton.language as tl


@triton.jit
def gather_rows(x_ptr, out_ptr, num_values, num_cols, stride, BLOCK: tl.constexpr):
    """Write BLOCK values of the flat result; BLOCK is at most a row, so they come from two rows at most."""
    start = tl.program_id(0) * BLOCK
    row = start // num_cols
    cols = start - row * num_cols + tl.arange(0, BLOCK)
    source = x_ptr + row * stride + tl.where(cols < num_cols, cols, cols - num_cols + stride)
    offs = start + tl.arange(0, BLOCK)
    mask = offs < num_values
    tl.store(out_ptr + offs, tl.load(source, mask=mask), mask=mask)
