"""Caches that are plain objects, as transformers' decoders take and give: left as they were, and checked."""

from __future__ import annotations

import pytest
import torch
from cache_models import Cache, Filling, Growing, Output, Static, empty

from agnitra_lab.benchmark.equivalence import check
from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import compile_mode, eager, install


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Prefill(Static):
    """Returns a cache whose rows Inductor leaves in another order than eager."""

    def forward(self, x):
        keys = self.project(x).view(2, -1, 4, 2).transpose(1, 2)
        keys = torch.cat([torch.tensor([]), keys * 2], -2)
        return Output(torch.relu(keys).transpose(1, 2).flatten(2), Cache(keys))


CASES = {
    "static": (Static(), lambda: Cache(torch.zeros(1, 16, 8))),
    "growing": (Growing(), lambda: Cache(torch.ones(1, 4, 8))),
    "empty": (Filling(), empty),
}


@pytest.mark.parametrize("name", CASES)
def test_a_callers_cache_is_as_it_was_after_install_and_rollback(name):
    model, make = CASES[name]
    cache = make()
    lengths = [layer.keys.shape for layer in cache.layers]
    patch = install(Workload("case", model, (torch.randn(1, 1, 8), cache)), [], name="candidate", is_lowered=False)
    assert patch.rollback().is_restored
    assert [layer.keys.shape for layer in cache.layers] == lengths
    assert name != "static" or (int(cache.position) == 4 and not cache.layers[0].keys.any())


@pytest.mark.parametrize("name", CASES)
def test_a_model_agrees_with_itself_whatever_it_does_to_its_cache(name):
    model, make = CASES[name]
    found = check(Workload("case", model, (torch.randn(1, 1, 8), make())), model, seeds=(0,))
    assert found.is_equivalent, found.problems


def test_a_cache_that_is_left_different_is_a_problem():
    class Other(Growing):
        def forward(self, x, cache):
            out = super().forward(x, cache)
            cache.layers[0].keys = cache.layers[0].keys * 1.5
            return out

    model = Other()
    model.load_state_dict(CASES["growing"][0].state_dict())
    workload = Workload("case", CASES["growing"][0], (torch.randn(1, 1, 8), Cache(torch.ones(1, 4, 8))))
    found = check(workload, model, seeds=(0,))
    assert any("keys is left different" in problem for problem in found.problems)


def test_a_cache_of_another_length_runs_the_original_and_is_counted():
    model = CASES["static"][0]
    patch = install(
        Workload("case", model, (torch.randn(1, 1, 8), Cache(torch.zeros(1, 16, 8)))), [], name="candidate",
        is_lowered=False,
    )  # fmt: skip
    with torch.no_grad():
        patch.model(torch.randn(1, 1, 8), Cache(torch.zeros(1, 16, 8)))
        assert patch.model.num_guard_misses == 0
        patch.model(torch.randn(1, 1, 8), Cache(torch.zeros(1, 20, 8)))
    assert dict(patch.model.guard_misses) == {"shape": 1}


def test_a_returned_cache_has_the_strides_of_the_originals():
    workload = Workload("case", Prefill(), (torch.randn(2, 6, 8),))
    with torch.no_grad():
        wanted = workload()
        ours = compile_mode(workload, "default").model(*workload.args)
        again = eager(workload).model(*workload.args)
    assert isinstance(ours.cache, Cache)
    for result in (ours, again):
        assert result.cache.layers[0].keys.stride() == wanted.cache.layers[0].keys.stride()
    assert check(workload, compile_mode(workload, "default").model, seeds=(0,)).is_equivalent
