"""Measured advice: every timing is handed on once, failures too, and no budget is overrun."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile, WorkloadType
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, Measurement
from agnitra_lab.contracts.telemetry import Behavior, GpuTelemetry, OpEvent, TelemetryRecord
from agnitra_lab.errors import SearchError
from agnitra_lab.llm.recorded import RecordedClient
from agnitra_lab.loop.advice import Advice, Place, kernel_sites, replayed
from agnitra_lab.loop.chooser import clock_s
from agnitra_lab.refine.bound import Bound, sampled
from agnitra_lab.refine.search import search
from agnitra_lab.suggest.budget import Limits
from agnitra_lab.suggest.rounds import Rounds

H200 = DeviceInfo(type="cuda", name="NVIDIA H200", arch="sm90", num_multiprocessors=132)
NORM = Site("rms_norm", (4096, 2048), "bfloat16")
RECORD = TelemetryRecord(
    bottleneck=None,
    events=(OpEvent(op="aten::addmm", latency_ms=8.0, cpu_ms=8.0, device_ms=None, num_calls=4, share=0.8),),
    gpu=GpuTelemetry(), behavior=Behavior(), wall_ms=10.0,
)  # fmt: skip
PROFILE = WorkloadProfile(workload_type=WorkloadType.UNKNOWN, patterns=(), confidence=0.5)


class Device:
    """Counts what it is asked for; times fall with the warps, one number of warps fails."""

    def __init__(self, place: Place, fails: int = 0) -> None:
        self.asked: list[str] = []
        self.fails = fails
        self.place = Place(place.site, place.space, self.measure)

    def measure(self, config) -> float:
        self.asked.append(config.key())
        if config.params["num_warps"] == self.fails:
            raise SearchError("timeout: 20 s")
        return 1.0 / config.params["num_warps"] / config.params["ROWS_PER_PROGRAM"]


def advised(*choices: int, fails: int = 0, **limits) -> tuple[Advice, Device]:
    """Advice that proposes these configs of the space, one a round, and where they are measured."""
    place = replayed(NORM)
    (site,) = kernel_sites([NORM], is_measured=False, has_adviser=True)
    latencies = {"target_latency_ms": 8.0, "expected_latency_ms": 9.0, "rationale": "Try."}
    replies = [
        {
            "suggestions": [
                {"action": "rms_norm", "site": site.key, "params": place.space.configs[i].params, **latencies}
            ]
        }
        for i in choices
    ]
    rounds = Rounds(
        RECORD, PROFILE, H200, sites=(site,), client=RecordedClient(replies),
        limits=Limits(**{"configs_per_round": 4, "min_gain": 0.0, **limits}),
    )  # fmt: skip
    rounds.ask()
    return Advice(rounds), Device(place, fails)


def converse(advice: Advice, device: Device, *, seconds: float = 60.0, max_trials: int = 24) -> None:
    advice.converse({NORM.key(): device.place}, until_s=clock_s() + seconds, max_trials=max_trials)


def test_presets_and_choices_are_measured_once_each_and_lead_the_search_fastest_first():
    advice, device = advised(0, 30)
    converse(advice, device)
    assert len(set(device.asked)) == len(device.asked) == advice.num_measured >= 5
    seeds = advice.seeds(NORM)
    assert [trial.config.key() for trial in advice.trials(NORM)] == device.asked
    assert [config.key() for config in seeds[: advice.num_measured]] == sorted(
        device.asked, key=lambda key: next(device.measure(c) for c in seeds if c.key() == key)
    )


def test_a_timing_is_given_out_once_and_then_measured_again():
    advice, device = advised(0)
    converse(advice, device)
    config = advice.seeds(NORM)[0]
    measure, before = advice.remembering(NORM, device.measure), len(device.asked)
    assert measure(config).latency_ms == device.place.measure(config)
    assert len(device.asked) == before + 1
    measure(config)
    assert len(device.asked) == before + 2


def test_a_failure_is_remembered_as_one_and_costs_no_second_try():
    advice, device = advised(0, fails=16)
    converse(advice, device)
    failed = next(key for key in device.asked if "num_warps=16" in key)
    config = next(c for c in device.place.space.configs if c.key() == failed)
    measure, before = advice.remembering(NORM, device.measure), len(device.asked)
    with pytest.raises(SearchError, match="timeout"):
        measure(config)
    assert len(device.asked) == before


def test_a_measure_that_ends_hopeless_configs_early_still_does_with_what_is_remembered():
    advice, device = advised(0)
    converse(advice, device)
    bounds: list[Bound] = []

    def measure(config: KernelConfig, *, bound: Bound) -> Measurement:
        bounds.append(bound)
        latency_ms, samples_ms, is_aborted = sampled(lambda: device.place.measure(config), bound, num_samples=10)
        return Measurement(latency_ms=latency_ms, samples_ms=samples_ms, is_aborted=is_aborted)

    remembered = {trial.config.key() for trial in advice.trials(NORM)}
    measure_or_remember = advice.remembering(NORM, measure)
    result = search(
        device.place.space, measure_or_remember, seeds=advice.seeds(NORM), sampler="exhaustive", max_trials=40
    )
    asked = [trial for trial in result.trials if trial.config.key() not in remembered]
    assert remembered and asked and any(bound.samples_ms for bound in bounds)
    assert any(trial.is_aborted and len(trial.samples_ms) < 10 for trial in asked)


def test_no_time_measures_nothing_and_asks_nothing():
    advice, device = advised(0, 30)
    converse(advice, device, seconds=-1.0)
    assert (device.asked, len(advice.rounds.rounds)) == ([], 1)


def test_a_site_takes_no_more_than_the_searchs_own_measurements():
    advice, device = advised(0, 30, 31, 32)
    converse(advice, device, max_trials=3)
    assert len(device.asked) == 3


def test_a_site_that_is_measured_nowhere_is_left_alone():
    advice, device = advised(0)
    advice.converse({}, until_s=clock_s() + 60.0, max_trials=24)
    assert device.asked == []
    assert advice.rounds.stopped_because == "no_feedback"


def test_sites_with_one_search_space_are_asked_about_once_and_unknown_ones_not_at_all():
    sites = [NORM, Site("rms_norm", (4095, 2048), "bfloat16"), Site("cumsum", (4, 4), "float32")]
    assert [site.key for site in kernel_sites(sites, is_measured=False, has_adviser=False)] == [NORM.key()]


def test_a_site_on_a_device_has_its_roofline_and_the_recording_as_a_sibling():
    (site,) = kernel_sites([Site("rms_norm", (8192, 2048), "bfloat16")], is_measured=True, has_adviser=True)
    assert site.bytes_moved == 4 * 8192 * 2048 * 2
    assert site.device is None
    assert "recorded on NVIDIA H200" in site.siblings[0].label
    assert len(site.siblings[0].trials) > 50
    (plain,) = kernel_sites([Site("rms_norm", (8192, 2048), "bfloat16")], is_measured=True, has_adviser=False)
    assert plain.siblings == ()
