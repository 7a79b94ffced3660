import itertools

import numpy as np
import pytest

from agnitra_lab.contracts.search import KernelConfig, Measurement, SearchSpace, Trial
from agnitra_lab.errors import SearchError, TemplateError, UsageError
from agnitra_lab.refine.finals import middle
from agnitra_lab.refine.search import Ahead, search

POINTS = [{"BLOCK_N": block, "num_warps": warps} for block, warps in itertools.product((1, 2, 4, 8), (1, 2, 4))]
SPACE = SearchSpace(
    template="any",
    shape=(8, 8),
    dtype="float32",
    params={"BLOCK_N": (1, 2, 4, 8), "num_warps": (1, 2, 4)},
    configs=tuple(KernelConfig(template="any", params=point) for point in POINTS),
)


def bowl(config: KernelConfig) -> float:
    return 1.0 + abs(config.params["BLOCK_N"] - 4) + abs(config.params["num_warps"] - 2)


@pytest.mark.parametrize("sampler", ["rl", "random"])
def test_a_search_of_the_whole_space_finds_the_optimum(sampler: str) -> None:
    result = search(SPACE, bowl, sampler=sampler, max_trials=100, measured_on="a device")
    assert result.best is not None
    assert result.best.config.params == {"BLOCK_N": 4, "num_warps": 2}
    assert result.stopped_because == "exhausted"
    assert len(result.trials) == result.num_configs == len(POINTS)
    assert result.measured_on == "a device"
    assert [trial.index for trial in result.trials] == list(range(len(POINTS)))


def test_a_search_stops_at_its_number_of_trials() -> None:
    result = search(SPACE, bowl, max_trials=5)
    assert (len(result.trials), result.stopped_because) == (5, "budget")


def test_a_search_out_of_time_keeps_its_first_trial() -> None:
    result = search(SPACE, bowl, budget_s=1e-9)
    assert (len(result.trials), result.stopped_because) == (1, "time")
    assert result.best is not None


def test_a_cancelled_search_keeps_what_it_has_and_measures_nothing_more() -> None:
    seen: list[Trial] = []
    calls: list[str] = []

    def measure(config: KernelConfig) -> float:
        calls.append(config.key())
        return bowl(config)

    result = search(SPACE, measure, on_trial=seen.append, should_stop=lambda: len(seen) >= 3)
    assert result.stopped_because == "cancelled"
    assert len(calls) == len(result.trials) == 3
    assert result.best == min(result.trials, key=lambda trial: trial.latency_ms or 0)


def test_a_search_cancelled_before_it_began_has_no_best() -> None:
    result = search(SPACE, bowl, should_stop=lambda: True)
    assert (result.trials, result.best, result.stopped_because) == ((), None, "cancelled")


def test_every_trial_is_announced_as_it_ends() -> None:
    seen: list[Trial] = []
    assert search(SPACE, bowl, max_trials=6, on_trial=seen.append).trials == tuple(seen)


@pytest.mark.parametrize("error", [TemplateError("too wide"), RuntimeError("out of shared memory"), ValueError("odd")])
def test_a_config_that_raises_is_a_failed_trial_that_says_why(error: Exception) -> None:
    def measure(config: KernelConfig) -> float:
        if config.params["BLOCK_N"] == 8:
            raise error
        return bowl(config)

    result = search(SPACE, measure, max_trials=100)
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert len(failed) == 3
    assert all(trial.latency_ms is None and str(error) in (trial.detail or "") for trial in failed)
    assert result.best is not None and result.best.config.params["BLOCK_N"] == 4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_no_latency_is_a_failed_trial(value: float) -> None:
    result = search(SPACE, lambda config: value if config == SPACE.configs[0] else bowl(config), max_trials=100)
    assert [trial.config for trial in result.trials if trial.status == "failed"] == [SPACE.configs[0]]


def test_an_interrupt_passes_through() -> None:
    def measure(config: KernelConfig) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(SPACE, measure)


def test_a_search_where_everything_fails_says_what_the_first_failure_was() -> None:
    def measure(config: KernelConfig) -> float:
        raise RuntimeError("no ptxas")

    with pytest.raises(SearchError, match=r"All 7 trials failed.*no ptxas"):
        search(SPACE, measure, max_trials=7)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(SearchError, match="no valid config"):
        search(SPACE.model_copy(update={"configs": ()}), bowl)


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'ppo'; known are cmaes, coordinate, .*, rl, tpe"):
        search(SPACE, bowl, sampler="ppo")


@pytest.mark.parametrize("limits", [{"max_trials": 0}, {"budget_s": 0.0}])
def test_limits_that_allow_no_trial_are_refused(limits: dict) -> None:
    with pytest.raises(UsageError, match="max_trials >= 1"):
        search(SPACE, bowl, **limits)


def test_a_lucky_first_measurement_does_not_win_the_finals() -> None:
    lucky, true_best = SPACE.configs[0], SPACE.configs[5]
    counts: dict[str, int] = {}

    def measure(config: KernelConfig) -> float:
        counts[config.key()] = counts.get(config.key(), 0) + 1
        if config == lucky:
            return 0.5 if counts[config.key()] == 1 else 3.0
        return 1.0 if config == true_best else 2.0

    result = search(SPACE, measure, max_trials=100)
    assert result.best is not None and result.best.config == true_best
    assert result.best.latency_ms == 1.0
    assert min(trial.latency_ms or 9.0 for trial in result.trials) == 0.5
    assert counts[true_best.key()] > 1 and counts[lucky.key()] > 1


