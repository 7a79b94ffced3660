"""The two reward models of the bandit: one that begins with the siblings, and one that knows the coordinates alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.gaussian import Basis, Fitter, Floats, Hyper, HyperPrior, Process, Singles
from agnitra_lab.refine.sampler import Observation, Problem
from agnitra_lab.refine.siblings import Sibling

CAP = 1.5
"""Logarithm of the factor over the best at which a slow config counts as slow: e^1.5 is 4.5 times."""
MAX_PAIRED = 7
"""Parameters whose products and quotients are features: those with the most values."""
NUM_STEPS, NUM_DEAR = 3, 24
"""Steps of the fit at every question; from 24 observations on the models take one each in turn."""
NUM_FILLED_A_TIME = 350_000
"""Covariances of the next process worked out at one question, some 3 ms: the old one answers meanwhile."""
MAX_FITTED = 160
NUM_META = 160
SLOPE_SPREAD = 0.3


def capped(over: Floats, cap: float) -> Floats:
    """Bend the logarithm of latency over the best: equal near 0, towards `cap` far away, order kept.

    What is five times too slow and what is fifty times too slow tell the same about where the optimum is.
    """
    return np.asarray(cap * -np.expm1(-over / cap))


class Seen:
    """Everything that was observed, shared by the models.

    Attributes:
        arms: with a latency, in the order of learning.
        failed: arms that failed.
    """

    def __init__(self, num_configs: int) -> None:
        self.arms: list[int] = []
        self.failed: list[int] = []
        self._logs: list[float] = []
        self._num_configs = num_configs

    @property
    def num_known(self) -> int:
        """Arms with a latency."""
        return len(self.arms)

    def add(self, seen: Observation) -> None:
        """Take one arm."""
        if seen.log_ms is None:
            self.failed.append(seen.arm)
        else:
            self.arms.append(seen.arm)
            self._logs.append(seen.log_ms)

    def values(self) -> Floats:
        """Return [observations], the bent logarithms over the best: the lowest is 0."""
        logs = np.array(self._logs)
        return capped(logs - logs.min(), CAP) if len(logs) else logs

    def odds_of_success(self, model: RewardModel) -> Floats | float:
        """Return [configs], how likely each is to run at all, from the failures and successes near it."""
        if not self.failed:
            return 1.0
        return model.odds_of_success()


class RewardModel:
    """A Gaussian process over features of the configs, fitted again every so often."""

    fit_at: tuple[int, ...] = ()
    """Observations at which the hyper-parameters change, which costs a factorisation: seldom once it is dear."""
    turn = 0

    def __init__(self, features: Floats, basis: Basis, prior: HyperPrior, seen: Seen) -> None:
        self._features = features
        self._single = features.astype(np.float32)
        self._basis = basis
        self._prior = prior
        self._seen = seen
        self._process = Process(self._single, prior.mean)
        self._fitter = Fitter(prior)
        self._fitted_at = self._caught_up = 0
        self._next: Process | None = None
        self._near_ok = np.zeros(len(features), dtype=np.float32)
        self._near_failed = np.zeros(len(features), dtype=np.float32)
        self._num_ok = self._num_failed = 0

    def predict(self) -> tuple[Singles, Singles]:
        """Return the posterior mean and standard deviation of every config."""
        self._catch_up()
        mean, deviation, _ = self._process.predict(self._seen.values(), self._basis)
        return mean, deviation

    def log_likelihood(self) -> float:
        """Return the evidence of the observations, as of the last fit."""
        self._catch_up()
        return self._process.log_likelihood(self._seen.values(), self._basis)

    def draw(self, arms: NDArray[np.intp], mean: Singles, num: int, rng: np.random.Generator) -> Floats:
        """Draw functions of the posterior on some arms: [num, arms]."""
        return self._process.draw(arms, mean, num, rng)

    def odds_of_success(self) -> Floats:
        """Return [configs], the share of successes near each config, shrunk towards the overall share."""
        unit = np.float32(math.exp(-self._process.hyper.log_amplitude))
        for arm in self._seen.arms[self._num_ok :]:
            self._near_ok += self._process.kernel_row(arm) * unit
        for arm in self._seen.failed[self._num_failed :]:
            self._near_failed += self._process.kernel_row(arm) * unit
        self._num_ok, self._num_failed = len(self._seen.arms), len(self._seen.failed)
        overall = (self._num_ok + 1) / (self._num_ok + self._num_failed + 1)
        return np.asarray((self._near_ok + 0.2 * overall) / (self._near_ok + self._near_failed + 0.2), dtype=np.float64)

    def _catch_up(self) -> None:
        num = self._seen.num_known
        if num == self._caught_up:
            return
        self._caught_up = num
        due = max((at for at in self.fit_at if at <= num), default=0)
        if num >= self.fit_at[0] and (num < NUM_DEAR or num % 2 == self.turn):
            self._learn_hyper()
        if due > self._fitted_at and self._next is None:
            self._fitted_at = due
            self._next = Process(self._single, self._fitter.best(*self._fitted()))
            self._next.begin(list(self._seen.arms))
        if self._next is not None and self._next.fill(NUM_FILLED_A_TIME):
            self._process, self._next = self._next, None
            self._near_ok[:] = 0
            self._near_failed[:] = 0
            self._num_ok = self._num_failed = 0
        for arm in self._seen.arms[len(self._process.arms) :]:
            self._process.append(arm)

    def _learn_hyper(self) -> None:
        self._fitter.run(*self._fitted(), num_steps=NUM_STEPS if self._seen.num_known < NUM_DEAR else 1)

    def _fitted(self) -> tuple[Floats, Floats, Basis]:
        """The observations that the hyper-parameters are fitted to."""
        arms, values = self._seen.arms, self._seen.values()
        kept = np.arange(len(arms))
        if len(arms) > MAX_FITTED:
            # The best ones and the latest ones: they are where the next question will be.
            best = np.argsort(values, kind="stable")[: MAX_FITTED // 2]
            kept = np.union1d(best, kept[-MAX_FITTED // 2 :])
        chosen = np.array(arms)[kept]
        basis = Basis(self._basis.columns[chosen], self._basis.mean, self._basis.precision)
        return self._features[chosen], values[kept], basis


class ColdModel(RewardModel):
    """Knows coordinates and compiler facts."""

    fit_at = (5, 7, 10, 14, 20, 28, 40, 55, 80, 110, 150, 200, 300, 400, 600, 1000)

    def __init__(self, problem: Problem, seen: Seen) -> None:
        features = _coordinates(problem)
        num = features.shape[1]
        mean = Hyper(np.full(num, math.log(math.sqrt(num))), math.log(0.25), math.log(0.003))
        spread = np.concatenate([np.full(num, 1.0), [1.0, 1.5]])
        ones = np.ones((len(features), 1))
        super().__init__(features, Basis(ones, np.zeros(1), np.zeros(1)), HyperPrior(mean, spread), seen)


class WarmModel(RewardModel):
    """Begins with the siblings' mean, and learns how this landscape differs from it."""

    turn = 1
    fit_at = (4, 6, 9, 13, 18, 24, 31, 42, 48, 68, 95, 130, 170, 250, 350, 500, 800)

    def __init__(self, problem: Problem, seen: Seen) -> None:
        self._names = [sibling.name for sibling in problem.siblings]
        self._bent = np.array([_bent(sibling) for sibling in problem.siblings])
        coordinates = _coordinates(problem)
        features = np.column_stack([coordinates, self._bent.mean(axis=0)])
        prior = _meta_prior(coordinates, self._bent, problem.seed)
        super().__init__(features, self._mixed(np.full(len(self._bent), 1 / len(self._bent))), prior, seen)
        self._weights = np.full(len(self._bent), 1 / len(self._bent))

    def shares(self) -> dict[str, float]:
        """How much of the mean each sibling has; they sum to 1."""
        return dict(zip(self._names, self._weights.tolist(), strict=True))

    def _catch_up(self) -> None:
        self._weights = self._weigh()
        self._basis = self._mixed(self._weights)
        super()._catch_up()

    def _mixed(self, weights: Floats) -> Basis:
        mean = weights @ self._bent
        return Basis(
            np.column_stack([np.ones(len(mean)), mean]), np.array([0.0, 1.0]), np.array([0.0, SLOPE_SPREAD**-2])
        )

    def _weigh(self) -> Floats:
        """The odds that each sibling's landscape, shifted, is the one that the measurements come from."""
        num = self._seen.num_known
        if num < 2 or len(self._bent) == 1:
            return np.full(len(self._bent), 1 / len(self._bent))
        gaps = self._seen.values() - self._bent[:, self._seen.arms]
        gaps -= gaps.mean(axis=1, keepdims=True)
        # Pseudo-observations keep the first few measurements from deciding everything.
        variance = ((gaps**2).sum(axis=1) + 4 * 0.15**2) / (num - 1 + 4)
        log_odds = -0.5 * (num - 1) * np.log(variance)
        odds = np.exp(log_odds - log_odds.max())
        return np.asarray(odds / odds.sum())


