"""The running maximum and sum of exponentials of a row: what softmax and cross-entropy share. No template itself.

The maximum starts at the lowest finite number, not at -inf: a row, or a part of one, that holds nothing but -inf then
has the sum 0 and turns into NaN where it is divided by, as in torch, and a row of nothing but that number stays even.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867, section 3.1.
"""

import triton
import triton.language as tl


@triton.jit
def lane_sum(s, AXIS: tl.constexpr, IS_FP32: tl.constexpr):
    # Every value of a row is divided by its sum, so all of them have its error. In fp32 the last additions of the tree
    # alone make it 0.4 units in the last place (RMS), as much as torch's, and which of the two is larger is chance; its
    # own rounding is another 0.3. So for fp32 rows it is, and stays, fp64.
    if IS_FP32:
        s = s.to(tl.float64)
    return tl.sum(s, axis=AXIS, keep_dims=AXIS == 1)


@triton.jit
def online_block(x, IS_FP32: tl.constexpr = False):
    m = tl.maximum(tl.max(x, axis=1, keep_dims=True), -3.4028234663852886e38)
    return m, lane_sum(tl.exp(x - m), 1, IS_FP32)


@triton.jit
def online_step(x, m, s):
    # One maximum a row and one sum a lane: seven instructions an element, where 16-bit logits leave time for thirteen
    # (132 multiprocessors x 128 lanes x 1.7 GHz over 2.1e12 elements/s).
    m_new = tl.maximum(m, tl.max(x, axis=1, keep_dims=True))
    return m_new, s * tl.exp(m - m_new) + tl.exp(x - m_new)


@triton.jit
def online_merge(m, s, IS_FP32: tl.constexpr = False):
    # Of a vector of parts: numbers, which have no layout that the row's would have to be converted to.
    m_row = tl.max(m, axis=0)
    return m_row, lane_sum(s * tl.exp(m - m_row), 0, IS_FP32)
