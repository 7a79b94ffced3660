from __future__ import annotations

import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.run import RunSummary
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.layout import KINDS
from agnitra_lab.runs.markdown import escape, run_markdown
from agnitra_lab.runs.store import RunStore


@pytest.fixture
def summaries(make_report):
    def make_meta(kind):
        return provenance.meta(
            "20260114_093012_t_3fa9", kind, "demo:llama", command="agnitra optimize demo:llama", argv=["agnitra"],
            seed=0, device=DeviceInfo(type="cuda", name="NVIDIA H200"),
        )  # fmt: skip

    return summary.optimization_summaries(make_report("cuda"), make_meta)


def test_where_a_run_comes_from_is_found_out_once(make_report, make_summary):
    asked = []

    def make_meta(kind):
        asked.append(kind)
        return make_summary(kind=kind).meta

    filed = summary.optimization_summaries(make_report("cuda"), make_meta)
    assert len(asked) == 1
    assert {category: found.meta.kind for category, (found, _) in filed.items()} == {
        category: KINDS[category] for category in filed
    }


def test_one_optimisation_is_filed_in_every_place_of_the_layout(summaries):
    assert set(summaries) == {"profiles", "perf", "cmaes", "certs", "bench", "reports"}
    assert {name: filed.meta.kind for name, (filed, _) in summaries.items()}["profiles"] == "profile"


def test_every_summary_survives_a_round_trip(summaries):
    for filed, _ in summaries.values():
        assert RunSummary.from_json(filed.to_json()) == filed


def test_all_summaries_of_a_run_can_be_filed(summaries, tmp_path):
    run = RunStore(tmp_path, draw_run_id=lambda tag: "20260114_093012_t_3fa9").create("t", "demo:llama")
    assert set(run.finish_all(summaries)) == set(summaries)


def test_a_run_without_searches_has_no_cmaes_summary(make_report, make_summary):
    filed = summary.optimization_summaries(make_report("cpu", searches=()), lambda kind: make_summary(kind=kind).meta)
    assert "cmaes" not in filed


def test_bench_figures_are_those_of_the_comparison(make_report):
    comparison = make_report("cuda").comparison
    results = summary.bench_results(comparison).model_dump()
    assert results["latency_ms_p50"] == comparison.candidate_latency.latency_ms_p50
    assert results["tokens_per_second"] == comparison.candidate_items_per_second
    assert (results["speedup_low"], results["speedup_high"]) == (comparison.speedup.low, comparison.speedup.high)


def test_a_figure_that_was_not_measured_is_absent_and_never_zero(make_report):
    results = summary.profile_results(make_report("cpu").telemetry).model_dump(exclude_none=True)
    assert "gpu_utilisation" not in results


def test_images_are_not_counted_as_tokens(make_report):
    comparison = make_report().comparison.model_copy(update={"item_unit": "images"})
    assert summary.bench_results(comparison).tokens_per_second is None


def test_run_md_says_what_why_how_fast_and_how_to_repeat(summaries):
    filed, text = summaries["bench"]
    assert "demo:llama" in text
    assert "agnitra optimize demo:llama" in text
    assert f"| latency_ms_p50 | {filed.results.model_dump()['latency_ms_p50']:.6g} |" in text.replace("\\", "")


def test_run_md_lists_candidates_as_a_table(summaries):
    assert "### candidates" in summaries["perf"][1]
    assert "compile:max-autotune" in summaries["perf"][1]


def test_hostile_text_in_run_md_is_inert(make_summary):
    text = run_markdown(make_summary(note="<script>x</script> | [a](b) `c`"), "why <b>\n# heading")
    assert "<script>" not in text.replace("\\<", "")
    assert "\n# heading" not in text
    assert escape("a|b") == r"a\|b"