def _coordinates(problem: Problem) -> Floats:
    """What is known of a config before it runs: [configs, features] in 0..1.

    The logarithms of the parameters, of their products and of their quotients in pairs, and the compiler's facts. Times
    of kernels follow products (threads of a block, elements of a tile) and quotients (elements a thread) more than
    single parameters, and a kernel function with a length scale a column finds out which ones matter.
    """
    encoding = problem.encoding
    values = np.array([[config.params[name] for name in encoding.names] for config in encoding.configs], dtype=float)
    values = values.reshape(len(encoding), len(encoding.names))
    # Ranks serve where logarithms do not: a negative value has none.
    logs = np.where(values.min(axis=0, initial=0.0) < 0, encoding.points, np.log2(np.maximum(values, 0.5)))
    num_values = np.array([len(np.unique(column)) for column in logs.T])
    paired = sorted(np.argsort(-num_values, kind="stable")[:MAX_PAIRED].tolist())
    paired = [index for index in paired if num_values[index] > 2]
    columns = [*logs.T]
    for left, right in itertools.combinations(paired, 2):
        columns += [logs[:, left] + logs[:, right], logs[:, left] - logs[:, right]]
    varied = [(column - column.min()) / np.ptp(column) for column in columns if len(column) and np.ptp(column) > 0]
    facts = [*problem.facts.T] if len(problem.facts) else []
    features = np.array([*varied, *facts]).reshape(-1, len(encoding)).T
    return features if features.shape[1] else np.zeros((len(encoding), 1))


