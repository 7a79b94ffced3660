"""What hooks and functions reach and change in a call is seen; what they hand on is not in the way of the fast path."""

from __future__ import annotations

import functools
from collections import deque
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from patch_models import build, workload
from torch import nn

from agnitra_lab.patch.install import install
from agnitra_lab.patch.side_effects import Reached

X = torch.linspace(-1, 1, 24).reshape(2, 12)
KEPT: list[Any] = []
COUNTS = {"calls": 0}
LAST: deque[Any] = deque(maxlen=2)
HANDED_ON: ContextVar[list[Any] | None] = ContextVar("HANDED_ON", default=None)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Counting(Small):
    def forward(self, x):
        COUNTS["calls"] += 1
        return torch.relu(self.linear(x))


class Recorder:
    def __init__(self) -> None:
        self.shapes: list[Any] = []
        self.last: Any = None

    def keep(self, module, args, output):
        self.last = output

    def __call__(self, module, args, output):
        self.shapes.append(output.shape)


def hooked(hook: Any, register: str = "register_forward_hook") -> nn.Module:
    model = build(Small)
    getattr(model.linear, register)(hook)
    return model


def counter() -> Any:
    number = 0

    def count(module, args, output):
        nonlocal number
        number += 1

    return count


def keep_in(kept: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    kept.append(output)


def changes(model: nn.Module) -> bool:
    model(X)
    reached = Reached(model)
    model(X)
    return reached.has_changed()


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(lambda module, args, output: KEPT.append(output)),
        lambda: hooked(lambda module, args: KEPT.append(args), "register_forward_pre_hook"),
        lambda: hooked(lambda module, args, output: LAST.append(output)),
        lambda: hooked(counter()),
        lambda: hooked(Recorder()),
        lambda: hooked(Recorder().keep),
        lambda: hooked(functools.partial(keep_in, [])),
        lambda: build(Counting),
    ],
    ids=[
        "a list of the file", "before the call", "a full deque", "a number of the function around it", "an object",
        "an attribute", "a list that it was given", "a forward that counts",
    ],
)  # fmt: skip
def test_what_is_kept_of_a_call_is_seen(make: Any) -> None:
    assert changes(make())


def test_a_list_of_millions_takes_no_time_and_is_seen_to_grow() -> None:
    kept: list[Any] = [None] * 2_000_000
    model = hooked(lambda module, args, output: kept.append(output))
    reached = Reached(model)
    assert sum(len(parts) for _, parts in reached._held) < 100
    model(X)
    assert reached.has_changed()


def hand_on(module: nn.Module, args: Any, output: Any) -> Any:
    found = HANDED_ON.get()
    if found is not None:
        found.append(output)
    return output * 2


@pytest.mark.parametrize(
    "make",
    [lambda: build(Small), lambda: hooked(lambda module, args, output: output * 2), lambda: hooked(hand_on)],
    ids=["no hook", "a hook that computes", "a hook that hands on what somebody asks for"],
)
def test_what_only_computes_takes_the_fast_path(make: Any) -> None:
    model = make()
    assert not changes(model)
    patch = install(workload(model, X), ["qkv_concat"], name="candidate", is_lowered=False)
    assert patch.model.__dict__["_agnitra_fast"] is not None or patch.log().num_graphs > 1
    with torch.no_grad():
        torch.testing.assert_close(patch.model(X + 1), model(X + 1))


def test_a_forward_that_counts_goes_on_counting() -> None:
    model = build(Counting)
    patch = install(workload(model, X), ["qkv_concat"], name="candidate", is_lowered=False)
    before = COUNTS["calls"]
    with torch.no_grad():
        for _ in range(3):
            patch.model(X)
    assert COUNTS["calls"] == before + 3
