from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.run import Results
from agnitra_lab.runs import provenance
from agnitra_lab.runs.regressions import Regressions, compare_runs
from agnitra_lab.runs.summary import summarise

META = provenance.meta("20260114_093012_t_3fa9", "bench", "x", command="x", argv=["x"], seed=0, device=None)
FIGURES = {
    "latency_ms_p50": 10.0,
    "tokens_per_second": 1000.0,
    "tflops_per_second_est": 5.0,
    "peak_memory_allocated_gb": 2.0,
    "final_loss": 3.0,
}
WORSE = {
    "latency_ms_p50": 10.6,
    "tokens_per_second": 940.0,
    "tflops_per_second_est": 4.7,
    "peak_memory_allocated_gb": 2.2,
    "final_loss": 3.2,
}


def verdicts(regressions):
    return {metric.metric: metric.verdict for metric in regressions.metrics}


def test_a_run_is_no_regression_of_itself(make_summary):
    run = make_summary(**FIGURES)
    regressions = compare_runs(run, run)
    assert set(verdicts(regressions)) == set(FIGURES)
    assert (regressions.verdict, regressions.is_failure) == ("ok", False)


@pytest.mark.parametrize("name", FIGURES)
def test_one_worse_figure_is_a_regression(make_summary, name):
    regressions = compare_runs(make_summary(**FIGURES), make_summary(**{**FIGURES, name: WORSE[name]}))
    assert [metric for metric, verdict in verdicts(regressions).items() if verdict == "regressed"] == [name]
    assert regressions.is_failure


@pytest.mark.parametrize("name", FIGURES)
def test_the_other_way_round_is_an_improvement(make_summary, name):
    assert not compare_runs(make_summary(**{**FIGURES, name: WORSE[name]}), make_summary(**FIGURES)).is_failure


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("latency_rel", "latency_ms_p50"),
        ("throughput_rel", "tokens_per_second"),
        ("tflops_rel", "tflops_per_second_est"),
        ("memory_rel", "peak_memory_allocated_gb"),
        ("loss_rel", "final_loss"),
        ("loss_abs", "final_loss"),
    ],
)
def test_a_wider_threshold_lets_it_pass(make_summary, flag, name):
    candidate = make_summary(**{**FIGURES, name: WORSE[name]})
    assert not compare_runs(make_summary(**FIGURES), candidate, **{flag: 0.5}).is_failure


def test_an_absolute_loss_threshold_takes_the_place_of_the_relative_one(make_summary):
    pair = make_summary(final_loss=3.0), make_summary(final_loss=3.1)
    assert not compare_runs(*pair).is_failure
    assert compare_runs(*pair, loss_abs=0.05).is_failure


def test_the_last_loss_counts_when_there_is_no_final_one(make_summary):
    assert compare_runs(make_summary(losses=(9.0, 3.0)), make_summary(losses=(2.0, 4.0))).is_failure


def test_a_missing_figure_fails_only_when_asked(make_summary):
    pair = make_summary(**FIGURES), make_summary(latency_ms_p50=10.0)
    assert compare_runs(*pair).verdict == "missing"
    assert not compare_runs(*pair).is_failure
    assert compare_runs(*pair, is_missing_failure=True).is_failure


def test_speeds_of_different_devices_are_not_compared(make_summary):
    regressions = compare_runs(
        make_summary(device="NVIDIA H200", latency_ms_p50=1.0), make_summary(device="CPU", latency_ms_p50=50.0)
    )
    assert regressions.verdict == "not_comparable"
    assert not regressions.is_failure
    assert "NVIDIA H200" in regressions.note


def test_what_a_run_was_compared_with_does_not_count_against_it(make_summary):
    pair = make_summary(baseline_latency_ms_p50=10.0), make_summary(baseline_latency_ms_p50=20.0)
    assert compare_runs(*pair).metrics == ()


def test_a_change_from_zero_has_no_relative_change_but_counts(make_summary):
    (metric,) = compare_runs(make_summary(final_loss=0.0), make_summary(final_loss=1.0)).metrics
    assert (metric.relative_change, metric.verdict) == (None, "regressed")


def test_the_result_survives_a_round_trip(make_summary):
    regressions = compare_runs(make_summary(**FIGURES), make_summary(**WORSE))
    assert Regressions.from_json(regressions.to_json()) == regressions


@given(before=st.floats(1e-3, 1e6), change=st.floats(-0.9, 9.0), tolerance=st.floats(0.0, 1.0))
def test_latency_regresses_exactly_when_it_grows_by_more_than_the_tolerance(before, change, tolerance):
    after = before * (1 + change)
    pair = [summarise(META, Results(latency_ms_p50=value)) for value in (before, after)]
    assert compare_runs(*pair, latency_rel=tolerance).is_failure == (after - before > tolerance * before)
