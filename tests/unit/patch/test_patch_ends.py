"""Calls that take and return caches go past Dynamo too: each one's own cache is written, filled and given back."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import fake_capture
import pytest
import torch
from cache_models import Cache, Filling, Growing, Layer, Output, Static, empty
from torch import nn

from agnitra_lab.contracts import Workload
from agnitra_lab.errors import PatchError
from agnitra_lab.patch import paths
from agnitra_lab.patch.ends import Arguments, Result, are_apart, changes, flat, held
from agnitra_lab.patch.graphed import GraphedCall
from agnitra_lab.patch.install import install
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.paths import Paths
from agnitra_lab.patch.rollback import MutableState


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Prefill(Static):
    """Makes a cache, and returns it with the logits."""

    def forward(self, x):
        keys = self.project(x)
        return Output(keys.sum(-1), Cache(keys))


class Returning(Static):
    """Returns the cache that it was given."""

    def forward(self, x, cache):
        return Output(super().forward(x, cache), cache)


CASES = {
    "written": (Returning(), lambda: (Cache(torch.zeros(1, 16, 8)),)),
    "growing": (Growing(), lambda: (Cache(torch.ones(1, 4, 8)),)),
    "filled": (Filling(), lambda: (empty(),)),
    "made": (Prefill(), tuple),
}


def keys_of(cache):
    return [layer.keys for layer in cache.layers]


def installed(name):
    model, make = CASES[name]
    return install(
        Workload("case", model, (torch.randn(1, 1, 8), *make())), [], name="c", is_lowered=False
    ).model, model


@pytest.mark.parametrize("name", CASES)
def test_a_call_with_a_cache_does_past_dynamo_what_the_original_does(name):
    ours, theirs = installed(name)
    mine, other = CASES[name][1](), CASES[name][1]()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        x = torch.randn(1, 1, 8)
        found, expected = ours(x, *mine), theirs(x, *other)
    assert ours.__dict__["_agnitra_fast"].name == "direct"
    assert not ours.guard_misses and not ours.fast_path_misses
    pairs = [(found, expected)] if torch.is_tensor(found) else [(found.logits, expected.logits)]
    if not torch.is_tensor(found):
        pairs += zip(keys_of(found.cache), keys_of(expected.cache), strict=True)
    for mine_held, other_held in zip(mine, other, strict=True):
        pairs += zip(keys_of(mine_held), keys_of(other_held), strict=True)
    for ours_is, theirs_is in pairs:
        torch.testing.assert_close(ours_is, theirs_is)


def test_a_cache_that_is_given_and_returned_is_the_same_object():
    ours, _ = installed("written")
    cache = Cache(torch.zeros(1, 16, 8))
    keys = cache.layers[0].keys
    with torch.no_grad():
        found = ours(torch.randn(1, 1, 8), cache)
    assert found.cache is cache and cache.layers[0].keys is keys and int(cache.position) == 5


def test_each_call_makes_a_cache_of_its_own():
    ours, _ = installed("made")
    with torch.no_grad():
        first, second = (ours(torch.full((1, 1, 8), float(step))) for step in range(2))
    assert first.cache is not second.cache and first.cache.layers[0] is not second.cache.layers[0]
    assert not torch.equal(first.cache.layers[0].keys, second.cache.layers[0].keys)


def test_a_decoding_loop_with_a_growing_cache_runs_on():
    ours, theirs = installed("growing")
    mine, other = Cache(torch.ones(1, 4, 8)), Cache(torch.ones(1, 4, 8))
    with torch.no_grad():
        for step in range(3):
            x = torch.full((1, 1, 8), float(step))
            torch.testing.assert_close(ours(x, mine), theirs(x, other))
    assert mine.layers[0].keys.shape == (1, 7, 8)
    assert dict(ours.guard_misses) == {"shape": 2}


def test_inputs_that_share_memory_with_one_that_is_written_are_left_to_dynamo():
    class Adding(nn.Module):
        def forward(self, x, y):
            x.add_(1)
            return x + y

    model = Adding()
    ours = install(Workload("case", model, (torch.ones(4), torch.ones(4))), [], name="c", is_lowered=False).model
    mine, other = torch.ones(4), torch.ones(4)
    with torch.no_grad():
        torch.testing.assert_close(ours(mine, mine), model(other, other))
    assert dict(ours.fast_path_misses) == {"inputs share memory": 1}
    with pytest.raises(PatchError, match="shares memory"):
        x = torch.ones(4)
        raise_where_written(model, x)


def raise_where_written(model, x):
    workload = Workload("case", model, (x, x))
    state = MutableState.of(workload)
    model(x, x)
    Paths(workload, state.only_written(), [])._ends(Arguments((x, x), {}), [x, x], Result(x, [x, x]))


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 8, True), (8, 8, False)], True),
        ([(0, 8, True), (4, 8, False)], False),
        ([(0, 8, False), (4, 8, False)], True),
        ([(0, 100, False), (4, 8, True)], False),
        ([(0, 100, False), (4, 8, False), (50, 8, True)], False),
        ([(0, 8, True), (0, 8, True)], False),
        ([], True),
    ],
)
def test_pieces_of_memory_are_apart_where_no_written_one_reaches_into_another(spans, expected):
    assert are_apart(spans) is expected


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "make",
    [lambda x: Pair(x, x + 1), lambda x: OrderedDict(a=x, b=x + 1), lambda x: [x, {"deep": (x + 1,)}]],
    ids=["named tuple", "ordered mapping", "nested"],
)
def test_tensors_in_any_container_are_held_to_their_shapes(make):
    class Summing(nn.Module):
        def forward(self, given):
            leaves = torch.utils._pytree.tree_leaves(given)
            return type(given), leaves[0] * leaves[1]

    model = Summing()
    ours = install(Workload("case", model, (make(torch.ones(4)),)), [], name="c", is_lowered=False).model
    with torch.no_grad():
        for x in (torch.arange(4.0), torch.arange(6.0)):
            torch.testing.assert_close(ours(make(x))[1], model(make(x))[1])
    assert dict(ours.guard_misses) == {"shape": 1}


def test_an_argument_whose_value_no_signature_compares_is_left_to_dynamo():
    class Scale:
        def __init__(self, by):
            self.by = by

    class Scaling(nn.Module):
        def forward(self, x, scale):
            return x * scale.by

    ours = install(Workload("case", Scaling(), (torch.ones(4), Scale(2.0))), [], name="c", is_lowered=False).model
    assert ours.__dict__["_agnitra_fast"] is None
    with torch.no_grad():
        assert float(ours(torch.ones(4), Scale(3.0))[0]) == 3.0


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: torch.Tensor


@pytest.mark.parametrize("make", [Slotted, lambda x: MappingProxyType({"x": x})], ids=["slots", "proxy"])
def test_a_container_that_no_signature_looks_into_is_left_to_dynamo(make):
    with pytest.raises(PatchError, match="no guard compares"):
        Arguments((make(torch.ones(2)),), {})


def test_an_attribute_is_read_where_a_property_has_its_name():
    class Odd:
        keys = property(lambda self: self.__dict__["keys"] * 0)

    odd = Odd()
    odd.__dict__["keys"] = torch.ones(2)
    assert any(value is odd.__dict__["keys"] for value in Arguments((odd,), {})((odd,), {}))


def test_what_the_first_call_was_given_is_not_kept():
    ours, _ = installed("written")
    cache = Cache(torch.zeros(1, 16, 8))
    patch = install(Workload("case", CASES["written"][0], (torch.ones(1, 1, 8), cache)), [], name="c", is_lowered=False)
    keys = weakref.ref(cache.layers[0].keys)
    model = patch.model
    del patch, cache, ours
    gc.collect()
    assert keys() is None and model.is_optimized


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, q, mask):
        return nn.functional.scaled_dot_product_attention(q * self.scale, q, q, attn_mask=mask)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x, mixing):
        return x @ (self.weight @ mixing)


MARKED = {
    "a mask": (Masked, lambda s: (torch.linspace(-1, 1, 96).view(1, 2, 6, 8), torch.ones(6, 6).bool().tril(s))),
    "a matrix": (Mixed, lambda s: (torch.linspace(-1, 1, 192).view(3, 64), torch.eye(64) * (s + 1))),
}


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("name", MARKED)
def test_an_input_whose_address_is_promised_is_an_input_all_the_same(name, is_guarded):
    make_model, make = MARKED[name]
    model, (x, given) = make_model().eval(), make(0)
    torch._dynamo.mark_static_address(given, guard=is_guarded)
    actions = ["sdpa_backend", "fold_weights"]
    ours = install(Workload("case", model, (x, given)), actions, name="c", is_lowered=False).model
    assert given._dynamo_static_input_type == ("guarded" if is_guarded else "unguarded")
    with torch.no_grad():
        for step in (0, 2, 1):
            other = make(step)[1]
            torch.testing.assert_close(ours(x, other), model(x, other))
            given.copy_(other)
            torch.testing.assert_close(ours(x, given), model(x, given))


def test_a_list_that_a_call_shortens_and_fills_is_changed_in_place():
    given = [["a", torch.ones(2)], {"b": 1, "c": 2}]
    before = held(given)
    new = torch.zeros(3)
    given[0][:] = [new]
    given[1].update(b=5, d=7)
    del given[1]["c"]
    changed = changes(before, given)
    again = [["a", torch.ones(2)], {"b": 1, "c": 2}]
    kept = again[0]
    Result(None, given, changed)(flat(None, changed), again)
    assert again[0] is kept and kept == [new] and again[1] == {"b": 5, "d": 7}


def test_a_graph_writes_what_the_call_writes_to_each_ones_own_cache(monkeypatch):
    fake_capture.install(monkeypatch)
    model, restored = Returning(), []
    cache = Cache(torch.zeros(1, 16, 8))
    args = (torch.randn(1, 1, 8), cache)
    arguments = Arguments(args, {})
    first = arguments(args, {})

    def run(given):
        args, kwargs = arguments.rebuilt(given)
        return flat(model(*args, **kwargs), [])

    tensors = [index for index, value in enumerate(first) if torch.is_tensor(value)]
    with torch.no_grad():
        graph = GraphedCall(run, first, Liveness(model), written=tensors[1:], restore=lambda: restored.append(True))
        assert not cache.layers[0].keys.any() and int(cache.position) == 4 and restored
        for start in (4, 9):
            x, mine, other = torch.randn(1, 1, 8), Cache(torch.zeros(1, 16, 8)), Cache(torch.zeros(1, 16, 8))
            mine.position.fill_(start)
            other.position.fill_(start)
            given = arguments((x, mine), {})
            found = graph(given)
            torch.testing.assert_close(found[0], model(x, other).logits)
            torch.testing.assert_close(mine.layers[0].keys, other.layers[0].keys)
            assert int(mine.position) == start + 1
            assert found[1] is mine.layers[0].keys and found[2] is mine.position


def test_a_graph_is_made_and_tried_without_gradients_as_it_is_called(monkeypatch):
    """A product with `out=` behind a graph refuses weights that require gradients where these are recorded."""
    seen = []

    class Recording(GraphedCall):
        def __call__(self, given):
            seen.append(torch.is_grad_enabled())
            return super().__call__(given)

        def _warm_call(self):
            seen.append(torch.is_grad_enabled())
            return super()._warm_call()

    fake_capture.install(monkeypatch)
    monkeypatch.setattr(paths, "GraphedCall", Recording)
    model = nn.Linear(8, 8)
    workload = Workload("case", model, (torch.ones(2, 8),))
    given = Paths(workload, MutableState.of(workload).only_written(), [])
    ends = given._ends(Arguments(workload.args, {}), workload.args, Result(torch.ones(1), []))
    given._graphed(lambda values: [model(*values)], workload.args, ends)
    assert seen and not any(seen)


def test_a_written_input_that_is_returned_agrees_with_the_call(monkeypatch):
    fake_capture.install(monkeypatch)
    keys = torch.zeros(4)
    kept = keys.clone()
    graph = GraphedCall(
        lambda given: [given[0].add_(1), given[0] * 2], [keys], Liveness(nn.Identity()), written=[0],
        restore=lambda: keys.copy_(kept),
    )  # fmt: skip
    graph._kept = {0: kept}
    assert graph._agrees([keys]) and not keys.any()


def test_a_graph_that_writes_to_an_input_of_its_own_accord_is_refused(monkeypatch):
    fake_capture.install(monkeypatch)

    def run(given):
        return [given[0].add_(1)]

    with pytest.raises(PatchError, match="writes to an input"):
        GraphedCall(run, [torch.ones(4)], Liveness(nn.Identity()))


def test_a_layer_that_a_call_adds_is_a_new_one_each_time():
    ours, _ = installed("filled")
    first, second = empty(), empty()
    with torch.no_grad():
        ours(torch.ones(1, 1, 8), first)
        ours(torch.zeros(1, 1, 8), second)
    assert isinstance(first.layers[0], Layer) and first.layers[0] is not second.layers[0]
    assert not torch.equal(first.layers[0].keys, second.layers[0].keys)
