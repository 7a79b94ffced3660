"""The gymnasium environment keeps gymnasium's own rules, and its rewards sum to what the search gained."""

import itertools
import math

import pytest

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.errors import SearchError, UsageError
from agnitra_lab.refine.environment import FAILURE_REWARD, make_environment

gymnasium = pytest.importorskip("gymnasium")

PARAMS = {"BLOCK": (1, 2, 4, 8), "warps": (1, 2, 4)}
SPACE = SearchSpace(
    template="any", shape=(8,), dtype="float32", params=PARAMS,
    configs=tuple(
        KernelConfig(template="any", params=dict(zip(PARAMS, values, strict=True)))
        for values in itertools.product(*PARAMS.values())
    ),
)  # fmt: skip


def bowl(config: KernelConfig) -> float:
    if config.params["warps"] == 4:
        raise RuntimeError("out of shared memory")
    return 1.0 + abs(config.params["BLOCK"] - 4)


def test_it_passes_the_checker_of_gymnasium() -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(make_environment(SPACE, bowl), skip_render_check=True)


def test_the_rewards_of_an_episode_sum_to_the_logarithm_of_its_gain() -> None:
    env = make_environment(SPACE, bowl, max_trials=20)
    _, info = env.reset(seed=0)
    rewards, is_done, action = [], False, 0
    while not is_done:
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        action, is_done = action + 1, terminated or truncated
    assert sum(rewards) == pytest.approx(math.log(4.0 / 1.0) + 4 * FAILURE_REWARD)
    assert not info["action_mask"].any() and terminated


def test_a_config_that_was_measured_before_costs_a_step_and_teaches_nothing() -> None:
    calls: list[str] = []
    env = make_environment(SPACE, lambda config: calls.append(config.key()) or 1.0, max_trials=2)
    env.reset()
    env.step(3)
    _, reward, _, truncated, info = env.step(3)
    assert (len(calls), reward, truncated) == (1, 0.0, True)
    assert info["action_mask"][3] == 0 and info["action_mask"].sum() == 11


def test_what_allows_no_step_is_refused() -> None:
    with pytest.raises(SearchError, match="no valid config"):
        make_environment(SPACE.model_copy(update={"configs": ()}), bowl)
    with pytest.raises(UsageError, match="max_trials"):
        make_environment(SPACE, bowl, max_trials=0)
    env = make_environment(SPACE, bowl)
    env.reset()
    with pytest.raises(UsageError, match="no action 99"):
        env.step(99)
