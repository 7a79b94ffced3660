"""Kernel configs in a process of their own: what hangs or dies there is named, and the next is measured at once."""

import time
from pathlib import Path

import pytest
import torch

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import SearchError
from agnitra_lab.loop import kernel_lab

SITE = Site("rms_norm", (16, 64), "float32")


def config(block_n: int) -> KernelConfig:
    return KernelConfig(template="rms_norm", params={"BLOCK_N": block_n})


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setattr(kernel_lab, "_JOBS", str(Path(__file__).with_name("kernel_lab_jobs.py")))
    monkeypatch.setattr(kernel_lab, "_DEADLINE_S", 1.0)
    opened = kernel_lab.KernelLab(torch.device("cpu"))
    yield opened
    opened.close()


@pytest.mark.parametrize(("block_n", "status"), [(1, "timeout"), (2, "crash")])
def test_the_next_config_is_measured_within_ten_seconds_of_one_that_hangs_or_dies(lab, block_n, status):
    measure = lab.measure(SITE)
    with pytest.raises(SearchError, match=status):
        measure(config(block_n))
    started_s = time.monotonic()
    assert measure(config(8)) == 0.25
    assert time.monotonic() - started_s < 10
    assert [outcome.name for outcome in lab.casualties] == [config(block_n).key()]


def test_a_wrong_result_is_a_failed_trial_and_costs_no_process(lab):
    measure = lab.measure(SITE)
    with pytest.raises(SearchError, match="another result"):
        measure(config(4))
    assert lab.casualties == []
    assert measure(config(8)) == 0.25
