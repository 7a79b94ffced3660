"""The refine stage over a graph's sites: what is known is taken, the rest searched, nothing untried is installed."""

from functools import partial

import pytest

pytest.importorskip("triton")

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile, WorkloadType
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.telemetry import Behavior, GpuTelemetry, TelemetryRecord
from agnitra_lab.errors import SearchError
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.loop import refinement
from agnitra_lab.loop.advice import Advice, kernel_sites
from agnitra_lab.loop.refinement import Refinement
from agnitra_lab.loop.settings import Settings
from agnitra_lab.refine.search import Ahead
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.rounds import Rounds

H200 = DeviceInfo(type="cuda", name="NVIDIA H200", torch_version="2.11.0", triton_version="3.6.0")
PROFILE = WorkloadProfile(workload_type=WorkloadType.UNKNOWN, patterns=(), confidence=0.5)
RECORD = TelemetryRecord(bottleneck=None, events=(), gpu=GpuTelemetry(), behavior=Behavior(), wall_ms=10.0)
NORM_KEY = (4096, 2048), "bfloat16"
NORM, GATE = Site("rms_norm", (4096, 2048), "bfloat16"), Site("swiglu", (4096, 5632), "bfloat16")


class Lab:
    """Answers in place of a device: a time that falls with the number of warps, or a failure."""

    def __init__(self, fails=(), library_lead_ms=None):
        self.fails, self.library_lead_ms, self.measured, self.prepared = fails, library_lead_ms, [], []

    def library_ms(self, site):
        best_ms = min(1.0 / config.params["num_warps"] for at, config in self.measured if at == site)
        return None if self.library_lead_ms is None else best_ms - self.library_lead_ms

    def prepare(self, site, configs):
        self.prepared.append((site, list(configs), len(self.measured)))

    def ahead(self, site):
        return Ahead(partial(self.prepare, site), 2)

    def measure(self, site):
        def measured(config):
            self.measured.append((site, config))
            if site.template in self.fails:
                raise SearchError("crash: the process ended with SIGSEGV")
            return 1.0 / config.params["num_warps"]

        return measured


@pytest.fixture(autouse=True)
def with_a_device(monkeypatch):
    monkeypatch.setattr(refinement, "why_no_kernels", lambda: None)


def refine(tmp_path, lab, *sites, **settings):
    chosen = Settings(tuned_folder=tmp_path, **{"max_trials": 6, "budget_s": 60.0, **settings})
    stage = Refinement(chosen, H200, lab, ())
    results, notes = stage.run(sites)
    return stage, results, notes


def test_a_second_run_takes_what_the_first_one_found_and_measures_nothing(tmp_path):
    first, _, _ = refine(tmp_path, Lab(), NORM)
    lab = Lab()
    second, results, notes = refine(tmp_path, lab, NORM)
    assert second.tuned == first.tuned
    assert (lab.measured, results) == ([], [])
    assert "found by an earlier run" in notes[0]


def test_what_each_search_begins_with_is_compiled_before_the_first_of_them_begins(tmp_path):
    lab = Lab()
    refine(tmp_path, lab, NORM, GATE)
    firsts = {site: configs for site, configs, num_measured in lab.prepared if num_measured == 0 and len(configs) == 1}
    assert set(firsts) == {NORM, GATE}
    for site, (config,) in firsts.items():
        assert next(measured for at, measured in lab.measured if at == site) == config


def test_where_only_neighbours_show_what_a_config_costs_the_rule_of_thumb_is_measured_and_taken(tmp_path):
    lab, step = Lab(), Site("skinny_gemm", (1, 11264, 2048), "bfloat16")
    stage, _, _ = refine(tmp_path, lab, step, Site("skinny_gemm", (16, 4096, 4096), "bfloat16"))
    rule = default_config(step.template, step.shape, step.dtype)
    assert [config.key() for site, config in lab.measured if site == step] == [rule.key()]
    assert stage.tuned[step] == rule
    assert len({config.key() for site, config in lab.measured if site != step}) > 1


def test_a_run_that_is_not_to_start_warm_searches_again(tmp_path):
    refine(tmp_path, Lab(), NORM)
    lab = Lab()
    refine(tmp_path, lab, NORM, is_warm=False)
    assert lab.measured


