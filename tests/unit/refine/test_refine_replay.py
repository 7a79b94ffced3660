"""Replaying a recorded landscape: the device's answers, its failures, and what they would have cost."""

from pathlib import Path

import pytest
from landscape_samples import older, small

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.refine import replay
from agnitra_lab.refine.bound import Bound
from agnitra_lab.refine.foreign import replayed
from agnitra_lab.refine.landscape_file import LandscapeFile
from agnitra_lab.refine.replay import Landscape, Replay
from agnitra_lab.refine.search import search


def config(block: int, warps: int, template: str = "rms_norm") -> KernelConfig:
    return KernelConfig(template=template, params={"BLOCK_N": block, "num_warps": warps})


@pytest.fixture
def landscape() -> Landscape:
    return Landscape(small())


def test_a_replayed_latency_is_the_recorded_median_in_milliseconds(landscape: Landscape) -> None:
    assert landscape.measure(config(8, 1)) == pytest.approx(0.004)
    assert landscape.measure(config(8, 2)) == pytest.approx(0.0031)
    assert landscape.samples_ms(config(8, 1)) == pytest.approx((0.004, 0.0042, 0.0038))
    assert landscape.measured_on == "recorded: NVIDIA H200"


def test_the_optimum_is_the_best_when_measured_again_and_not_the_luckiest_of_the_first_samples(
    landscape: Landscape,
) -> None:
    assert landscape.latency_ms[1] == landscape.latency_ms[2]
    assert landscape.optimum == config(16, 1)
    assert landscape.best_latency_ms == landscape.measure(landscape.optimum)
    assert landscape.again_ms(config(16, 1)) == pytest.approx((0.0032, 0.003))
    assert landscape.again_ms(config(8, 1)) == ()


def test_without_a_second_measurement_the_optimum_is_the_lowest_median() -> None:
    assert Landscape(older()).optimum == config(8, 2)


def test_a_recorded_failure_fails_again_with_its_class_and_reason(landscape: Landscape) -> None:
    with pytest.raises(TemplateError, match=r"out of memory.*shared memory"):
        landscape.measure(config(16, 2))
    assert landscape.failure_of(config(16, 2)) == ("oom", "out of resource: shared memory")
    assert landscape.failure_of(config(8, 1)) is None


@pytest.mark.parametrize("unknown", [config(32, 2), config(8, 1, "swiglu")])
def test_a_config_that_was_not_recorded_is_refused(landscape: Landscape, unknown: KernelConfig) -> None:
    with pytest.raises(TemplateError, match="was not recorded at 4x8 bfloat16 on NVIDIA H200"):
        landscape.measure(unknown)


def test_what_the_compiler_says_is_known_for_each_config_that_ran(landscape: Landscape) -> None:
    assert landscape.features[config(8, 2).key()] == {"n_regs": 64, "n_spills": 8, "shared_bytes": 256}
    assert config(16, 2).key() not in landscape.features
    assert Landscape(older()).features == {}


def test_the_clock_counts_compiling_once_and_measuring_each_time(landscape: Landscape) -> None:
    measure = Replay(landscape)
    assert measure(config(8, 1)) == landscape.measure(config(8, 1))
    assert measure.clock_s == pytest.approx(0.51)
    measure(config(8, 1))
    assert measure.clock_s == pytest.approx(0.52)


def test_a_recording_answers_the_same_whatever_the_best_is(landscape: Landscape) -> None:
    measure = replayed(landscape)
    found = measure(config(8, 1), bound=Bound((1e-6,) * 20))
    assert found == measure(config(8, 1), bound=Bound()) and not found.is_aborted


def test_a_failure_costs_its_compiling(landscape: Landscape) -> None:
    measure = Replay(landscape)
    with pytest.raises(TemplateError):
        measure(config(16, 2))
    assert measure.clock_s == pytest.approx(0.2)


def test_the_clock_is_unknown_where_nothing_of_it_was_recorded() -> None:
    measure = Replay(Landscape(older()))
    measure(config(8, 1))
    assert measure.clock_s is None


def test_a_search_runs_on_a_recording(landscape: Landscape) -> None:
    measure = Replay(landscape)
    result = search(landscape.space, measure, measured_on=landscape.measured_on)
    assert result.best is not None and result.best.latency_ms == landscape.best_latency_ms
    assert [trial.status for trial in result.trials].count("failed") == 1
    # All compiled once; finalists may be measured more than once.
    assert measure.clock_s is not None and measure.clock_s >= 0.5 + 0.3 + 0.7 + 0.2 + 0.06 - 1e-6


def filed(folder: Path, landscape: LandscapeFile) -> Path:
    path = folder / landscape.file_name()
    path.write_bytes(landscape.to_bytes())
    return path


def test_find_takes_the_asked_shape_or_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {shape: filed(tmp_path, small(shape)) for shape in ((4, 8), (4096, 8), (99, 8))}
    (tmp_path / "notes.npz").touch()
    monkeypatch.setattr(replay, "_recordings", lambda: sorted(tmp_path.glob("*.npz")))
    assert replay.find("rms_norm", (4, 8)) == paths[4, 8]
    assert replay.find("rms_norm") == paths[4096, 8]
    assert replay.find("rms_norm", (5, 8)) is None
    assert replay.find("swiglu") is None
    assert replay.nearest("rms_norm", (2048, 8)) == paths[4096, 8]
    assert replay.nearest("rms_norm", (2048, 8, 8)) is None
    assert replay.every() == sorted(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("path", replay.every(), ids=lambda path: path.stem)
def test_every_committed_recording_can_be_loaded_and_found(path: Path) -> None:
    landscape = replay.load(path)
    assert path.name == landscape.recorded.file_name()
    assert replay.find(landscape.template, landscape.shape) is not None
    assert landscape.measure(landscape.optimum) == landscape.best_latency_ms
    # Of many that cost the same one has the lowest median by luck; it cannot be far from the optimum.
    assert 0.97 * landscape.best_latency_ms <= min(landscape.latency_ms[landscape.latency_ms > 0])


def test_at_least_four_kernel_families_have_three_complete_landscapes_of_500_configs() -> None:
    sizes: dict[str, list[int]] = {}
    for path in replay.every():
        landscape = replay.load(path)
        if landscape.features and landscape.compile_s(landscape.optimum) is not None:
            sizes.setdefault(landscape.template, []).append(len(landscape.space.configs))
    whole = [found for found in sizes.values() if len(found) >= 3 and min(found) >= 500]
    assert len(whole) >= 4
