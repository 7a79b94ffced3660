from __future__ import annotations

from decimal import Decimal

import pytest
from report_factory import make_comparison, make_report

from agnitra_lab.contracts.patch import Refusal
from agnitra_lab.contracts.report import Payback
from agnitra_lab.report import sections
from agnitra_lab.report.card import card_html, card_text
from agnitra_lab.report.markdown import to_markdown
from agnitra_lab.report.page import page_html

ORACLE_NOTE = "eager itself misses the share against fp64: the candidate's share against fp64 decided"


def page_without_plotly(report):
    return page_html(report, has_live_charts=False)


def without_json(text):
    return text.partition("<details")[0]


SURFACES = pytest.mark.parametrize("render", [card_html, card_text, page_without_plotly, to_markdown])


def with_check(**changes):
    report = make_report()
    check = report.comparison.equivalence.model_copy(update=changes)
    comparison = report.comparison.model_copy(update={"equivalence": check})
    return report.model_copy(update={"comparison": comparison})


def judged_by_oracle():
    return with_check(match_share=0.952, required_share=0.947, error_ratio=1.003, oracle_note=ORACLE_NOTE)


@SURFACES
def test_the_best_plain_mode_is_met_head_to_head_on_every_surface(render):
    rival = make_comparison(40.0, 1.06, "faster", is_cuda=False)
    report = make_report(against_best=rival.model_copy(update={"baseline": "torch.compile:max"}))
    assert "Head to head with torch.compile:max: 1.06× [1.03, 1.09]" in without_json(render(report)).replace("\\", "")


@SURFACES
def test_without_a_second_mode_there_is_no_head_to_head(render):
    assert "Head to head" not in render(make_report())


def test_a_tie_head_to_head_is_called_one():
    tie = make_comparison(40.0, 1.0, "no_change", is_cuda=False)
    assert "no difference beyond the noise" in sections.head_to_head(make_report(against_best=tie))


@SURFACES
def test_an_equivalence_that_fp64_decided_says_so_and_does_not_imply_the_usual_share(render):
    text = without_json(render(judged_by_oracle()))
    assert "95.2% of elements within tolerance of fp64, 94.7% required" in text
    assert "99.9% required" not in text
    for part in ("1.00×", "top-1 agreement 100%", "share against fp64 decided"):
        assert part in text


def test_a_row_whose_share_is_against_fp64_says_so():
    report = judged_by_oracle()
    row = report.candidates[0].model_copy(update={"comparison": report.comparison})
    table = sections.candidate_table(report.model_copy(update={"candidates": (row,)}))
    assert table.rows[0][4] == "yes, 95.2% vs fp64"


def test_a_share_that_was_lowered_by_hand_is_not_called_the_oracles():
    text = sections.equivalence_sentence(with_check(required_share=0.95).comparison)
    assert "within tolerance of eager, 95% required" in text


def test_figures_that_were_not_taken_are_left_out():
    text = sections.equivalence_sentence(with_check(error_ratio=None, top1_agreement=None).comparison)
    assert "top-1" not in text
    assert "fp64" not in text


@SURFACES
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("outcome", ["faster", "no_change"])
def test_the_bill_is_shown_as_the_usage_event_has_it(render, device, outcome):
    report = make_report(device, outcome)
    text = without_json(render(report))
    for amount in (report.usage.usage_charge, report.usage.success_fee, report.usage.total_billable):
        assert f"{amount:.4f} USD" in text
    assert "not priced" not in text


def test_a_bill_on_a_cpu_says_that_its_hours_are_cpu_hours():
    assert "CPU hours" in dict(sections.usage_facts(make_report("cpu")))["Covers"]
    assert "CPU" not in dict(sections.usage_facts(make_report("cuda")))["Covers"]


def test_a_cpu_run_that_bills_nothing_is_not_priced():
    report = make_report("cpu", "no_change")
    nothing = dict.fromkeys(("cost_before", "cost_after", "usage_charge", "total_billable"), Decimal("0.0000"))
    free = report.model_copy(update={"usage": report.usage.model_copy(update=nothing)})
    assert "Cost impact: not priced" in card_text(free)


@SURFACES
def test_the_speed_up_is_called_the_median_of_paired_ratios(any_report, render):
    assert "median of paired ratios" in without_json(render(any_report))


def test_a_title_that_names_the_device_is_not_followed_by_it():
    report = make_report()
    titled = make_report(title=f"llama on {report.device.name}")
    assert sections.kicker(titled).count(report.device.name) == 1
    assert sections.kicker(report).count(report.device.name) == 1


def test_the_columns_of_every_table_fill_the_row(any_report):
    for build in (sections.candidate_table, sections.ops_table, sections.checkpoint_table, sections.suggestion_table,
                  sections.patch_table):  # fmt: skip
        table = build(any_report)
        if table.rows:
            assert len(table.widths) == len(table.columns)
            assert sum(table.widths) == 100


@pytest.mark.parametrize("render", [card_html, to_markdown, page_without_plotly])
def test_a_report_without_a_patch_of_ours_says_what_was_left_as_it_was_and_why(render):
    report = make_report("cpu", "no_change").model_copy(
        update={"patch": None, "refusals": (Refusal(action="split_gemm", reason="TF32 is allowed here"),)}
    )
    text = without_json(render(report))
    assert "refused: TF32 is allowed here" in text
    assert "No patch was kept; this is what all changes together left as it was." in text


def test_a_long_name_is_cut_to_its_column_on_the_card_and_whole_in_the_text():
    name = "void_at_native_vectorized_elementwise_kernel_of_four_and_a_functor"
    report = make_report()
    row = report.candidates[0].model_copy(update={"name": name, "status": "rejected", "comparison": None})
    report = report.model_copy(update={"candidates": (row,)})
    assert name not in without_json(card_html(report))
    assert name in card_text(report)


def test_the_kept_candidate_leads_and_those_without_a_measurement_come_last():
    report = make_report()
    report = report.model_copy(update={"candidates": report.candidates[::-1]})
    table = sections.candidate_table(report)
    assert [row[0] for row in table.rows[:3]] == [report.winner, "compile:default", "freezing"]
    assert table.emphasised == 0
    assert {row[2] for row in table.rows[3:]} == {""}


def test_a_kept_candidate_says_after_how_many_calls_it_has_paid_for_the_run():
    payback = Payback(num_calls=1234, spent_s=61.3, searched_s=2.4, saved_ms=49.7)
    report = make_report().model_copy(update={"payback": payback})
    assert "after 1,234 calls" in str(sections.break_even(report))
    assert ("Pays for itself", sections.break_even(report)) in sections.proof_facts(report)


def test_nothing_is_paid_back_where_nothing_was_kept():
    report = make_report()
    assert sections.break_even(report) is None
