"""What the rewrites find in a model before anything is compiled: actions, sites, launches, and Dynamo's own graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from agnitra_lab.contracts import Workload
from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import TensorLayout
from agnitra_lab.generate.kernels import KernelBook
from agnitra_lab.graph.compiled import capture_compiled
from agnitra_lab.patch.survey import Survey, survey
from agnitra_lab.workloads import decoders

TRIED = [name for name, action in ACTIONS.items() if action.kind != "options" and not action.is_measured]


@pytest.fixture(scope="module")
def workload() -> Workload:
    found = decoders.llama_1b_decode("tiny", "cpu", torch.bfloat16)
    assert isinstance(found.model, nn.Module)
    return found


@pytest.fixture(scope="module")
def surveyed(workload: Workload) -> tuple[Survey, KernelBook, KernelBook]:
    alone, together = KernelBook(is_survey=True), KernelBook()
    return survey(workload, TRIED, alone, together=together), alone, together


def test_a_norm_that_a_product_takes_along_is_a_site_only_for_the_rewrites_alone(surveyed) -> None:
    _, alone, together = surveyed
    assert {"rms_norm", "skinny_gemm", "swiglu"} <= {site.template for site in alone.sites}
    assert {site.template for site in together.sites} == {"skinny_gemm", "cached_attention"}


def test_each_way_of_calling_a_kernel_is_a_launch(surveyed) -> None:
    found, _, together = surveyed
    assert {launch.site for launch in found.launches} == set(together.sites)
    products = [dict(launch.options) for launch in found.launches if launch.site.template == "skinny_gemm"]
    assert any("norm_weight" in options and "gate" in options for options in products)
    assert any("residual" in options for options in products)
    assert all(isinstance(launch.args[0], TensorLayout) for launch in found.launches)


def test_the_graph_is_the_one_that_torch_compile_makes(workload, surveyed) -> None:
    captured = capture_compiled(torch.compile(workload.model), workload.args, workload.kwargs)
    assert surveyed[0].graph == captured


def test_a_survey_runs_the_model_as_it_is(workload) -> None:
    wrong = replace(KernelBook()("rms_norm", (1, 64), "bfloat16"), call=lambda *args, **options: 1 / 0)
    found = survey(workload, TRIED, lambda template, *rest: wrong if template == "rms_norm" else None)
    assert "rms_norm" in found.actions
    assert not [refusal for refusal in found.refusals if refusal.action == "survey"]


def test_a_model_of_several_graphs_has_none_to_hand_on() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1 if x.sum().item() > 0 else x

    found = survey(Workload("broken", Broken().eval(), (torch.ones(4),)), TRIED, KernelBook(is_survey=True))
    assert found.graph is None
