"""What is believed of a landscape's hyper-parameters before it is measured: from the siblings, where there are any.

A sibling that ranks the configs otherwise still tells how rough such landscapes are, which parameters matter and how
much of a latency belongs to one config alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from agnitra_lab.refine.gaussian import Basis, Fitter, Floats, Hyper, HyperPrior, Inputs
from agnitra_lab.refine.inputs import with_siblings

AMPLITUDE, NUGGET, BLOCKS = 0.25, 0.0005, (0.1, 0.05)
"""Variances of a landscape's bent logarithms: of all parameters together, of a config alone, of the two blocks.

A large one of a config alone makes every neighbour of the best worth a question, and the search stays there.
"""
AMPLITUDE_APART, NUGGET_APART, BLOCKS_APART = 0.04, 0.01, (0.02, 0.01, 0.01)
"""The same for how a landscape differs from its siblings' mean; the third block is that of the siblings' weights."""
LENGTH_OF_MEAN = 0.7
SURE = 0.7
"""Of the spread that is left once siblings were fitted."""
SLOPE_SPREAD = 0.3
"""Of the factor by which a landscape's differences are larger or smaller than its siblings'."""
MAX_SIBLINGS, NUM_CONFIGS, NUM_STEPS, LEAST_CONFIGS = 4, 160, 20, 8
_MAX_REMEMBERED = 64
_remembered: dict[bytes, HyperPrior] = {}
"""Priors by their content: a resumed search, another seed or a second site of one shape fits nothing again."""


def flat_prior(num_features: int) -> HyperPrior:
    """Return the prior of a landscape without siblings."""
    lengths = np.full(num_features, 0.5 * math.log(num_features))
    return _prior(lengths, AMPLITUDE, NUGGET, BLOCKS)


def shape_prior(inputs: Inputs, bent: Floats) -> HyperPrior:
    """Learn from the siblings what such landscapes are like, without believing where their optima are.

    Args:
        inputs: of all configs.
        bent: [siblings, configs], their bent logarithms of latency.
    """
    return _once(_shape_prior, inputs, bent)


def difference_prior(inputs: Inputs, bent: Floats) -> HyperPrior:
    """Learn from the siblings how siblings differ: each in turn is the target, the mean of the others its guess.

    Args:
        inputs: of all configs, without the siblings.
        bent: [siblings, configs], their bent logarithms of latency.
    """
    return _once(_difference_prior, inputs, bent)


def _once(learn: Callable[[Inputs, Floats], HyperPrior], inputs: Inputs, bent: Floats) -> HyperPrior:
    digest = hashlib.sha256(learn.__name__.encode())
    for array in (inputs.features, *inputs.blocks, bent):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    key = digest.digest()
    if key not in _remembered:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = learn(inputs, bent)
    return _remembered[key]


def _shape_prior(inputs: Inputs, bent: Floats) -> HyperPrior:
    prior = flat_prior(inputs.features.shape[1])
    if not len(bent) or len(inputs) < LEAST_CONFIGS:
        return prior
    fitted = []
    for index, own in enumerate(bent[:MAX_SIBLINGS]):
        chosen = _sample(own, index)
        basis = Basis(np.ones((len(chosen), 1)), np.zeros(1), np.zeros(1))
        fitted.append(_fitted(inputs.at(chosen), own[chosen], basis, prior))
    return HyperPrior(Hyper.of(np.mean(fitted, axis=0), len(BLOCKS)), prior.spread * SURE)


def _difference_prior(inputs: Inputs, bent: Floats) -> HyperPrior:
    lengths = np.append(flat_prior(inputs.features.shape[1]).mean.log_lengths, math.log(LENGTH_OF_MEAN))
    prior = _prior(lengths, AMPLITUDE_APART, NUGGET_APART, BLOCKS_APART)
    if len(bent) < 2 or len(inputs) < LEAST_CONFIGS:
        return prior
    fitted = []
    for index, own in enumerate(bent[:MAX_SIBLINGS]):
        others = np.delete(bent, index, axis=0)
        mean = others.mean(axis=0)
        chosen = _sample(np.minimum(mean, own), index)
        here = with_siblings(inputs, others).at(chosen)
        fitted.append(_fitted(here, own[chosen], basis_of(mean[chosen]), prior))
    return HyperPrior(
        Hyper.of(np.mean(fitted, axis=0), len(BLOCKS_APART)),
        np.concatenate([prior.spread[: len(lengths)] * SURE, np.ones(2 + len(BLOCKS_APART))]),
    )


def basis_of(mean: Floats) -> Basis:
    """Return a constant and the siblings' mean as basis functions; the mean's weight is near 1."""
    return Basis(np.column_stack([np.ones(len(mean)), mean]), np.array([0.0, 1.0]), np.array([0.0, SLOPE_SPREAD**-2]))


def _prior(lengths: Floats, amplitude: float, nugget: float, blocks: tuple[float, ...]) -> HyperPrior:
    mean = Hyper(lengths, math.log(amplitude), math.log(nugget), tuple(math.log(variance) for variance in blocks))
    return HyperPrior(mean, np.concatenate([np.ones(len(lengths) + 1), [1.5], np.ones(len(blocks))]))


def _fitted(inputs: Inputs, values: Floats, basis: Basis, prior: HyperPrior) -> Floats:
    fitter = Fitter(prior)
    fitter.run(inputs, values, basis, num_steps=NUM_STEPS)
    return fitter.best(inputs, values, basis).vector()


def _sample(bent: Floats, index: int) -> NDArray[np.intp]:
    """Choose configs to fit a sibling to, half of them among its best, where the search will be."""
    rng = np.random.default_rng(index)
    size = min(NUM_CONFIGS, len(bent))
    best = np.argsort(bent, kind="stable")[: 4 * size]
    return np.union1d(
        rng.choice(best, size=min(size // 2, len(best)), replace=False),
        rng.choice(len(bent), size=size // 2, replace=False),
    )
