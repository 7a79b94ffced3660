"""The suite on a real device: every mode takes part, and two processes share the device by turns."""

from pathlib import Path

import pytest
import torch

from agnitra_lab.loop.suite import SuiteSettings, run_suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def test_two_processes_measure_all_modes_by_turns(tmp_path: Path) -> None:
    done = run_suite(
        SuiteSettings(
            names=("softmax-long-rows", "bert"), device="cuda", scale="tiny", budget_s=20.0, timing_s=3.0, num_jobs=2,
            is_controlled=True, artifacts=tmp_path,
        )
    )  # fmt: skip
    assert done.left == []
    for filed in done.filed:
        result = filed.result
        assert (result.status, result.error) == ("done", None), result
        assert [side.name for side in result.baselines] == ["eager", "default", "reduce-overhead", "max-autotune"]
        assert [side.error for side in result.baselines] == [None] * 4
        for side in (*result.baselines, result.candidate):
            assert side.latency.num_samples >= 12
            assert side.latency.device_ms_p50 > 0
        assert all(side.equivalence is not None for side in result.baselines[1:])
        assert result.is_equivalent, result.candidate.equivalence.problems
        assert result.num_guard_misses == 0
        assert result.noise.low <= result.noise.median <= result.noise.high
    assert sum(filed.result.waited_s for filed in done.filed) > 0