def test_a_site_where_everything_fails_is_refused_and_the_next_one_searched(tmp_path):
    stage, _, notes = refine(tmp_path, Lab(fails=("rms_norm",)), NORM, GATE)
    assert set(stage.refused) == {NORM}
    assert set(stage.tuned) == {GATE}
    assert "SIGSEGV" in notes[0]


def test_where_the_library_is_faster_by_more_than_a_launch_the_site_keeps_its_own_op_in_later_runs_too(tmp_path):
    step = Site("skinny_gemm", (4, 2048, 2048), "bfloat16")
    stage, _, notes = refine(tmp_path, Lab(library_lead_ms=0.003), step)
    assert (set(stage.refused), stage.tuned) == ({step}, {})
    assert "the library" in stage.refused[step]
    assert "; the library takes" in notes[0]
    later, results, notes = refine(tmp_path, Lab(), step)
    assert (set(later.refused), later.tuned, results) == ({step}, {}, [])
    assert "the library was faster in an earlier run" in notes[0]
    assert later.find(step) is None


def test_a_kernel_may_take_as_much_longer_than_the_library_as_the_launch_that_it_spares(tmp_path):
    step = Site("skinny_gemm", (4, 2048, 2048), "bfloat16")
    stage, _, _ = refine(tmp_path, Lab(library_lead_ms=0.001), step)
    assert (stage.refused, set(stage.tuned)) == ({}, {step})


def test_without_budget_the_rule_of_thumb_is_still_tried_before_it_is_used(tmp_path):
    lab = Lab()
    stage, _, _ = refine(tmp_path, lab, NORM, budget_s=1e-6)
    rule = default_config(NORM.template, NORM.shape, NORM.dtype)
    assert {config for _, config in ((site, config.key()) for site, config in lab.measured)} == {rule.key()}
    assert stage.tuned == {NORM: rule}


def test_without_budget_the_first_preset_is_tried_where_the_suggest_stage_ranked_some(tmp_path):
    (site,) = kernel_sites([NORM], is_measured=True, has_adviser=False)
    rounds = Rounds(RECORD, PROFILE, H200, sites=(site,))
    rounds.ask()
    lab, chosen = Lab(), Settings(tuned_folder=tmp_path, max_trials=6, budget_s=1e-6)
    stage = Refinement(chosen, H200, lab, (), Advice(rounds))
    stage.run([NORM])
    first = ranked(site.space, H200)[0]
    assert {config.key() for _, config in lab.measured} == {first.key()}
    assert stage.tuned == {NORM: first}


def test_a_site_that_only_candidates_with_fewer_changes_have_waits_until_one_of_them_asks_for_it(tmp_path):
    lab = Lab()
    stage = Refinement(Settings(tuned_folder=tmp_path, max_trials=6, budget_s=60.0), H200, lab, ())
    _, notes = stage.run([GATE, NORM], apart={NORM})
    assert {site for site, _ in lab.measured} == {GATE}
    assert "measured when one of these is tried" in notes[-1]
    rule = default_config("rms_norm", *NORM_KEY)
    assert stage.find(NORM) == rule
    assert [config for site, config in lab.measured if site == NORM] == [rule]
    assert stage.tuned[NORM] == rule
    assert [result.space_template for result in stage.found_late] == ["rms_norm"]


def test_what_an_earlier_run_found_for_such_a_site_is_taken_without_being_asked_for(tmp_path):
    found, _, _ = refine(tmp_path, Lab(), NORM)
    lab = Lab()
    stage = Refinement(Settings(tuned_folder=tmp_path, max_trials=6, budget_s=60.0), H200, lab, ())
    stage.run([NORM], apart={NORM})
    assert stage.tuned == found.tuned
    assert lab.measured == []


def test_such_a_site_where_the_rule_of_thumb_fails_gets_no_kernel(tmp_path):
    stage = Refinement(Settings(tuned_folder=tmp_path, budget_s=60.0), H200, Lab(fails=("rms_norm",)), ())
    stage.run([NORM], apart={NORM})
    assert stage.find(NORM) is None
    assert set(stage.refused) == {NORM}


def test_a_rule_of_thumb_that_was_merely_measured_is_searched_where_it_stands(tmp_path):
    first = Refinement(Settings(tuned_folder=tmp_path, max_trials=6, budget_s=60.0), H200, Lab(), ())
    first.run([NORM], apart={NORM})
    first.find(NORM)
    again = Lab()
    _, _, notes = refine(tmp_path, again, NORM)
    assert len(again.measured) > 1
    assert "found by an earlier run" not in notes[0]
