import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.refine.bandit import Bandit, posterior, quadratic_features


def line_space(num_values: int) -> SearchSpace:
    values = tuple(2**power for power in range(num_values))
    configs = tuple(KernelConfig(template="any", params={"BLOCK_N": value}) for value in values)
    return SearchSpace(template="any", shape=(1,), dtype="float32", params={"BLOCK_N": values}, configs=configs)


def test_the_posterior_mean_recovers_a_quadratic_surface() -> None:
    rng = np.random.default_rng(0)
    features = quadratic_features(rng.random((60, 3)))
    weights = rng.standard_normal(features.shape[1])
    mean, _ = posterior(features, features @ weights)
    assert np.abs(features @ (mean - weights)).max() < 0.1


def test_the_posterior_grows_certain_with_observations() -> None:
    rng = np.random.default_rng(1)
    features = quadratic_features(rng.random((80, 2)))
    targets = features @ rng.standard_normal(features.shape[1])
    spread = [float(np.trace(root @ root.T)) for _, root in (posterior(features[:n], targets[:n]) for n in (5, 80))]
    assert spread[1] < spread[0] / 2


@given(st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_a_constant_coordinate_adds_no_feature(num_varied: int, num_points: int) -> None:
    points = np.random.default_rng(num_points).random((num_points + 1, num_varied))
    widened = np.column_stack([points, np.zeros(len(points))])
    assert np.array_equal(quadratic_features(points), quadratic_features(widened))


def test_the_bandit_leaves_the_side_where_configs_fail() -> None:
    space = line_space(16)
    bandit = Bandit(space, seed=0)
    late: list[int] = []
    for step in range(12):
        config = bandit.ask()
        assert config is not None
        rank = config.params["BLOCK_N"].bit_length() - 1
        if step >= 6:
            late.append(rank)
        bandit.tell(config, None if rank >= 10 else 1.0 + 0.1 * abs(rank - 4))
    assert sum(rank < 10 for rank in late) > sum(rank >= 10 for rank in late)


def test_the_bandit_lives_with_equal_latencies() -> None:
    bandit, asked = Bandit(line_space(8), seed=0), set()
    while (config := bandit.ask()) is not None:
        asked.add(config.key())
        bandit.tell(config, 2.0)
    assert len(asked) == 8
