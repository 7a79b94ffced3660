"""The trace of a survey, taken over by a candidate: the same graph, traced once, and never one of another model."""

from __future__ import annotations

import pytest
import torch
from patch_models import GatedMLP, build, workload
from torch import nn
from torch._dynamo.utils import counters

from agnitra_lab.generate.kernels import KernelBook
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import install
from agnitra_lab.patch.survey import survey

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)
ACTIONS = ["gate_up_concat"]


class Broken(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + 1


def traced(work):
    return survey(work, [*ACTIONS, "keep_eager"], KernelBook(is_survey=True)).trace


def installed(work, trace):
    return install(work, ACTIONS, name="candidate", is_lowered=False, trace=trace)


def num_traced():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def work():
    return workload(build(GatedMLP), X)


def test_a_candidate_that_takes_a_trace_over_is_not_traced_and_is_the_same_as_one_that_was(work):
    trace = traced(work)
    before = num_traced()
    taken = installed(work, trace)
    assert num_traced() == before
    own = installed(work, None)
    assert num_traced() == before + 1
    assert taken.graph_sha256 == own.graph_sha256
    assert taken.log().descriptors == own.log().descriptors
    with torch.no_grad():
        assert torch.equal(taken.model(X), own.model(X))
        assert torch.allclose(taken.model(X), work.model(X), atol=1e-6)
    assert taken.rollback().is_restored


def test_a_trace_is_taken_over_once(work):
    trace = traced(work)
    installed(work, trace)
    before = num_traced()
    again = installed(work, trace)
    assert num_traced() == before + 1
    assert [change.action for change in again.log().descriptors] == ["gate_up_concat"]


def test_a_model_that_has_changed_since_is_traced_again(work):
    trace = traced(work)
    work.model.register_forward_hook(lambda module, given, output: output * 2)
    before = num_traced()
    patch = installed(work, trace)
    assert num_traced() > before
    with torch.no_grad():
        assert torch.allclose(patch.model(X), work.model(X), atol=1e-6)


def test_what_cannot_be_compiled_on_a_trace_taken_over_is_tried_on_one_of_its_own(work, monkeypatch):
    trace, whole, failed = traced(work), Backend._lower, []

    def lower(self, graph_module, example_inputs):
        if not failed:
            failed.append(1)
            raise RuntimeError("planted")
        return whole(self, graph_module, example_inputs)

    monkeypatch.setattr(Backend, "_lower", lower)
    patch = installed(work, trace)
    assert failed
    with torch.no_grad():
        assert torch.allclose(patch.model(X), work.model(X), atol=1e-6)


def test_other_inputs_come_to_the_backend_that_has_taken_the_trace_over(work):
    trace = traced(work)
    backend = Backend(ACTIONS, is_lowered=False)
    assert trace.fits(backend)
    with torch.no_grad():
        compiled = trace.take(backend, lambda function: function(X))
        assert torch.allclose(compiled(X[:1]), work.model(X[:1]), atol=1e-6)
    assert backend.num_graphs == 2
    assert len(backend.descriptors) == 2


def test_a_model_of_several_graphs_and_one_that_dynamo_cannot_trace_have_no_trace_to_take_over():
    trace = traced(workload(build(lambda: nn.Sequential(GatedMLP(), Broken(), GatedMLP())), X))
    assert trace is None or not trace.fits(Backend(ACTIONS))


def test_a_recurrent_layer_that_dynamo_was_told_to_take_is_traced_without_being_told():
    trace = traced(workload(build(lambda: nn.LSTM(12, 12)), X))
    assert trace is None or not trace.fits(Backend(ACTIONS))
    assert trace is None or trace.fits(Backend(["keep_eager"]))
