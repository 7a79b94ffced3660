"""Importance: what decides the time is named, what does not gets nothing, and too little evidence claims nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import KernelConfig, Trial
from agnitra_lab.refine import replay
from agnitra_lab.refine.importance import LEAST_TRIALS, importance

TILES, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)


def trials_of(time_of, num=40, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for index in range(num):
        params = {
            "TILE": int(rng.choice(TILES)),
            "num_stages": int(rng.choice(STAGES)),
            "num_warps": int(rng.choice(WARPS)),
        }
        config = KernelConfig(template="t", params=params)
        made.append(Trial(index=index, config=config, latency_ms=time_of(params, rng)))
    return made


def test_the_parameter_that_decides_takes_all():
    found = importance(trials_of(lambda params, _: 0.01 * params["num_warps"]))
    assert found.effects[0].name == "num_warps"
    assert found.effects[0].share > 0.99
    assert found.explained > 0.95
    assert found.effects[0].best == 1


def test_factors_are_those_of_the_time():
    found = importance(trials_of(lambda params, _: 0.01 * params["num_warps"], num=200))
    factors = next(effect.factors for effect in found.effects if effect.name == "num_warps")
    assert factors[8] / factors[1] == pytest.approx(8.0, rel=0.02)


def test_noise_alone_is_no_importance():
    claimed = [
        bool(importance(trials_of(lambda _, rng: float(np.exp(0.1 * rng.normal())), seed=seed)).effects)
        for seed in range(30)
    ]
    assert sum(claimed) <= 4


def test_too_few_trials_and_equal_times_claim_nothing():
    few = trials_of(lambda params, _: 0.01 * params["num_warps"], num=LEAST_TRIALS - 1)
    assert importance(few).effects == ()
    assert importance(trials_of(lambda *_: 0.01)).effects == ()
    assert importance([]).effects == ()


def test_failed_trials_and_constant_parameters_say_nothing():
    trials = trials_of(lambda params, _: 0.01 * params["num_warps"])
    config = KernelConfig(template="t", params={"TILE": 512, "num_stages": 9, "num_warps": 16})
    failed = Trial(index=99, config=config, latency_ms=None, status="failed", failure="oom")
    assert importance([*trials, failed]) == importance(trials)
    fixed = [
        trial.model_copy(update={"config": KernelConfig(template="t", params={**trial.config.params, "SPLIT": 1})})
        for trial in trials
    ]
    assert [effect.name for effect in importance(fixed).effects] == [e.name for e in importance(trials).effects]


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_neither_the_unit_nor_the_order_of_trials_matters(scale, seed):
    def time_of(params, rng):
        return 0.01 * params["num_warps"] * params["TILE"] ** 0.3 * float(np.exp(0.02 * rng.normal()))

    trials = trials_of(time_of, seed=seed)
    scaled = [trial.model_copy(update={"latency_ms": trial.latency_ms * scale}) for trial in reversed(trials)]
    first, second = importance(trials), importance(scaled)
    assert [effect.name for effect in first.effects] == [effect.name for effect in second.effects]
    assert first.explained == pytest.approx(second.explained, abs=1e-6)
    assert math.isclose(sum(effect.share for effect in first.effects), 1.0, abs_tol=1e-9)
    assert all(0.0 <= effect.share <= 1.0 for effect in first.effects)


def test_few_trials_name_what_the_whole_recording_names():
    landscape = replay.load(replay.find("decode_attention", (1, 8, 4, 8192, 128)))
    everything = [
        Trial(index=index, config=config, latency_ms=landscape.measure(config))
        for index, config in enumerate(landscape.space.configs)
        if landscape.failure_of(config) is None
    ]
    truth = importance(everything)
    assert (truth.effects[0].name, truth.effects[0].share > 0.8) == ("SPLIT", True)
    rng = np.random.default_rng(0)
    found = [importance([everything[at] for at in rng.permutation(len(everything))[:40]]) for _ in range(20)]
    named = [some.effects[0].name for some in found if some.effects]
    assert len(named) >= 18
    assert named.count("SPLIT") >= 18