def test_the_finalists_are_measured_in_turn() -> None:
    calls: list[str] = []

    def measure(config: KernelConfig) -> float:
        calls.append(config.key())
        return bowl(config)

    result = search(SPACE, measure, max_trials=6)
    finals = calls[len(result.trials) :]
    assert finals == [trial.config.key() for trial in result.finals]
    num = len(set(finals))
    assert finals[num : 2 * num] == finals[:num][::-1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_ten_percent_does_not_name_a_winner_that_is_five_percent_slower(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = {config.key(): 1.0 + 0.02 * index for index, config in enumerate(SPACE.configs)}
    result = search(SPACE, lambda config: truth[config.key()] * rng.lognormal(0, 0.1), max_trials=100)
    assert result.best is not None
    assert len(result.finals) > 20
    assert truth[result.best.config.key()] < 1.05


def test_exact_measurements_need_two_rounds_of_finals_and_no_more() -> None:
    result = search(SPACE, bowl, max_trials=100)
    assert len(result.finals) == 2 * len({trial.config.key() for trial in result.finals}) <= 6


def test_a_finalist_that_fails_the_second_time_is_out() -> None:
    counts: dict[str, int] = {}
    best = KernelConfig(template="any", params={"BLOCK_N": 4, "num_warps": 2})

    def measure(config: KernelConfig) -> float:
        counts[config.key()] = counts.get(config.key(), 0) + 1
        if config == best and counts[config.key()] > 1:
            raise RuntimeError("flaky")
        return bowl(config)

    result = search(SPACE, measure, max_trials=100)
    assert result.best is not None and result.best.config != best


def test_the_same_seed_repeats_the_search() -> None:
    runs = [[trial.config.key() for trial in search(SPACE, bowl, seed=4, max_trials=9).trials] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("max_trials", [1, 5, 100])
def test_configs_are_prepared_in_the_order_of_measuring_and_none_is_prepared_for_nothing(max_trials: int) -> None:
    prepared: list[str] = []
    measured: list[tuple[str, int]] = []

    def measure(config: KernelConfig) -> float:
        measured.append((config.key(), len(prepared) - len(measured)))
        return bowl(config)

    result = search(
        SPACE, measure, max_trials=max_trials,
        ahead=Ahead(lambda configs: prepared.extend(config.key() for config in configs), 4),
    )  # fmt: skip
    assert prepared == [trial.config.key() for trial in result.trials] == [key for key, _ in measured[: len(prepared)]]
    assert len(prepared) == min(max_trials, len(POINTS))
    assert max(num_waiting for _, num_waiting in measured) == min(4, max_trials)


def test_a_search_that_asks_ahead_finds_the_optimum_too(tmp_path) -> None:
    result = search(SPACE, bowl, ahead=Ahead(num_configs=5), max_trials=100, ledger=tmp_path / "ledger.jsonl")
    assert result.best is not None and result.best.config.params == {"BLOCK_N": 4, "num_warps": 2}
    assert result.stopped_because == "exhausted"


def test_a_search_that_asked_ahead_and_was_cut_off_measures_those_first_when_it_goes_on(tmp_path) -> None:
    asked: list[str] = []

    def measure(config: KernelConfig) -> float:
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(config.key())
        return bowl(config)

    waiting: list[str] = []
    ahead = Ahead(lambda configs: waiting.extend(config.key() for config in configs), 3)
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, measure, ahead=ahead, max_trials=12, ledger=tmp_path / "ledger.jsonl")
    in_flight = waiting[6:8]
    result = search(SPACE, bowl, ahead=ahead, max_trials=12, ledger=tmp_path / "ledger.jsonl")
    keys = [trial.config.key() for trial in result.trials]
    assert keys[:6] == asked
    assert keys[6:8] == in_flight
    assert len(set(keys)) == len(keys) == 12


def test_the_only_config_that_worked_is_named_without_finals() -> None:
    calls: list[str] = []

    def measure(config: KernelConfig) -> float:
        calls.append(config.key())
        if len(calls) != 2:
            raise RuntimeError("does not launch")
        return 3.0

    result = search(SPACE, measure, max_trials=4)
    assert result.best is not None and result.best.latency_ms == 3.0
    assert len(calls) == 4 and not result.finals


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_config_whose_sampling_ended_early_is_not_named_though_its_few_samples_are_lower(is_cancelled: bool) -> None:
    def measure(config: KernelConfig) -> Measurement:
        is_cut = config.params["num_warps"] == 4
        return Measurement(latency_ms=0.1 if is_cut else bowl(config), is_aborted=is_cut)

    trials: list[Trial] = []
    result = search(
        SPACE, measure, sampler="exhaustive", max_trials=100, on_trial=trials.append,
        should_stop=lambda: is_cancelled and len(trials) == 8,
    )  # fmt: skip
    assert any(trial.is_aborted for trial in result.trials)
    assert result.best is not None and not result.best.is_aborted
    assert not any(trial.is_aborted for trial in result.finals)


def test_a_time_at_two_steps_of_the_timer_is_between_them_and_strays_do_not_count() -> None:
    # By its median it would be at 4.0, and slower than a config that is always at 3.97.
    assert 3.9 < middle([3.84] * 9 + [4.0] * 11) < 3.97
    assert middle([3.84] * 9 + [4.0] * 9 + [5.0, 50.0]) < 3.97
    assert middle([5.2, 3.8, 5.3]) == 5.2