def _bent(sibling: Sibling) -> Floats:
    return capped(sibling.log_ms - sibling.log_ms.min(), CAP)


def _meta_prior(coordinates: Floats, bent: Floats, seed: int) -> HyperPrior:
    """Learn from the siblings how siblings differ: each in turn is the target, the mean of the others its guess.

    With one sibling there is no difference to learn from; its own shape gives the length scales and the roughness.
    """
    num = coordinates.shape[1]
    lengths = np.concatenate([np.full(num, math.log(math.sqrt(num))), [math.log(0.7)]])
    start = Hyper(lengths, math.log(0.04), math.log(0.01))
    prior = HyperPrior(start, np.concatenate([np.full(num + 1, 1.0), [1.0, 1.5]]))
    if len(coordinates) < 8:
        return prior
    if len(bent) == 1:
        own = _shape_of(coordinates, bent[0], prior, seed)
        mean = Hyper(own.log_lengths, start.log_amplitude, 0.5 * (start.log_nugget + own.log_nugget))
        return HyperPrior(mean, np.concatenate([np.full(num + 1, 0.7), [1.0, 1.5]]))
    fitted = [_difference(index, coordinates, bent, prior, seed) for index in range(min(len(bent), 4))]
    mean = Hyper.of(np.mean([hyper.vector() for hyper in fitted], axis=0))
    return HyperPrior(mean, np.concatenate([np.full(num + 1, 0.7), [1.0, 1.0]]))


def _shape_of(coordinates: Floats, bent: Floats, prior: HyperPrior, seed: int) -> Hyper:
    """Fit a sibling by its coordinates alone; the length of the feature that it is itself stays as it was."""
    rng = np.random.default_rng(seed)
    chosen = _sample(bent, rng)
    features = np.column_stack([coordinates[chosen], np.zeros(len(chosen))])
    wide = HyperPrior(Hyper(prior.mean.log_lengths, math.log(0.25), math.log(0.003)), prior.spread)
    fitter = Fitter(wide)
    basis = Basis(np.ones((len(chosen), 1)), np.zeros(1), np.zeros(1))
    fitter.run(features, bent[chosen], basis, num_steps=20)
    return fitter.best(features, bent[chosen], basis)


def _sample(bent: Floats, rng: np.random.Generator) -> NDArray[np.intp]:
    """Choose configs to fit a sibling to, half of them among its best, where the search will be."""
    size = min(NUM_META, len(bent))
    best = np.argsort(bent, kind="stable")[: 4 * size]
    return np.union1d(
        rng.choice(best, size=min(size // 2, len(best)), replace=False),
        rng.choice(len(bent), size=size // 2, replace=False),
    )


def _difference(index: int, coordinates: Floats, bent: Floats, prior: HyperPrior, seed: int) -> Hyper:
    rng = np.random.default_rng([seed, index])
    others = np.delete(bent, index, axis=0).mean(axis=0)
    chosen = _sample(np.minimum(others, bent[index]), rng)
    features = np.column_stack([coordinates[chosen], others[chosen]])
    basis = Basis(
        np.column_stack([np.ones(len(chosen)), others[chosen]]), np.array([0.0, 1.0]), np.array([0.0, SLOPE_SPREAD**-2])
    )
    fitter = Fitter(prior)
    fitter.run(features, bent[index][chosen], basis, num_steps=20)
    return fitter.best(features, bent[index][chosen], basis)


__all__: Sequence[str] = ("ColdModel", "RewardModel", "Seen", "WarmModel", "capped")
