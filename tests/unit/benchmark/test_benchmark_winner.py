"""Which candidate is kept, and what the table says of the others."""

from agnitra_lab.benchmark.winner import after, confirm, contenders, is_clear, judge, pass_over, ranking
from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence, Latency, Ratio

EQUAL = Equivalence(
    is_equivalent=True, match_share=1.0, required_share=0.999, rtol=1e-4, num_seeds=3, num_elements=10,
    max_abs_error=0.0, error_vs_fp64=None, baseline_error_vs_fp64=None, error_ratio=None,
)  # fmt: skip


def comparison(
    verdict: str, speedup: float, candidate: str = "c", baseline: str = "eager", gpu_ms: float | None = None
) -> Comparison:
    latency = Latency(latency_ms_p50=1.0, latency_ms_p20=0.9, latency_ms_p80=1.1, num_samples=10)
    own = latency
    if gpu_ms is not None:
        own = Latency(
            latency_ms_p50=gpu_ms, latency_ms_p20=0.99 * gpu_ms, latency_ms_p80=1.01 * gpu_ms, num_samples=10,
            device_ms_p50=gpu_ms,
        )  # fmt: skip
    return Comparison(
        workload="w", baseline=baseline, candidate=candidate, baseline_latency=latency, candidate_latency=own,
        speedup=Ratio(median=speedup, low=speedup * 0.98, high=speedup * 1.02),
        noise=Ratio(median=1, low=0.99, high=1.01),
        baseline_items_per_second=1.0, candidate_items_per_second=1.0, item_unit="calls",
        equivalence=EQUAL, verdict=verdict,
    )  # fmt: skip


def test_only_a_candidate_that_is_proved_faster_is_eligible() -> None:
    rows = [judge(verdict, comparison(verdict, 1.5), 1.0) for verdict in ("faster", "no_change", "slower")]
    assert [row.name for row in ranking(rows)] == ["faster"]


def test_candidates_rank_by_their_paired_speed_up() -> None:
    rows = [judge(str(speedup), comparison("faster", speedup), 1.0) for speedup in (1.2, 1.9, 1.5)]
    assert [row.name for row in ranking(rows)] == ["1.9", "1.5", "1.2"]


def test_on_an_accelerator_candidates_rank_by_their_own_time_whatever_the_baseline_took() -> None:
    rows = [
        judge(f"{gpu_ms} ms", comparison("faster", speedup, gpu_ms=gpu_ms), 1.0)
        for gpu_ms, speedup in ((1.6, 16.2), (1.1, 15.5), (1.2, 13.5))
    ]
    assert [row.name for row in ranking(rows)] == ["1.1 ms", "1.2 ms", "1.6 ms"]
    assert is_clear(rows[1], rows[0])
    assert not is_clear(rows[1], rows[2])


def test_where_nothing_is_proved_faster_what_may_be_is_measured_again() -> None:
    rows = [judge(f"{speedup}", comparison("no_change", speedup), 1.0) for speedup in (1.01, 1.1, 1.15)]
    wrong = judge("wrong", comparison("not_equivalent", 1.4), 1.0)
    assert [row.name for row in contenders([*rows, wrong])] == ["1.15", "1.1"]
    proved = judge("proved", comparison("faster", 1.05), 1.0)
    assert contenders([*rows, proved]) == [proved]


def test_on_an_accelerator_what_noise_hid_is_measured_again_where_it_was_ahead_of_all_eligible_ones() -> None:
    proved = judge("proved", comparison("faster", 2.9, gpu_ms=4.0), 1.0)
    ahead = judge("ahead", comparison("no_change", 3.3, gpu_ms=3.5), 1.0)
    beside = judge("beside", comparison("no_change", 3.3, gpu_ms=3.95), 1.0)
    assert [row.name for row in contenders([proved, ahead, beside])] == ["ahead", "proved"]


def test_no_change_is_told_with_the_baselines_own_noise() -> None:
    assert "eager against itself [0.990, 1.010]" in judge("x", comparison("no_change", 1.005), 1.0).reason


def test_the_loser_of_the_final_is_rejected_with_what_was_measured() -> None:
    rows = [judge(name, comparison("faster", speedup), 1.0) for name, speedup in (("a", 1.5), ("b", 1.4), ("c", 1.1))]
    final = comparison("faster", 1.1, candidate="a", baseline="b")
    kept, finalist, other = pass_over(rows, rows[0], final)
    assert kept.status == "kept"
    assert finalist.status == other.status == "rejected"
    assert "head to head a over b 1.100x" in finalist.reason
    assert "head to head" not in other.reason


def test_a_leader_that_is_not_confirmed_makes_way_for_the_next() -> None:
    rows = [judge(name, comparison("faster", speedup), 1.0) for name, speedup in (("a", 1.3), ("b", 1.2), ("c", 1.1))]
    asked: list[tuple[str, float]] = []

    def measure(name: str, times: float) -> CandidateResult:
        asked.append((name, times))
        verdict, speedup = {"a": ("no_change", 0.99), "b": ("faster", 1.15), "c": ("faster", 1.1)}[name]
        return judge(name, comparison(verdict, speedup), 1.0)

    found, winner = confirm(rows, ["a", "b", "c"], measure)
    assert winner is not None and winner.name == "b"
    assert asked == [("a", 1.0), ("b", 1.0)]
    assert [row.status for row in found] == ["rejected", "kept", "kept"]


def test_what_two_measurements_cannot_decide_gets_a_third_that_is_longer() -> None:
    rows = [judge("a", comparison("no_change", 1.1), 1.0)]
    verdicts = iter(["no_change", "faster"])
    found, winner = confirm(rows, ["a"], lambda name, times: judge(name, comparison(next(verdicts), 1.1), times))
    assert found == [winner]
    assert winner is not None and winner.compile_s == 4.0


def test_of_two_finalists_the_one_with_the_better_median_head_to_head_goes_first() -> None:
    rows = [judge(name, comparison("faster", 1.2), 1.0) for name in "abc"]
    assert [row.name for row in after(comparison("no_change", 0.98), rows)] == ["b", "a", "c"]
    assert after(comparison("no_change", 1.01), rows) == rows


def test_a_median_that_gains_nothing_is_not_asked_again() -> None:
    asked = []

    def measure(name: str, times: float) -> CandidateResult:
        asked.append(times)
        return judge(name, comparison("no_change", 1.02), 1.0)

    assert confirm([judge("a", comparison("no_change", 1.02), 1.0)], ["a"], measure)[1] is None
    assert asked == [1.0]
    assert contenders([judge("a", comparison("no_change", 1.02), 1.0)]) == []


def test_where_nothing_is_confirmed_no_row_stays_kept() -> None:
    (row,) = pass_over([judge("a", comparison("faster", 1.2), 1.0)], None, None)
    assert (row.status, "not confirmed" in row.reason) == ("rejected", True)


def test_without_a_winner_nothing_changes() -> None:
    rows = [judge("x", comparison("slower", 0.8), None)]
    assert pass_over(rows, None, None) == rows


def test_a_lead_is_clear_only_beyond_both_intervals_and_a_margin() -> None:
    first, near, far = (judge(f"{speedup}", comparison("faster", speedup), 1.0) for speedup in (1.5, 1.35, 1.2))
    assert is_clear(first, far)
    assert not is_clear(first, near)
