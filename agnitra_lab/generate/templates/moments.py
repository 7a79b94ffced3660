"""Mean and centred sum of squares: how both grow value by value, how parts merge, and the scale that they give.

A mean is a number and the rest that its rounding left: of values far from 0 the rounding alone would be an error in
each of them, the same for a whole row.

No template itself: what the norms share. `mean` and `m2` are never taken from E[x^2] - E[x]^2, which cancels.

Sources: Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 4(3), 1962;
Dekker, "A Floating-Point Technique for Extending the Available Precision", Numerische Mathematik 18, 1971, section 3;
Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, section 2.
"""

import triton
import triton.language as tl


@triton.jit
def _two_parts(centre, shift):
    # Dekker's fast sum: the rounded sum and what rounding took from it, exact where |centre| >= |shift|.
    mean = centre + shift
    return mean, shift - (mean - centre)


@triton.jit
def _merge_moments(mean, m2, count, total):
    # Chan's rule over axis 1. The second correction takes out what rounding left in the first mean.
    centre = tl.div_rn(tl.sum(mean * count, axis=1), total)
    offset = mean - centre[:, None]
    shift = tl.div_rn(tl.sum(offset * count, axis=1), total)
    m2 = tl.sum(m2 + offset * offset * count, axis=1) - total * shift * shift
    mean, rest = _two_parts(centre, shift)
    return mean, rest, m2


@triton.jit
def _merge_parts(mean, rest, m2, count, total):
    # The same for a vector of parts. It gives numbers: a tensor of one row would have the layout of the parts, and the
    # row would be converted to it and back through shared memory, value by value.
    centre = tl.div_rn(tl.sum(mean * count, axis=0), total)
    offset = (mean - centre) + rest
    shift = tl.div_rn(tl.sum(offset * count, axis=0), total)
    m2 = tl.sum(m2 + offset * offset * count, axis=0) - total * shift * shift
    mean, rest = _two_parts(centre, shift)
    return mean, rest, m2


@triton.jit
def _update_moments(mean, m2, h, mask, count):
    # One step of Welford's recurrence in every lane; a masked lane stands still.
    delta = tl.where(mask, h - mean, 0.0)
    mean += delta * (1.0 / count)
    return mean, m2 + delta * tl.where(mask, h - mean, 0.0)


@triton.jit
def _scale_of(m2, total, eps):
    # 1 / sqrt(variance + eps), each step rounded once: the device's own rsqrt is off by up to two units in the last
    # place, and all of a row's values with it.
    variance = tl.maximum(tl.div_rn(m2, total), 0.0)
    return tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))
