"""A second optimisation of a model begins with what the first one learnt, and believes none of its numbers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import agnitra_lab
from agnitra_lab.loop import earlier, optimization
from agnitra_lab.patch import toolchain
from agnitra_lab.patch.backend import Backend
from agnitra_lab.profiler import graphs, record

STAGES = ["profile", "suggest", "refine", "generate", "patch", "benchmark", "report"]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm")


def optimised(folder: Path):
    """Optimise a model made anew, as a new process would; nothing is known of it but what lies in the folder."""
    torch.manual_seed(0)
    return agnitra_lab.optimize(
        Gated().eval(), torch.randn(8, 64), suggest="preset", sampler=None, budget_s=1.0, timing_s=0.3,
        artifacts=folder / "artifacts", tuned_folder=folder / "tuned", is_explained=False,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def with_records():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(earlier, "is_kept_on", lambda device: True)
        # What Inductor makes of a graph, 20 s of it on two cores, is no matter here, nor are the device's ceilings.
        patch.setattr(Backend, "_lower", lambda self, graph_module, example_inputs: graph_module.forward)
        patch.setattr(toolchain, "warm_up", lambda device_type: None)
        for module in (optimization, record):
            patch.setattr(module, "measure_peaks", lambda device, dtype: None)
        yield


@pytest.fixture(scope="module")
def first(with_records, folder: Path):
    return optimised(folder)


def record_of(folder: Path) -> Path:
    (path,) = (folder / "tuned" / "runs").glob("*.json")
    return path


def test_a_second_run_traces_nothing_before_it_compiles_and_measures_its_answer_anew(
    first, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "capture", lambda *given: pytest.fail("the profile traced the model"))
    monkeypatch.setattr(optimization, "find_sites", lambda *given: pytest.fail("the survey traced the model"))
    second = optimised(folder).report
    assert [point.stage for point in second.checkpoints] == STAGES
    assert f"the graph as in run {first.report.run_id}" in second.checkpoints[1].headline
    assert [s.action for s in second.proposal.suggestions] == [s.action for s in first.report.proposal.suggestions]
    assert second.comparison.speedup != first.report.comparison.speedup
    assert second.comparison.equivalence.is_equivalent


def test_a_record_of_another_graph_costs_a_second_look_and_changes_nothing(first, folder: Path) -> None:
    path = record_of(folder)
    kept = json.loads(path.read_bytes().partition(b"\n")[2])
    for row in kept["tried"]:
        row["graph_sha256"] = "0" * 64
    kept["findable"] = ["conv_bn_fold"]
    body = json.dumps(kept).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    again = optimised(folder).report
    assert [point.stage for point in again.checkpoints] == STAGES
    assert [s.action for s in again.proposal.suggestions] == [s.action for s in first.report.proposal.suggestions]
    kept = json.loads(record_of(folder).read_bytes().partition(b"\n")[2])
    assert kept["run_id"] == again.run_id
    assert "gate_up_concat" in kept["findable"]
