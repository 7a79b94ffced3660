"""Kernel configs in a process of their own: what hangs or dies there is named, and the next is measured at once."""

import threading
import time
from pathlib import Path

import pytest
import torch

from agnitra_lab.benchmark.worker import Worker
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.device.exclusive import take_turns, waited_s
from agnitra_lab.errors import SearchError
from agnitra_lab.generate import registry
from agnitra_lab.loop import compilers, kernel_jobs, kernel_lab
from agnitra_lab.refine.search import search

SITE = Site("rms_norm", (16, 64), "float32")


def config(block_n: int) -> KernelConfig:
    return KernelConfig(template="rms_norm", params={"BLOCK_N": block_n})


@pytest.fixture(autouse=True)
def _jobs(monkeypatch, tmp_path):
    for module in (kernel_lab, compilers):
        monkeypatch.setattr(module, "_JOBS", str(Path(__file__).with_name("kernel_lab_jobs.py")))
    monkeypatch.setattr(kernel_lab, "_DEADLINE_S", 1.0)
    monkeypatch.setattr(kernel_lab, "_COMPILE_DEADLINE_S", 2.0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lab():
    opened = kernel_lab.KernelLab(torch.device("cpu"))
    yield opened
    opened.close()


@pytest.fixture
def lab_with_compilers():
    opened = kernel_lab.KernelLab(torch.device("cpu"), num_compilers=1)
    yield opened
    opened.close()


@pytest.mark.parametrize(("block_n", "status"), [(1, "timeout"), (2, "crash")])
def test_the_next_config_is_measured_within_ten_seconds_of_one_that_hangs_or_dies(lab, block_n, status):
    measure = lab.measure(SITE)
    with pytest.raises(SearchError, match=status):
        measure(config(block_n))
    started_s = time.monotonic()
    assert measure(config(8)).latency_ms == 0.25
    assert time.monotonic() - started_s < 10
    assert [outcome.name for outcome in lab.casualties] == [config(block_n).key()]


def test_a_process_that_takes_the_place_of_another_starts_before_its_first_measurement(lab, tmp_path):
    (tmp_path / "slow").touch()
    measure = lab.measure(SITE)
    with pytest.raises(SearchError, match="crash"):
        measure(config(2))
    assert measure(config(8)).latency_ms == 0.25
    assert len(lab.casualties) == 1


def test_what_is_compiled_where_it_is_measured_has_the_time_for_both(lab):
    assert lab.measure(SITE)(config(3)).latency_ms > 0


def test_a_compiled_config_hangs_after_the_time_of_a_measurement(lab_with_compilers):
    lab_with_compilers.prepare(SITE, [config(1)])
    while not Path("compiled").exists():
        time.sleep(0.01)
    started_s = time.monotonic()
    with pytest.raises(SearchError, match="timeout"):
        lab_with_compilers.measure(SITE)(config(1))
    assert time.monotonic() - started_s < kernel_lab._DEADLINE_S + kernel_lab._COMPILE_DEADLINE_S


def test_waiting_for_a_turn_at_the_device_does_not_count_as_a_hanging_kernel(lab, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    measure = lab.measure(SITE)
    measure(config(8))
    others = (tmp_path / "device.lock").open("w")
    take_turns(tmp_path / "device.lock")
    try:
        fcntl.flock(others, fcntl.LOCK_EX)
        threading.Timer(1.5 * kernel_lab._DEADLINE_S, lambda: fcntl.flock(others, fcntl.LOCK_UN)).start()
        assert measure(config(8)).latency_ms == 0.25
        assert waited_s() > kernel_lab._DEADLINE_S
    finally:
        take_turns(None)
        others.close()


def test_a_wrong_result_is_a_failed_trial_and_costs_no_process(lab):
    measure = lab.measure(SITE)
    with pytest.raises(SearchError, match="another result"):
        measure(config(4))
    assert lab.casualties == []
    assert measure(config(8)).latency_ms == 0.25


def test_without_processes_that_compile_nothing_is_asked_ahead(lab):
    assert lab.ahead(SITE).num_configs == 1
    lab.prepare(SITE, [config(8)])
    assert lab.measure(SITE)(config(8)).latency_ms == 0.25


def test_a_config_that_is_being_compiled_is_measured_once_it_is(lab_with_compilers):
    lab_with_compilers.prepare(SITE, [config(8), config(16)])
    while not Path("compiled").exists():
        time.sleep(0.01)
    assert lab_with_compilers.measure(SITE)(config(16)).latency_ms == 0.5
    lines = Path("compiled").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["8", "16"]


def test_what_nobody_has_begun_to_compile_is_not_waited_for(lab_with_compilers):
    lab_with_compilers.prepare(SITE, [config(block_n) for block_n in range(8, 40)])
    assert lab_with_compilers.measure(SITE)(config(39)).latency_ms > 1
    lab_with_compilers.close()
    compiled = Path("compiled").read_text() if Path("compiled").exists() else ""
    assert "39 " not in compiled


def test_closing_does_not_wait_for_what_is_being_compiled(lab_with_compilers):
    lab_with_compilers.prepare(SITE, [config(block_n) for block_n in range(8, 400)])
    started_s = time.monotonic()
    lab_with_compilers.close()
    assert time.monotonic() - started_s < 10


def test_a_timing_in_the_worker_collects_nothing_that_was_there_before_it():
    with Worker() as worker:
        assert worker.run("agnitra_lab.loop.kernel_jobs:warm", ("cpu",), name="start", deadline_s=60).status == "ok"
        assert worker.run("gc:get_freeze_count", name="count", deadline_s=10).value > 10_000


def space_of(*blocks: int) -> SearchSpace:
    return SearchSpace(
        template=SITE.template, shape=SITE.shape, dtype=SITE.dtype, params={"BLOCK_N": blocks},
        configs=tuple(map(config, blocks)),
    )  # fmt: skip


def test_the_worker_is_told_the_samples_of_the_best_and_finalists_are_sampled_in_full(lab):
    result = search(space_of(64, 8, 128, 16), lab.measure(SITE), sampler="exhaustive", max_trials=4)
    assert [(trial.is_aborted, len(trial.samples_ms)) for trial in result.trials] == [
        (False, 20), (False, 20), (True, 3), (True, 3)
    ]  # fmt: skip
    assert not any(trial.is_aborted for trial in result.finals)
    assert result.best is not None and result.best.config == config(8)


class Sleeper:
    """A right kernel that takes as many tenths of a millisecond as its block is wide."""

    def __init__(self, config):
        self.config, self.num_calls = config, 0

    def call(self, *arguments, **options):
        self.num_calls += 1
        time.sleep(self.config.params["BLOCK_N"] / 1e4)
        return registry.load(SITE.template).reference(*arguments, **options)


def test_of_a_slow_config_few_samples_are_taken_and_of_a_fast_one_all(monkeypatch):
    kernels = {}

    def rendered(config):
        return kernels.setdefault(config.key(), Sleeper(config))

    def measure(config, *, bound):
        return kernel_jobs.measure(SITE, config, "cpu", bound=bound)

    monkeypatch.setattr(kernel_jobs, "render", rendered)
    trials = []
    search(
        space_of(10, 90, 1), measure, sampler="exhaustive", max_trials=3, on_trial=trials.append,
        should_stop=lambda: len(trials) == 3,
    )  # fmt: skip
    first, slow, fast = trials
    assert (first.is_aborted, slow.is_aborted, fast.is_aborted) == (False, True, False)
    # Once for its answer, twice before the first sample.
    assert kernels[slow.config.key()].num_calls == 3 + len(slow.samples_ms) < 10
    assert min(len(first.samples_ms), len(fast.samples_ms)) > len(slow.samples_ms)
    assert slow.status == "ok" and slow.detail.startswith("slower than the best beyond doubt after ")
