"""What is known of a config before it runs, as numbers that a kernel function compares configs by.

A kernel's time is a product of what its parameters cost, so its logarithm is mostly a sum of functions of single
parameters, then of products of two, and only the rest needs a function of them all. A few measurements tell the terms
of a sum at every config, where a distance in ten parameters tells next to nothing about the far ones.

Source: Duvenaud, Nickisch and Rasmussen, "Additive Gaussian processes", NeurIPS 2011.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from agnitra_lab.refine.gaussian import Floats, Inputs
from agnitra_lab.refine.sampler import Problem
from agnitra_lab.refine.space import Encoding

LENGTH, SHARE_ALONE = 0.6, 0.2
"""Of the function of one parameter: its length over the range, and the share in which each value is for itself."""


def inputs_of(problem: Problem) -> Inputs:
    """Return coordinates and facts for the Matern kernel, and two blocks: of single parameters and of pairs."""
    return Inputs(_coordinates(problem), _blocks(problem.encoding))


def with_siblings(inputs: Inputs, bent: Floats) -> Inputs:
    """Add the siblings' mean as a feature, and a block in which each sibling has a weight of its own.

    Args:
        inputs: of all configs.
        bent: [siblings, configs], their bent logarithms of latency.
    """
    apart = bent - bent.mean(axis=0)
    block = _of_unit_variance([row[:, None] for row in apart - apart.mean(axis=1, keepdims=True)], len(inputs))
    return Inputs(np.column_stack([inputs.features, bent.mean(axis=0)]), (*inputs.blocks, block))


def _coordinates(problem: Problem) -> Floats:
    """[configs, features] in 0..1: the logarithms of the parameters, and what the compiler says."""
    encoding = problem.encoding
    values = np.array([[config.params[name] for name in encoding.names] for config in encoding.configs], dtype=float)
    values = values.reshape(len(encoding), len(encoding.names))
    # Ranks serve where logarithms do not: a negative value has none.
    logs = np.where(values.min(axis=0, initial=0.0) < 0, encoding.points, np.log2(np.maximum(values, 0.5)))
    varied = [(column - column.min()) / np.ptp(column) for column in logs.T if len(column) and np.ptp(column) > 0]
    facts = [*problem.facts.T] if len(problem.facts) else []
    features = np.array([*varied, *facts]).reshape(-1, len(encoding)).T
    return features if features.shape[1] else np.zeros((len(encoding), 1))


def _blocks(encoding: Encoding) -> tuple[Floats, Floats]:
    """[configs, functions] each: of single parameters, smooth along their ranks, and products of two ranks."""
    alone, slopes = [], []
    for column in encoding.ranks.T:
        ranks = np.unique(column, return_inverse=True)[1]
        num = int(ranks.max(initial=0)) + 1
        if num < 2:
            continue
        root = math.sqrt(5.0) / LENGTH * np.abs(np.subtract.outer(np.arange(num), np.arange(num))) / (num - 1)
        smooth = (1 + root + root**2 / 3) * np.exp(-root)
        functions = np.linalg.cholesky((1 - SHARE_ALONE) * smooth + SHARE_ALONE * np.eye(num))[ranks]
        alone.append(functions - functions.mean(axis=0))
        slopes.append((ranks - ranks.mean()) / ranks.std())
    pairs = [left * right for left, right in itertools.combinations(slopes, 2)]
    return (
        _of_unit_variance(alone, len(encoding)),
        _of_unit_variance([(pair - pair.mean())[:, None] for pair in pairs], len(encoding)),
    )


def _of_unit_variance(columns: list[Floats], num_configs: int) -> Floats:
    """Put functions side by side, scaled so that their sum has a prior variance of 1 at the mean config."""
    block = np.concatenate([np.zeros((num_configs, 0)), *columns], axis=1)
    variance = float((block**2).sum(axis=1).mean()) if block.shape[1] else 0.0
    return block / math.sqrt(variance) if variance > 0 else block
