"""Shares of elements where the baseline itself misses what is required, or where they are few."""

from __future__ import annotations

import pytest
import torch

from agnitra_lab.benchmark.elements import RTOL, match

RTOL_BF16 = RTOL[torch.bfloat16]


def is_refused(num_elements: int, seed: int, times_the_error: float, error_rtols: float = 1.3) -> bool:
    """Hold a candidate with so much of the baseline's error against it, both with errors of their own.

    With 1.3 tolerances a quarter of the elements are too far off, with 0.6 one in a hundred.
    """
    draw = torch.Generator().manual_seed(seed)
    truth, error, own = (torch.randn(num_elements, generator=draw, dtype=torch.float64) for _ in range(3))
    size = error_rtols * RTOL_BF16
    ref, out = truth + size * error, truth + times_the_error * size * own
    leaf = match(out, ref, truth, rtol=RTOL_BF16, required_share=0.999)
    return leaf.share < leaf.required_share


@pytest.mark.parametrize("error_rtols", [0.6, 0.9, 1.3])
@pytest.mark.parametrize("num_elements", [4, 32, 640, 100_000])
def test_a_candidate_with_the_baselines_error_is_hardly_ever_refused(num_elements, error_rtols):
    assert sum(is_refused(num_elements, seed, 1.0, error_rtols) for seed in range(200)) <= 4


def test_a_candidate_with_one_and_a_half_times_the_baselines_error_is_always_refused():
    assert all(is_refused(100_000, seed, 1.5) for seed in range(20))
