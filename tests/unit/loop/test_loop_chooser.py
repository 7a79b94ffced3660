"""The contest within a budget: what is tried, what is skipped and why, and that the best so far stands throughout."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence, Latency, Ratio
from agnitra_lab.errors import PatchError
from agnitra_lab.loop import chooser as chooser_module
from agnitra_lab.loop.chooser import Chooser
from agnitra_lab.loop.rehearsal import Rehearsed
from agnitra_lab.patch.candidates import Plan

ACTIONS = ("cuda_graph", "qkv_concat", "rms_norm", "max_autotune")


class Built:
    """What the chooser needs of a patch."""

    def __init__(self, name, is_whole=True, found=ACTIONS):
        self.name, self.is_whole, self.is_discarded = name, is_whole, False
        descriptors = [SimpleNamespace(action=action) for action in found]
        self._log = SimpleNamespace(compile_s=0.1, descriptors=descriptors)

    def log(self):
        return self._log

    def discard(self):
        self.is_discarded = True


def result_of(name, latency_ms, verdict="faster", eager_kernels_ms=None):
    ratio = Ratio(median=10 / latency_ms, low=10 / latency_ms, high=10 / latency_ms)
    equivalence = Equivalence(
        is_equivalent=True, match_share=1.0, required_share=0.999, rtol=1e-4, num_seeds=3, num_elements=1,
        max_abs_error=0.0, error_vs_fp64=None, baseline_error_vs_fp64=None, error_ratio=None,
    )  # fmt: skip

    def latency(value, device_ms=None):
        return Latency(
            latency_ms_p50=value, latency_ms_p20=value, latency_ms_p80=value, num_samples=9, device_ms_p50=device_ms
        )

    comparison = Comparison(
        workload="w", baseline="eager", candidate=name, baseline_latency=latency(10.0, eager_kernels_ms),
        candidate_latency=latency(latency_ms), speedup=ratio, noise=Ratio(median=1, low=1, high=1),
        baseline_items_per_second=1, candidate_items_per_second=1, item_unit="calls", equivalence=equivalence,
        verdict=verdict,
    )  # fmt: skip
    status = "kept" if verdict == "faster" else "rejected"
    return CandidateResult(name=name, status=status, reason="", compile_s=0.1, comparison=comparison)


def run(
    times_ms, *, budget_s=60.0, limit_ms=None, device="cuda", fails=(), is_whole=True, found=ACTIONS, verdict="faster",
    eager_kernels_ms=None,
):  # fmt: skip
    built = {}

    def build(candidate):
        if candidate.name in fails:
            raise PatchError("cannot be compiled")
        built[candidate.name] = Built(candidate.name, is_whole, found)
        return built[candidate.name]

    def screen(name, patch):
        time_ms = times_ms.get(name, 9.0)
        return result_of(name, time_ms, verdict if time_ms < 10 else "slower", eager_kernels_ms)

    chooser = Chooser(Plan(ACTIONS, device), build, screen, budget_s=budget_s, limit_ms=limit_ms)
    chooser.run()
    return chooser, built


def tried(chooser):
    return [result.name for result in chooser.results if result.status != "skipped"]


def test_the_cheap_comes_first_then_all_less_each_change_then_max_autotune():
    chooser, _ = run({"agnitra": 4.0})
    assert tried(chooser) == [
        "agnitra", "cuda_graph", "torch.compile", "agnitra-qkv_concat", "agnitra-rms_norm", "agnitra:max-autotune",
    ]  # fmt: skip
    assert chooser.best == "agnitra"


def test_a_change_that_costs_more_than_it_gains_is_left_out_and_the_rest_is_tried_again():
    chooser, _ = run({"agnitra": 4.0, "agnitra-rms_norm": 3.0})
    assert chooser.best == "agnitra-rms_norm"
    assert tried(chooser)[-2:] == ["agnitra-rms_norm", "agnitra:max-autotune"]


def test_a_change_that_makes_ours_slower_than_plain_torch_compile_is_found():
    chooser, _ = run({"agnitra": 7.0, "torch.compile": 5.0, "agnitra-qkv_concat": 4.0})
    assert chooser.best == "agnitra-qkv_concat"


@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_a_change_that_spoils_the_whole_is_found(how):
    fails = ("agnitra",) if how == "fails" else ()
    chooser, _ = run({"agnitra": 11.0, "torch.compile": 5.0, "agnitra-rms_norm": 3.0}, fails=fails)
    assert chooser.best == "agnitra-rms_norm"


def test_a_change_that_found_nothing_is_not_left_out():
    chooser, _ = run({"agnitra": 4.0}, found=("qkv_concat",))
    assert "agnitra-rms_norm" not in [result.name for result in chooser.results]


@pytest.mark.parametrize(("eager_kernels_ms", "is_tried"), [(5.0, False), (3.0, True), (None, True)])
def test_eagers_own_cuda_graph_is_tried_unless_its_kernels_alone_take_longer(eager_kernels_ms, is_tried):
    chooser, _ = run({"agnitra": 4.0}, eager_kernels_ms=eager_kernels_ms)
    assert ("cuda_graph" in tried(chooser)) == is_tried


def test_near_the_physical_limit_nothing_more_is_compiled():
    chooser, _ = run({"agnitra": 4.0}, limit_ms=3.9)
    assert tried(chooser) == ["agnitra", "cuda_graph"]
    assert "within 3% of the device's limit" in chooser.results[2].reason


def test_a_tenth_above_the_limit_what_costs_little_is_tried_and_the_long_tuning_is_not():
    chooser, _ = run({"agnitra": 4.0}, limit_ms=3.65)
    assert "torch.compile" in tried(chooser)
    assert not any("max-autotune" in name for name in tried(chooser))


def test_without_budget_plain_torch_compile_is_still_looked_at_where_ours_fails():
    chooser, _ = run({}, budget_s=1e-9, fails=("agnitra",))
    assert tried(chooser) == ["agnitra", "cuda_graph", "torch.compile"]
    assert chooser.best is not None


def test_a_failure_is_recorded_and_the_contest_goes_on():
    chooser, _ = run({"torch.compile": 5.0}, fails=("agnitra", "cuda_graph"))
    assert [result.status for result in chooser.results[:3]] == ["failed", "failed", "kept"]
    assert chooser.best == "torch.compile"


def test_what_a_short_measurement_could_not_decide_stays_usable_for_a_longer_one():
    chooser, built = run({"agnitra": 8.0, "torch.compile": 8.5}, verdict="no_change")
    assert chooser.best == "agnitra"
    assert not built["torch.compile"].is_discarded


def test_losers_let_go_of_their_memory():
    chooser, built = run({"agnitra": 2.0, "torch.compile": 3.0, "cuda_graph": 9.9, "agnitra:max-autotune": 2.5})
    assert built["cuda_graph"].is_discarded
    assert "cuda_graph" not in chooser.patches
    assert not built["agnitra"].is_discarded


def test_a_call_that_no_graph_of_ours_holds_is_tried_with_inductors_own_before_anything_is_left_out():
    """As one with Python between two compiled graphs."""
    chooser, _ = run({"agnitra": 4.0}, is_whole=False)
    names = tried(chooser)
    assert names[:5] == [
        "agnitra", "cuda_graph", "torch.compile", "torch.compile:reduce-overhead", "agnitra:reduce-overhead",
    ]  # fmt: skip
    assert "torch.compile:max-autotune" in names
    chooser, _ = run({"agnitra": 4.0})
    assert not [name for name in tried(chooser) if "reduce-overhead" in name]


def test_changes_that_are_all_refused_are_left_out_one_by_one_only_within_the_budget(monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(chooser_module, "clock_s", lambda: float(next(clock)))
    times_ms = dict.fromkeys(("agnitra", "torch.compile", "agnitra-qkv_concat", "agnitra-rms_norm"), 20.0)
    chooser, _ = run(times_ms, budget_s=100.0)
    assert tried(chooser)[:3] == ["agnitra", "cuda_graph", "torch.compile"]
    reasons = {result.name: result.reason for result in chooser.results if result.status == "skipped"}
    assert "s are spent" in reasons["agnitra-qkv_concat"] and "s are spent" in reasons["agnitra-rms_norm"]


def test_reduce_overhead_is_looked_at_whatever_the_budget_where_it_may_be_the_faster_mode():
    chooser, _ = run({"agnitra": 4.0}, is_whole=False, budget_s=0.0)
    assert tried(chooser) == ["agnitra", "cuda_graph", "torch.compile:reduce-overhead"]


def test_on_a_cpu_there_are_no_cuda_graphs():
    chooser, _ = run({"agnitra": 4.0}, device="cpu")
    assert "cuda_graph" not in tried(chooser)


def test_after_a_rehearsal_only_what_would_lead_is_built_here():
    built = []
    times_ms = {"agnitra": 8.0, "cuda_graph": 4.0, "torch.compile": 6.0}

    def build(candidate):
        built.append(candidate.name)
        return Built(candidate.name)

    def rehearse(candidate):
        if candidate.name not in times_ms:
            return Rehearsed(CandidateResult(name=candidate.name, status="failed", reason="crash in a process"))
        return Rehearsed(result_of(candidate.name, times_ms[candidate.name]))

    chooser = Chooser(
        Plan(ACTIONS, "cuda"), build, lambda name, patch: result_of(name, times_ms[name]), budget_s=60.0,
        rehearse=rehearse,
    )  # fmt: skip
    chooser.run()
    assert built == ["agnitra", "cuda_graph"]
    assert chooser.best == "cuda_graph"
    rows = {result.name: result for result in chooser.results}
    assert rows["torch.compile"].status == "rejected"
    assert "cuda_graph leads" in rows["torch.compile"].reason
    assert rows["agnitra:max-autotune"].reason == "crash in a process"


def test_combo_kernels_compete_on_top_of_the_best_and_only_where_they_were_asked_for():
    plan = Plan(("qkv_concat", "combo_kernels"), "cuda")
    (ours,) = [candidate for candidate in plan.first() if candidate.name == "agnitra"]
    assert "combo_kernels" not in ours.actions
    (combined, *_) = plan.second(ours)
    assert (combined.name, combined.mode) == ("agnitra:combo-kernels", "default")
    assert combined.actions == (*ours.actions, "combo_kernels") and combined.changes == ours.changes
    assert "torch.compile:combo-kernels" in [candidate.name for candidate in plan.second(None)]
    for other in (Plan(("qkv_concat",), "cuda"), Plan(("qkv_concat", "combo_kernels"), "cpu")):
        assert not [name for name in other.names() if "combo" in name]


@pytest.mark.parametrize(
    ("actions", "error_ratio", "expected"),
    [
        (("qkv_concat", "channels_last", "as_laid_out"), 1.4, "agnitra:as-laid-out"),
        (("as_laid_out",), 1.4, "torch.compile:as-laid-out"),
        (("qkv_concat", "as_laid_out"), 1.1, None),
        (("qkv_concat",), 1.4, None),
    ],
    ids=["ours", "plain", "not for its error", "no convolutions"],
)
def test_what_is_compiled_is_tried_in_eagers_layout_where_its_error_alone_stands_against_it(
    actions, error_ratio, expected
):
    built = {}

    def build(candidate):
        built[candidate.name] = candidate
        return Built(candidate.name, found=())

    def screen(name, patch):
        if name.endswith("as-laid-out"):
            return result_of(name, 5.0)
        result = result_of(name, 5.0, "not_equivalent")
        checked = result.comparison.equivalence.model_copy(update={"is_equivalent": False, "error_ratio": error_ratio})
        return result.model_copy(update={"comparison": result.comparison.model_copy(update={"equivalence": checked})})

    chooser = Chooser(Plan(actions, "cpu"), build, screen, budget_s=60.0)
    chooser.run()
    assert chooser.best == expected
    if expected is not None:
        assert "as_laid_out" in built[expected].actions
        assert "channels_last" not in built[expected].actions
        assert expected in Plan(actions, "cpu").names()


@pytest.mark.parametrize(("found", "is_tried"), [(("rms_norm",), False), (("qkv_concat",), True)])
def test_plain_torch_compile_is_expected_to_take_longer_after_a_graph_with_kernels_of_ours(
    monkeypatch, found, is_tried
):
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(chooser_module, "clock_s", lambda: now.s)

    def build(candidate):
        now.s += 9.0
        return Built(candidate.name, found=found)

    chooser = Chooser(Plan(ACTIONS, "cuda"), build, lambda name, patch: result_of(name, 4.0), budget_s=34.0)
    chooser.run()
    assert ("torch.compile" in tried(chooser)) == is_tried


def test_a_max_autotune_that_overruns_the_budget_is_given_up_and_the_best_so_far_stands():
    def build(candidate):
        if candidate.mode == "max-autotune":
            until_s = time.monotonic() + 20.0
            while time.monotonic() < until_s:
                pass
        return Built(candidate.name)

    chooser = Chooser(Plan(ACTIONS, "cuda"), build, lambda name, patch: result_of(name, 4.0), budget_s=0.4)
    chooser.run()
    rows = {result.name: result for result in chooser.results}
    assert rows["agnitra:max-autotune"].status == "skipped"
    assert "given up" in rows["agnitra:max-autotune"].reason
    assert chooser.best == "agnitra"


def test_each_candidate_that_was_tried_is_kept_with_what_it_took():
    chooser, built = run({"agnitra": 4.0})
    assert set(chooser.tried) == set(built)
    assert all(seconds >= 0 for _, seconds in chooser.tried.values())
