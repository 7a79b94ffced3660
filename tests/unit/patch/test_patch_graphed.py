"""What a replay gives its callers: large results as they are, and never one that somebody else still holds."""

from __future__ import annotations

import fake_capture
import pytest
import torch
from torch import Tensor, nn

from agnitra_lab.patch import graphed
from agnitra_lab.patch.graphed import GraphedCall
from agnitra_lab.patch.liveness import Liveness


@pytest.fixture(autouse=True)
def a_capture_without_a_gpu(monkeypatch):
    fake_capture.install(monkeypatch)


class Model(nn.Module):
    """Returns a product, a view of it, its input, a constant and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(32.0))
        self.constant = [torch.full((32,), 3.0)]

    def forward(self, x):
        product = x * self.table
        return {"product": product, "view": product[8:], "x": x, "constant": self.constant[0], "table": self.table}


class Named(GraphedCall):
    """A graph of a model's call whose results have their names again."""

    def __init__(self, model, *given, **settings) -> None:
        result = model(*given)
        super().__init__(lambda values: list(model(*values).values()), given, Liveness(model), **settings)
        self.names = list(result)

    def __call__(self, given):
        return (
            dict(zip(self.names, super().__call__(given), strict=True))
            if hasattr(self, "names")
            else super().__call__(given)
        )


X = [torch.linspace(0, scale, 32) for scale in (1, 2, 3, 4, 5)]


def call_of(model) -> GraphedCall:
    return Named(model, X[0])


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_results_that_are_kept_keep_their_values():
    model = Model()
    call = call_of(model)
    kept = [call([x]) for x in X]
    for found, x in zip(kept, X, strict=True):
        for name, expected in model(x).items():
            assert torch.equal(found[name], expected), name


def test_a_loop_that_holds_one_result_at_a_time_replays_and_copies_nothing():
    call = call_of(Model())
    seen = set()
    before = [instance.graph.num_replays for instance in call._instances]
    for x in (*X, *X):
        result = call([x])
        seen.add(memory(result["product"]))
    after = [instance.graph.num_replays for instance in call._instances]
    assert len(seen) == 2 and sum(after) - sum(before) == 2 * len(X)


def test_a_view_of_a_result_is_enough_to_keep_it():
    model = Model()
    call = call_of(model)
    part = call([X[1]])["view"][3:5]
    for x in X[2:]:
        call([x])
    assert torch.equal(part, model(X[1])["view"][3:5])


def test_constants_are_copied_and_inputs_and_the_models_own_tensors_given():
    model = Model()
    call = call_of(model)
    first = call([X[1]])
    assert first["x"] is X[1]
    first["constant"].zero_()
    second = call([X[2]])
    assert torch.equal(second["constant"], torch.full((32,), 3.0)) and model.constant[0][0] == 3.0
    assert second["table"] is model.table


def test_memory_that_a_caller_gives_back_to_the_device_is_not_lent_again():
    model = Model()
    call = call_of(model)
    for x in X[:2]:
        call([x])["product"].untyped_storage().resize_(0)
    assert torch.equal(call([X[2]])["product"], model(X[2])["product"])


@pytest.mark.parametrize("lack", ["small results", "no room"])
def test_small_results_and_full_devices_get_copies(lack, monkeypatch):
    monkeypatch.setattr(graphed, "_LEAST_LENT_BYTES", 2**20 if lack == "small results" else 64)
    monkeypatch.setattr(graphed, "_free_bytes", lambda: -1 if lack == "no room" else 2**40)
    model = Model()
    call = call_of(model)
    assert len(call._instances) == 1
    kept = [call([x])["product"] for x in X]
    assert len({memory(tensor) for tensor in kept}) == len(X)
    assert all(torch.equal(found, model(x)["product"]) for found, x in zip(kept, X, strict=True))
