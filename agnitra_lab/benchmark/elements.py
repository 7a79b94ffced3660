"""One output tensor against its reference, element by element, in float64 and in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from agnitra_lab.contracts.measurement import MAX_ERROR_RATIO

RTOL = {
    torch.float64: 1e-7,
    torch.float32: 1e-4,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.complex128: 1e-7,
    torch.complex64: 1e-4,
}
"""Relative tolerance by dtype (DESIGN section 4)."""
RELAXED_RTOL = 1.6e-2
# Eight-bit floats: two steps of a three-bit mantissa.
_NARROW_RTOL = 0.125
# A share of 99.9% lets a whole lost block of a large output pass; no single element may be this many tolerances off.
_MAX_TOLERANCES = 20.0
_SHARE_SLACK = 1e-3
_NUM_STANDARD_ERRORS = 2.0
# The error of a loss is one draw, not a statistic: torch.compile was 1.14e-7 off where eager, by luck, was 5.0e-8.
_FEW_ELEMENTS = 32
_PIECE = 2**24


@dataclass(frozen=True)
class LeafMatch:
    """How one output tensor compares.

    Attributes:
        share: elements that match; required_share: how many must (see `match`).
        num_elements: of the tensor.
        max_abs_error: largest |out - ref| over the elements where both are finite.
        error: RMS(out - oracle) / RMS(oracle); None without an oracle, or where the oracle is all zero.
        baseline_error: the same of the reference itself.
        is_judged_by_oracle: the requirement is the reference's own share against the oracle.
        rounding: the error that an output of few elements may have whatever the reference's luck; 0 for a larger one.
        problem: a mismatch that no tolerance covers, in words, else None.
    """

    share: float
    required_share: float
    num_elements: int
    max_abs_error: float
    error: float | None = None
    baseline_error: float | None = None
    is_judged_by_oracle: bool = False
    rounding: float = 0.0
    problem: str | None = None


def rtol_of(dtype: torch.dtype) -> float:
    """Return the relative tolerance of a floating or complex dtype."""
    return RTOL.get(dtype, _NARROW_RTOL)


def match(
    out: torch.Tensor, ref: torch.Tensor, oracle: torch.Tensor | None, *, rtol: float, required_share: float
) -> LeafMatch:
    """Compare one output with its reference.

    Integers and booleans must be equal. An element of a floating output matches when it is within
    atol + rtol * |ref| of the reference, or within the same of the fp64 oracle where there is one: a candidate
    that is nearer to the truth than eager is never punished. Where eager itself misses the required share against
    the oracle (deep models in low precision), or so few elements would all have to match, the candidate's share against
    the oracle must be at least the one that eager reaches at a tolerance 1.25 times tighter, less 0.001 or two standard
    errors of the difference of two shares: the rule of the 1.25-fold error, element-wise.

    Args:
        out: the candidate's output.
        ref: the baseline's, same shape and dtype.
        oracle: the fp64 truth, same shape, or None.
        rtol: relative tolerance; atol is rtol * RMS over the finite elements.
        required_share: in [0, 1].
    """
    if not (ref.is_floating_point() or ref.is_complex()):
        return _match_exactly(out, ref)
    if ref.numel() == 0:
        return LeafMatch(1.0, required_share, 0, 0.0)
    sums = _Sums(_rms(ref), _rms(oracle) if oracle is not None else 0.0)
    for piece in _pieces(out, ref, oracle):
        sums.add(*piece, rtol=rtol)
    return sums.judge(required_share, rounding_of(ref) if ref.numel() <= _FEW_ELEMENTS else 0.0)


def rounding_of(tensor: torch.Tensor) -> float:
    """Return the relative error of arithmetic in fp32 that is one rounding off, rounded once more to the dtype.

    In fp32 that is one unit in the last place (a faithful rounding), in bf16 the half unit that storing a value costs.
    """
    eps = torch.finfo(tensor.dtype).eps
    return (eps + min(eps, torch.finfo(torch.float32).eps)) / 2


def _match_exactly(out: torch.Tensor, ref: torch.Tensor) -> LeafMatch:
    num_elements = ref.numel()
    num_equal = int((out == ref).sum()) if num_elements else 0
    share = num_equal / num_elements if num_elements else 1.0
    max_error = float((out.double() - ref.double()).abs().max()) if num_elements else 0.0
    problem = None if num_equal == num_elements else f"{num_elements - num_equal} of {num_elements} integers differ"
    return LeafMatch(share, 1.0, num_elements, max_error, problem=problem)


class _Sums:
    """Counts and sums over the pieces of one tensor."""

    def __init__(self, ref_rms: float, oracle_rms: float) -> None:
        self.ref_rms, self.oracle_rms = ref_rms, oracle_rms
        self.num_elements = self.num_matching = self.num_non_finite_wrong = self.num_finite = 0
        self.num_near_oracle = self.num_ref_near_oracle = self.num_ref_well_near_oracle = 0
        self.max_error = self.max_tolerances = 0.0
        self.max_oracle_error = self.max_ref_oracle_error = 0.0
        self.square_error = self.ref_square_error = 0.0
        self.has_oracle = False

    def add(self, out: torch.Tensor, ref: torch.Tensor, oracle: torch.Tensor | None, *, rtol: float) -> None:
        """Count one piece of the tensors, all in float64."""
        is_finite = torch.isfinite(ref) & torch.isfinite(out)
        is_same_special = ~is_finite & ((out == ref) | (out.isnan() & ref.isnan()))
        self.num_elements += ref.numel()
        self.num_non_finite_wrong += int((~is_finite & ~is_same_special).sum())
        error = torch.where(is_finite, (out - ref).abs(), 0.0)
        tolerance = rtol * (self.ref_rms + torch.where(is_finite, ref.abs(), 0.0))
        is_match = is_finite & (error <= tolerance)
        self.max_error = max(self.max_error, float(error.max()))
        # Where the tolerance is 0 (an all-zero reference), any error is infinitely many tolerances.
        tolerances = torch.where(error > 0, error / tolerance, 0.0)
        self.max_tolerances = max(self.max_tolerances, float(tolerances.max()))
        if oracle is not None:
            is_match = is_match | self._add_oracle(out, ref, oracle, is_finite & torch.isfinite(oracle), rtol)
        self.num_matching += int((is_match | is_same_special).sum())

    def _add_oracle(
        self, out: torch.Tensor, ref: torch.Tensor, oracle: torch.Tensor, is_finite: torch.Tensor, rtol: float
    ) -> torch.Tensor:
        self.has_oracle = True
        tolerance = rtol * (self.oracle_rms + torch.where(is_finite, oracle.abs(), 0.0))
        error = torch.where(is_finite, (out - oracle).abs(), 0.0)
        ref_error = torch.where(is_finite, (ref - oracle).abs(), 0.0)
        is_near = is_finite & (error <= tolerance)
        self.num_finite += int(is_finite.sum())
        self.num_near_oracle += int(is_near.sum())
        self.num_ref_near_oracle += int((is_finite & (ref_error <= tolerance)).sum())
        self.num_ref_well_near_oracle += int((is_finite & (ref_error <= tolerance / MAX_ERROR_RATIO)).sum())
        self.max_oracle_error = max(self.max_oracle_error, float(error.max()))
        self.max_ref_oracle_error = max(self.max_ref_oracle_error, float(ref_error.max()))
        self.square_error += float(error.square().sum())
        self.ref_square_error += float(ref_error.square().sum())
        return is_near

    def judge(self, required_share: float, rounding: float) -> LeafMatch:
        """Apply the rule of `match` to what was counted."""
        share, required = self.num_matching / self.num_elements, required_share
        error = baseline_error = None
        is_judged_by_oracle = False
        if self.has_oracle and self.num_finite and self.oracle_rms > 0:
            error = (self.square_error / self.num_finite) ** 0.5 / self.oracle_rms
            baseline_error = (self.ref_square_error / self.num_finite) ** 0.5 / self.oracle_rms
            misses_itself = self.num_ref_near_oracle / self.num_finite < required_share
            # Of so few a share of 99.9% is all of them, which two equally good answers miss by turns.
            is_few = self.num_finite * (1.0 - required_share) < 1.0
            if share < required_share and (misses_itself or is_few):
                is_judged_by_oracle = True
                share = self.num_near_oracle / self.num_finite
                required = max(_share_less_luck(self.num_ref_well_near_oracle, self.num_finite), 0.0)
        return LeafMatch(
            share, required, self.num_elements, self.max_error, error, baseline_error, is_judged_by_oracle,
            rounding, self._problem(),
        )  # fmt: skip

    def _problem(self) -> str | None:
        if self.num_non_finite_wrong:
            return f"NaN or infinity differs at {self.num_non_finite_wrong} of {self.num_elements} elements"
        is_as_good_as_ref = self.has_oracle and self.max_oracle_error <= 2.0 * self.max_ref_oracle_error
        if self.max_tolerances > _MAX_TOLERANCES and not is_as_good_as_ref:
            return f"an element is {self.max_tolerances:.3g} tolerances off (at most {_MAX_TOLERANCES:g} may be)"
        return None


def _share_less_luck(num_near: int, num_elements: int) -> float:
    """Return a share that another sample with the same chance for each element hardly ever falls below.

    The standard error is that of two samples, with one element more on either side (Agresti and Caffo, 2000): of all
    elements or of none it would be 0.
    """
    chance = (num_near + 1) / (num_elements + 2)
    luck = _NUM_STANDARD_ERRORS * (2.0 * chance * (1.0 - chance) / num_elements) ** 0.5
    return num_near / num_elements - max(luck, _SHARE_SLACK)


def _rms(tensor: torch.Tensor) -> float:
    square_sum, num_finite = 0.0, 0
    for (piece,) in _flat_pieces(tensor):
        finite = piece[torch.isfinite(piece)]
        square_sum += float(finite.square().sum())
        num_finite += finite.numel()
    return (square_sum / num_finite) ** 0.5 if num_finite else 0.0


def _pieces(
    out: torch.Tensor, ref: torch.Tensor, oracle: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    if oracle is None:
        yield from ((a, b, None) for a, b in _flat_pieces(out, ref))
    else:
        yield from _flat_pieces(out, ref, oracle)  # type: ignore[misc]


def _flat_pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    flat = [(torch.view_as_real(item) if item.is_complex() else item).reshape(-1) for item in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield tuple(item[start : start + _PIECE].double() for item in flat)
