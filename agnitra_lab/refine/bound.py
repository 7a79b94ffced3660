"""The early end of a hopeless config: stop sampling once it is slower than the best one beyond doubt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

MARGIN = 1.05
"""How much slower than the best a config must be: one within 5% of it may still win the finals."""
SIGNIFICANCE = 0.005
"""At a search of 100 configs, half a good one is lost by chance at most."""
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Bound:
    """What is known of the best config while another is measured.

    Attributes:
        samples_ms: single timings of the best config so far; empty where nothing has succeeded.
    """

    samples_ms: tuple[float, ...] = ()

    def is_hopeless(self, samples_ms: Sequence[float]) -> bool:
        """Tell whether samples are so slow that more of them are wasted.

        One-sided Wilcoxon rank-sum test, exact, of the samples against those of the best config times the margin. A
        best config with a single known latency stands for itself: then twice the latency is hopeless.

        Args:
            samples_ms: taken so far, at least three for a verdict.
        """
        if len(samples_ms) < MIN_SAMPLES or not self.samples_ms:
            return False
        if len(self.samples_ms) < MIN_SAMPLES:
            return min(samples_ms) > 2 * max(self.samples_ms)
        best = [sample * MARGIN for sample in self.samples_ms]
        num_wins = sum((sample > other) + 0.5 * (sample == other) for sample in samples_ms for other in best)
        return rank_sum_p(int(num_wins), len(samples_ms), len(best)) < SIGNIFICANCE


NO_BOUND = Bound()
"""Nothing is known: everything is sampled in full."""


def sampled(take: Callable[[], float], bound: Bound, *, num_samples: int = 20) -> tuple[float, tuple[float, ...], bool]:
    """Take samples until there are enough, or the bound says that they are hopeless.

    Args:
        take: returns one timing in ms.
        bound: of the best config.
        num_samples: at most.

    Returns:
        The median in ms, the samples, and whether they ended early.
    """
    samples: list[float] = []
    for _ in range(num_samples):
        samples.append(take())
        if len(samples) < num_samples and bound.is_hopeless(samples):
            return median(samples), tuple(samples), True
    return median(samples), tuple(samples), False


@lru_cache(maxsize=4096)
def rank_sum_p(num_wins: int, num_left: int, num_right: int) -> float:
    """Return the chance of at least so many wins among all pairs when both sides have the same distribution.

    Args:
        num_wins: pairs in which the left sample is the larger one.
        num_left: samples on the left.
        num_right: samples on the right.
    """
    ways = _ways(num_left, num_right)
    return sum(ways[max(0, num_wins) :]) / sum(ways)


@lru_cache(maxsize=256)
def _ways(num_left: int, num_right: int) -> tuple[int, ...]:
    """Count, for each number of wins, the orders of the samples that have it: the Gaussian binomial coefficients."""
    top = num_left * num_right
    ways = [1] + [0] * top
    for size in range(1, num_left + 1):
        # Multiply by (1 - q^(num_right + size)), then divide by (1 - q^size).
        for index in range(top, num_right + size - 1, -1):
            ways[index] -= ways[index - num_right - size]
        for index in range(size, top + 1):
            ways[index] += ways[index - size]
    return tuple(ways)
