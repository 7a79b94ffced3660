"""Several compiled graphs with Python between them: one replay of all that they and the ops between them run."""

from __future__ import annotations

import fake_capture
import pytest
import torch
from patch_models import Block, build, workload
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from agnitra_lab.patch.install import Patch, install
from agnitra_lab.patch.paths import Paths
from agnitra_lab.patch.rollback import MutableState

KEPT: list[int] = []
X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


@pytest.fixture(autouse=True)
def a_capture_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    fake_capture.install(monkeypatch)
    # A replay without a GPU is the call and a copy.
    monkeypatch.setattr(Paths, "_walls_ms", lambda self, paths: [2.0, 1.0])
    yield
    torch._dynamo.reset()


class Broken(nn.Module):
    """A block twice, with an op between its graphs that is in none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = 2.0

    def forward(self, x):
        first = self.block(x) * self.scale
        torch._dynamo.graph_break()
        return {"states": [first, self.block(first)], "note": "n"}


def replayed(model: nn.Module, *args) -> Patch:
    """Install a model as on a GPU, where a CUDA graph may hold its call."""
    made = workload(model, *args)
    patch = install(made, ["qkv_concat"], name="candidate", is_lowered=False)
    assert patch.model.__dict__["_agnitra_fast"] is None
    paths = Paths(made, MutableState.of(made).only_written(), [])
    path, reason = paths.of_compiled(patch.model.__dict__["_agnitra_compiled"], patch._backend, should_capture=True)
    assert reason is None and paths.has_captured
    patch.model.take_fast_path(path)
    return patch


def test_the_replay_gives_what_the_model_gives_and_its_results_last():
    model = build(Broken)
    patch = replayed(model, X)
    assert patch.log().num_graphs == 2 and len(patch.log().descriptors) == 2
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        kept = [(scale, patch.model(X * scale)) for scale in (1, 2, 3, 4)]
        for scale, found in kept:
            expected = model(X * scale)
            assert found["note"] == "n"
            torch.testing.assert_close(found["states"], expected["states"])
    assert not patch.model.fast_path_misses and not patch.model.guard_misses


def test_derived_weights_of_all_graphs_follow():
    model = build(Broken)
    patch = replayed(model, X)
    with torch.no_grad():
        model.block.attention.query.weight.mul_(1.5)
        torch.testing.assert_close(patch.model(X)["states"], model(X)["states"])
    assert not patch.model.fast_path_misses


def test_a_changed_setting_goes_back_to_dynamo():
    model = build(Broken)
    patch = replayed(model, X)
    model.scale = 3.0
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X)["states"], model(X)["states"])
    assert sum(patch.model.fast_path_misses.values()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "count", getattr(model, "count", 0) + 1), "Python value"),
        (lambda model: model.register_forward_hook(lambda *given: KEPT.append(1)), "a hook"),
    ],
    ids=["counts its calls", "has a hook that keeps something"],
)
def test_what_python_does_beside_computing_is_not_left_out(change, reason):
    class Counting(Broken):
        def forward(self, x):
            if reason == "Python value":
                change(self)
            return super().forward(x)

    model = build(Counting)
    if reason == "a hook":
        change(model)
    made = workload(model, X)
    patch = install(made, ["qkv_concat"], name="candidate", is_lowered=False)
    paths = Paths(made, MutableState.of(made).only_written(), [])
    path, found = paths.of_compiled(patch.model.__dict__["_agnitra_compiled"], patch._backend, should_capture=True)
    assert path is None and reason in found and not paths.has_captured


def paths_of(model: nn.Module) -> tuple[Patch, Paths]:
    made = workload(model, X)
    patch = install(made, ["qkv_concat"], name="candidate", is_lowered=False)
    return patch, Paths(made, MutableState.of(made).only_written(), [])


def test_a_replay_that_takes_longer_than_the_call_through_dynamo_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Paths, "_walls_ms", lambda self, paths: [1.0, 2.0])
    patch, paths = paths_of(build(Broken))
    path, reason = paths.of_compiled(patch.model.__dict__["_agnitra_compiled"], patch._backend, should_capture=True)
    assert path is None and reason is not None and "2.000 ms against 1.000 ms" in reason
    assert paths.has_captured


def test_too_little_memory_for_a_replay_leaves_the_candidate_as_it_is(monkeypatch: pytest.MonkeyPatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("agnitra_lab.patch.paths.GraphedCall", too_large)
    patch, paths = paths_of(build(Broken))
    path, reason = paths.of_compiled(patch.model.__dict__["_agnitra_compiled"], patch._backend, should_capture=True)
    assert path is None and reason is not None and "out of memory" in reason
    assert not paths.has_captured
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X)["states"], patch.model._orig_mod(X)["states"])


def test_ops_of_the_graphs_are_seen_behind_dynamo_which_runs_no_compiled_code_inside_a_mode():
    model = build(Broken)
    patch = replayed(model, X)
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    num_graphs = patch.log().num_graphs
    with torch.no_grad(), patch._backend.watched(Names()):
        patch.model.__dict__["_agnitra_compiled"](X)
    assert patch.log().num_graphs == num_graphs
    # Six products of each block, of which the graphs have merged three.
    assert seen.count("aten.mm.default") == 2 * 4
    seen.clear()
    with torch.no_grad():
        patch.model.__dict__["_agnitra_compiled"](X)
    assert not seen
