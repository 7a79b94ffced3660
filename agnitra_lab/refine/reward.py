"""The two reward models of the bandit: one that begins with the siblings, and one that knows the coordinates alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.gaussian import Basis, Fitter, Floats, HyperPrior, Inputs, Process, Singles
from agnitra_lab.refine.inputs import inputs_of, with_siblings
from agnitra_lab.refine.prior import basis_of, difference_prior, shape_prior
from agnitra_lab.refine.sampler import Observation, Problem

CAP = 1.5
"""Logarithm of the factor over the best at which a slow config counts as slow: e^1.5 is 4.5 times."""
NUM_STEPS, NUM_DEAR = 3, 24
"""Steps of the fit at every question; from 24 observations on the two models take a step each in turn."""
NUM_FILLED_A_TIME = 200_000
"""Covariances of the next process worked out at one question, some 2 ms: the old one answers meanwhile."""
MAX_FITTED = 160


def capped(over: Floats, cap: float) -> Floats:
    """Bend the logarithm of latency over the best: equal near 0, towards `cap` far away, order kept.

    What is five times too slow and what is fifty times too slow tell the same about where the optimum is.
    """
    return np.asarray(cap * -np.expm1(-over / cap))


class Seen:
    """Every latency that was observed, shared by the models.

    Attributes:
        arms: with a latency, in the order of learning.
    """

    def __init__(self) -> None:
        self.arms: list[int] = []
        self._logs: list[float] = []

    @property
    def num_known(self) -> int:
        """Arms with a latency."""
        return len(self.arms)

    def add(self, seen: Observation) -> None:
        """Take one arm; one that failed has no latency to learn from."""
        if seen.log_ms is not None:
            self.arms.append(seen.arm)
            self._logs.append(seen.log_ms)

    def values(self) -> Floats:
        """Return [observations], the bent logarithms over the best: the lowest is 0."""
        logs = np.array(self._logs)
        return capped(logs - logs.min(), CAP) if len(logs) else logs


class RewardModel:
    """A Gaussian process over features of the configs, fitted again every so often."""

    fit_at: tuple[int, ...] = ()
    """Observations at which the hyper-parameters change, which costs a factorisation: seldom once it is dear."""
    turn = 0

    def __init__(self, inputs: Inputs, basis: Basis, prior: HyperPrior, seen: Seen) -> None:
        self._inputs = inputs
        self._single = inputs.single()
        self._basis = basis
        self._prior = prior
        self._seen = seen
        self._process = Process(self._single, prior.mean)
        self._fitter = Fitter(prior)
        self._fitted_at = self._caught_up = 0
        self._next: Process | None = None

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

    @property
    def inputs(self) -> Inputs:
        """What the model compares configs by, in float32."""
        return self._single

    def _catch_up(self) -> None:
        num = self._seen.num_known
        if num == self._caught_up:
            return
        self._caught_up = num
        if num >= self.fit_at[0] and (num < NUM_DEAR or num % 2 == self.turn):
            self._refit()
        for arm in self._seen.arms[len(self._process.arms) :]:
            self._process.append(arm)

    def _refit(self) -> None:
        """Take the next steps of the fit, or work on the process that a fit has led to, never both at one question."""
        num = self._seen.num_known
        if self._next is None:
            self._fitter.run(*self._fitted(), num_steps=NUM_STEPS if num < NUM_DEAR else 1)
            due = max(at for at in self.fit_at if at <= num)
            if due <= self._fitted_at:
                return
            self._fitted_at = due
            self._next = Process(self._single, self._fitter.best(*self._fitted()))
            self._next.begin(list(self._seen.arms))
            # A large space waits for the next question: a fit and its first rows at once would be the slowest one.
            if num * len(self._single) >= NUM_FILLED_A_TIME:
                return
        if self._next.fill(NUM_FILLED_A_TIME):
            self._process, self._next = self._next, None

    def _fitted(self) -> tuple[Inputs, Floats, Basis]:
        """The observations that the hyper-parameters are fitted to."""
        arms, values = self._seen.arms, self._seen.values()
        kept = np.arange(len(arms))
        if len(arms) > MAX_FITTED:
            # The best ones and the latest ones: they are where the next question will be.
            best = np.argsort(values, kind="stable")[: MAX_FITTED // 2]
            kept = np.union1d(best, kept[-MAX_FITTED // 2 :])
        chosen = np.array(arms)[kept]
        basis = Basis(self._basis.columns[chosen], self._basis.mean, self._basis.precision)
        return self._inputs.at(chosen), values[kept], basis


class ColdModel(RewardModel):
    """Knows coordinates and compiler facts, and from the siblings what such landscapes are like."""

    fit_at = (5, 7, 10, 14, 20, 28, 40, 55, 80, 110, 150, 200, 300, 400, 600, 1000)

    def __init__(self, problem: Problem, seen: Seen) -> None:
        inputs = inputs_of(problem)
        prior = shape_prior(inputs, bent_siblings(problem))
        super().__init__(inputs, Basis(np.ones((len(inputs), 1)), np.zeros(1), np.zeros(1)), prior, seen)


class WarmModel(RewardModel):
    """Begins with the siblings' mean, and learns how this landscape differs from it."""

    turn = 1
    fit_at = (4, 6, 9, 13, 18, 24, 31, 42, 56, 72, 95, 130, 170, 250, 350, 500, 800)

    def __init__(self, problem: Problem, seen: Seen) -> None:
        self._names = [sibling.name for sibling in problem.siblings]
        self._bent = bent_siblings(problem)
        self._weights = np.full(len(self._bent), 1 / len(self._bent))
        inputs = inputs_of(problem)
        prior = difference_prior(inputs, self._bent)
        super().__init__(with_siblings(inputs, self._bent), basis_of(self._weights @ self._bent), prior, seen)

    def shares(self) -> dict[str, float]:
        """How much of the mean each sibling has; they sum to 1."""
        return dict(zip(self._names, self._weights.tolist(), strict=True))

    def _catch_up(self) -> None:
        if self._seen.num_known != self._caught_up:
            self._weights = self._weigh()
            self._basis = basis_of(self._weights @ self._bent)
        super()._catch_up()

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


def bent_siblings(problem: Problem) -> Floats:
    """Return [siblings, configs], the bent logarithms of each sibling's latencies over its own best."""
    logs = np.array([sibling.log_ms for sibling in problem.siblings]).reshape(-1, len(problem.encoding))
    return capped(logs - logs.min(axis=1, keepdims=True, initial=np.inf), CAP)
