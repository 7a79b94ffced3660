"""The fast path: past Dynamo's guards, and never an answer of a model that has changed since."""

from __future__ import annotations

import time

import pytest
import torch
from patch_models import Block, build, workload
from torch import nn

from agnitra_lab.patch import fast
from agnitra_lab.patch.direct import untracked_memory
from agnitra_lab.patch.fast import walls_ms
from agnitra_lab.patch.install import install
from agnitra_lab.patch.liveness import Liveness

X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def drop_in(model, *args):
    patch = install(workload(model, *args), ["qkv_concat"], name="candidate", is_lowered=False)
    return patch.model


def path_of(model):
    return model.__dict__["_agnitra_fast"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.scale = 2.0
        self.activation = torch.relu
        self.offset = torch.ones(4)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"out": self.gain * self.activation(self.linear(x)) * self.scale + self.offset, "x": x}


def test_a_call_goes_past_dynamo_and_keeps_structure_and_identity():
    model = build(Scaled)
    fast = drop_in(model, X)
    assert path_of(fast).name == "direct"
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        x = X + 1
        ours, theirs = fast(x), model(x)
    assert ours["x"] is x
    torch.testing.assert_close(ours["out"], theirs["out"])
    assert not fast.fast_path_misses
    assert not fast.guard_misses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "scale", 3.0), "attributes changed"),
        (lambda m: setattr(m, "activation", torch.tanh), "attributes changed"),
        (lambda m: setattr(m, "offset", torch.zeros(4)), "weights changed"),
        (lambda m: setattr(m, "linear", build(lambda: nn.Linear(12, 4))), "weights changed"),
        (lambda m: setattr(m.linear, "weight", nn.Parameter(torch.ones(4, 12))), "weights changed"),
        (lambda m: setattr(m, "gain", nn.Parameter(torch.ones(1))), "weights changed"),
        (lambda m: setattr(m.linear.weight, "data", torch.ones(4, 12)), "weights moved"),
        (lambda m: setattr(m.linear, "forward", lambda x: x[..., :4]), "attributes changed"),
    ],
    ids=["number", "function", "tensor attribute", "module", "parameter", "equal scalar", "data", "method"],
)
def test_a_changed_model_gives_the_new_answer_and_the_change_is_counted(change, reason):
    model = build(Scaled)
    fast = drop_in(model, X)
    change(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(X)["out"], model(X)["out"])
    assert fast.fast_path_misses == {reason: 1}


def test_torchs_global_state_is_part_of_the_check():
    model = build(Scaled)
    fast = drop_in(model, X)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            torch.testing.assert_close(fast(X)["out"], model(X)["out"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert fast.fast_path_misses == {"torch's global state": 1}


def test_updated_weights_reach_derived_ones_of_a_call_that_was_launched_before_the_check():
    model = build(Block)
    fast = drop_in(model, X)
    assert path_of(fast) is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(fast(X), model(X))


def test_a_model_with_a_graph_break_keeps_dynamo():
    class Broken(Scaled):
        def forward(self, x):
            x = self.linear(x)
            torch._dynamo.graph_break()
            return torch.relu(x)

    model = build(Broken)
    fast = drop_in(model, X)
    assert path_of(fast) is None
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_a_model_that_counts_its_calls_keeps_dynamo():
    class Counting(Scaled):
        num_calls = 0

        def __init__(self):
            super().__init__()
            self.num_calls = 0

        def forward(self, x):
            self.num_calls += 1
            return self.linear(x) * self.num_calls

    model = build(Counting)
    fast = drop_in(model, X)
    assert path_of(fast) is None
    model.num_calls = 0
    with torch.no_grad():
        outputs = [fast(X) for _ in range(3)]
    for index, output in enumerate(outputs, 1):
        torch.testing.assert_close(output, nn.functional.linear(X, model.linear.weight, model.linear.bias) * index)


def test_state_is_written_once_a_call():
    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(12))

        def forward(self, x):
            self.total.add_(x.sum((0, 1)))
            return self.total * 2

    model = build(Summing)
    fast = drop_in(model, X)
    assert model.total.count_nonzero() == 0
    with torch.no_grad():
        for _ in range(3):
            fast(X)
    torch.testing.assert_close(model.total, 3 * X.sum((0, 1)))


def test_memory_that_nothing_watches_is_found_on_a_gpu_alone():
    model = build(Scaled)
    assert untracked_memory(lambda: model(X), [X], Liveness(model)) is None


def test_a_rolled_back_model_has_no_fast_path():
    model = build(Scaled)
    patch = install(workload(model, X), ["qkv_concat"], name="candidate", is_lowered=False)
    assert patch.rollback().is_restored
    assert path_of(patch.model) is None


def test_a_busy_host_does_not_turn_the_faster_path_into_the_slower_one():
    num_calls = 0

    def waits_for_its_host(args, kwargs):
        nonlocal num_calls
        num_calls += 1
        time.sleep(0.001 if num_calls % 3 == 0 else 0.02)

    def steady(args, kwargs):
        time.sleep(0.005)

    first_ms, second_ms = walls_ms([waits_for_its_host, steady], (), {}, lambda: None)
    assert first_ms < second_ms


def test_long_calls_are_timed_a_few_times_only(monkeypatch):
    monkeypatch.setattr(fast, "_TIMED_S", 0.0)
    calls = []
    walls_ms(
        [lambda args, kwargs: calls.append("first"), lambda args, kwargs: calls.append("second")], (), {}, lambda: None
    )
    assert calls == ["first", "second"] * 3
