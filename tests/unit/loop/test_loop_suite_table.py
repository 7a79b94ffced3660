"""The suite's figures, and which results they are made of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from suite_results import EPYC, done, failed, file_run, inexact, side

from agnitra_lab.errors import UsageError
from agnitra_lab.loop.suite_table import best_exact, collect, figures, row


def test_the_figures_are_those_of_the_ratios() -> None:
    found = figures([done("bert", 2.0), done("vit", 0.5), done("lstm", 1.15), done("gru", 0.985)])
    assert found.speedup_vs_best_geomean == pytest.approx((2.0 * 0.5 * 1.15 * 0.985) ** 0.25)
    assert found.speedup_vs_eager_geomean == pytest.approx(2.0)
    assert (found.speedup_vs_best_worst, found.worst_workload) == (0.5, "vit")
    # 0.985 is above 0.98; 0.5 is below it with its whole interval.
    assert (found.num_below_0_98, found.num_surely_below_0_98) == (1, 1)
    assert (found.num_at_least_1_15, found.share_at_least_1_15) == (2, 0.5)
    assert (found.num_workloads, found.num_done, found.num_failed, found.num_not_equivalent) == (4, 4, 0, 0)


def test_a_ratio_just_below_is_counted_apart_from_one_that_surely_is() -> None:
    found = figures([done("bert", 0.975)])
    assert (found.num_below_0_98, found.num_surely_below_0_98) == (1, 0)


def test_a_best_baseline_of_other_values_counts_and_is_held_apart() -> None:
    checked = done("lstm", 1.2, baselines=(side("eager", 2.0), side("default", 1.2, is_equivalent=True)))
    found = figures([inexact("bert"), done("vit", 0.9), checked])
    assert (found.speedup_vs_best_worst, found.num_below_0_98, found.num_inexact_best) == (0.5, 2, 1)
    assert (found.speedup_vs_best_exact_worst, found.num_exact_below_0_98) == (0.9, 1)
    assert found.speedup_vs_best_exact_geomean == pytest.approx((2.0 * 0.9 * 1.2) ** (1 / 3))


def test_other_strides_and_an_output_that_the_next_call_overwrites_are_no_other_values() -> None:
    default = side("default", 0.5, is_equivalent=True)
    checked = default.equivalence.model_copy(update={"is_equivalent": False, "problems": ("it is overwritten",)})
    sides = (side("eager", 2.0), default.model_copy(update={"equivalence": checked}))
    assert best_exact(sides).name == "default"
    assert best_exact((side("eager", 2.0), side("default", 0.5))) is None


def test_what_failed_or_computes_something_else_is_in_no_mean_and_counts_against_the_share() -> None:
    found = figures([done("bert", 2.0), done("vit", 50.0, is_equivalent=False), failed("lstm")])
    assert found.speedup_vs_best_geomean == pytest.approx(2.0)
    assert (found.num_done, found.num_failed, found.num_not_equivalent) == (2, 1, 1)
    assert found.share_at_least_1_15 == pytest.approx(1 / 3)


def test_algebra_counts_up_to_ten_in_the_capped_means_alone() -> None:
    found = figures([done("bert", 1.0, vs_eager=1.0), done("vit", 1000.0, vs_eager=1000.0, is_algebra=True)])
    assert found.speedup_vs_best_geomean == pytest.approx(math.sqrt(1000))
    assert found.speedup_vs_best_geomean_capped == pytest.approx(math.sqrt(10))
    assert found.speedup_vs_eager_geomean_capped == pytest.approx(math.sqrt(10))


def test_no_results_have_no_means() -> None:
    found = figures([])
    assert found.speedup_vs_best_geomean is None
    assert found.share_at_least_1_15 is None
    assert found.num_workloads == 0


def test_a_failed_baseline_is_counted_and_has_no_time_in_its_row(tmp_path: Path) -> None:
    file_run(tmp_path, done("bert", 1.2, failed_mode=True))
    (group,), _ = collect(tmp_path)
    assert group.figures.num_failed_baselines == 1
    found = row(group.filed[0])
    assert "max_autotune_latency_ms_p50" not in found
    assert found["default_latency_ms_p50"] == 1.2
    assert found["speedup_vs_best_low"] == pytest.approx(1.2 * 0.99)


def test_the_newest_result_of_a_workload_and_device_counts_whatever_it_says(tmp_path: Path) -> None:
    file_run(tmp_path, done("bert", 3.0), done("vit", 2.0))
    file_run(tmp_path, failed("bert", generated_at="2026-11-27T12:00:00Z"))
    file_run(tmp_path, done("bert", 4.0, generated_at="2026-11-25T12:00:00Z"))
    (group,), warnings = collect(tmp_path)
    assert [(filed.result.workload, filed.result.status) for filed in group.filed] == [
        ("bert", "failed"), ("vit", "done")
    ]  # fmt: skip
    assert warnings == []


def test_devices_and_scales_are_never_averaged_together(tmp_path: Path) -> None:
    file_run(tmp_path, done("bert", 2.0), done("vit", 3.0, device=EPYC, scale="small"))
    file_run(tmp_path, done("bert", 4.0, device=EPYC, scale="tiny"))
    groups, _ = collect(tmp_path)
    assert [(group.device, group.scale) for group in groups] == [
        ("AMD EPYC", "small"), ("AMD EPYC", "tiny"), ("NVIDIA H200", "full")
    ]  # fmt: skip
    assert [group.figures.speedup_vs_best_geomean for group in groups] == pytest.approx([3.0, 4.0, 2.0])


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", {"vit"}), ("h200", {"bert"}), ("cuda", {"bert"}), ("TPU", set())]
)
def test_a_device_is_chosen_by_its_type_or_name(tmp_path: Path, device: str, names: set[str]) -> None:
    file_run(tmp_path, done("bert", 2.0), done("vit", 3.0, device=EPYC))
    groups, _ = collect(tmp_path, device=device)
    assert {filed.result.workload for group in groups for filed in group.filed} == names


def test_runs_that_are_named_are_read_alone(tmp_path: Path) -> None:
    first = file_run(tmp_path, done("bert", 2.0))
    second = file_run(tmp_path, done("vit", 2.0))
    for name in (first.name, str(first)):
        (group,), _ = collect(tmp_path, [name])
        assert [filed.result.workload for filed in group.filed] == ["bert"]
    (group,), _ = collect(tmp_path, [first.name, second.name])
    assert [filed.result.workload for filed in group.filed] == ["bert", "vit"]
    with pytest.raises(UsageError, match="20260101"):
        collect(tmp_path, ["20260101_000000_suite_0000"])


def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    whole = file_run(tmp_path, done("bert", 2.0), done("vit", 2.0), done("lstm", 2.0))
    (whole / "workloads" / "vit.json").write_text((whole / "workloads" / "vit.json").read_text().replace("2.0", "9.0"))
    open_run = file_run(tmp_path, done("gru", 2.0), is_finished=False)
    (open_run / "workloads" / "dit.json").write_text('{"workload": "di')
    (group,), warnings = collect(tmp_path)
    assert [filed.result.workload for filed in group.filed] == ["bert", "lstm", "gru"]
    assert any("vit.json" in text and "manifest" in text for text in warnings)
    assert any("dit.json" in text for text in warnings)
    assert any(open_run.name in text and "no manifest" in text and "its 1 finished" in text for text in warnings)
    assert len(warnings) == 3


def test_a_run_whose_manifest_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    run = file_run(tmp_path, done("bert", 2.0))
    (run / "manifest.json").write_text("not json")
    groups, warnings = collect(tmp_path)
    assert groups == []
    assert len(warnings) == 1
    assert run.name in warnings[0]


def test_nothing_filed_is_nothing_found(tmp_path: Path) -> None:
    assert collect(tmp_path / "nowhere") == ([], [])
