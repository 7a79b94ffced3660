from __future__ import annotations

import pytest
from report_factory import make_comparison, make_report

from agnitra_lab.report.assemble import guidance, headline
from agnitra_lab.report.metrics import metric_cards
from agnitra_lab.report.sections import verdict


def headline_of(outcome, factor, winner):
    return headline(make_comparison(40.0, factor, outcome, is_cuda=False, name="fused"), winner)


def test_a_gain_is_stated_with_its_interval_and_the_latency_it_takes_away():
    text = headline_of("faster", 1.6, "fused")
    assert text.startswith("fused is 1.60x as fast as eager")
    assert "95% interval 1.56 to 1.64" in text
    assert "38% less latency" in text


@pytest.mark.parametrize(
    ("outcome", "factor", "reason"),
    [
        ("no_change", 1.006, "within measurement noise of eager (0.98x to 1.03x)"),
        ("slower", 0.9, "every candidate is slower than eager"),
        ("not_equivalent", 1.9, "no candidate kept the outputs of eager"),
    ],
)
def test_without_a_gain_the_headline_says_no_change_and_why(outcome, factor, reason):
    text = headline_of(outcome, factor, "eager")
    assert text.startswith("No change: ")
    assert reason in text


def test_a_low_precision_gain_is_not_called_equivalent_where_the_oracle_set_the_bar():
    comparison = make_comparison(40.0, 1.6, "faster", is_cuda=False, name="fused")
    judged = comparison.equivalence.model_copy(update={"match_share": 0.95, "required_share": 0.94})
    text = headline(comparison.model_copy(update={"equivalence": judged}), "fused")
    assert text.endswith("outputs as close to fp64 as eager's.")


def test_a_candidate_that_was_faster_once_and_not_kept_is_not_called_noise():
    text = headline_of("faster", 1.6, "eager")
    assert text.startswith("No change: fused was faster than eager in one measurement (1.56x to 1.64x)")
    assert "noise" not in text


def test_a_gain_that_was_not_kept_is_shown_as_no_change():
    report = make_report("cuda", winner="eager")
    assert verdict(report) == "no_change"
    assert not any(card.state == "better" for card in metric_cards(report))


def test_guidance_names_the_drop_in_and_the_way_back():
    report = make_report("cuda")
    assert report.winner in guidance(report)
    assert "result.rollback()" in guidance(report)


@pytest.mark.parametrize("outcome", ["no_change", "slower", "not_equivalent"])
def test_guidance_without_a_winner_claims_no_saving(outcome):
    report = make_report("cuda", outcome)
    assert "nothing was installed" in guidance(report)
    assert "result.model" not in guidance(report)
    assert report.usage.success_fee == 0
