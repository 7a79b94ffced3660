"""Results of compiled code get the strides of the original's, and keep what they alias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device.row_copy import row_stride
from agnitra_lab.patch.install import install
from agnitra_lab.patch.output_strides import OutputStrides, copied, strides_of


def padded(rows: int, columns: int) -> torch.Tensor:
    """Rows of whole 8 values, of which the last ones are nobody's."""
    return torch.randn(rows, -(-columns // 8) * 8)[:, :columns]


def test_a_padded_result_gets_the_strides_of_the_original() -> None:
    original, ours = torch.randn(3, 13), padded(3, 13)
    strides = OutputStrides(strides_of(original), ours, [True])
    assert strides
    found = copied(ours, strides.of(1)[0])
    assert found.stride() == (13, 1)
    assert torch.equal(found, ours)


def test_a_result_with_the_strides_of_the_original_is_not_copied() -> None:
    ours = torch.randn(3, 13)
    strides = OutputStrides(strides_of(torch.randn(3, 13)), ours, [True])
    assert not strides
    assert strides.of(1) == [None]


def test_a_result_that_is_an_input_or_a_weight_is_not_copied() -> None:
    ours = padded(3, 13)
    assert not OutputStrides(strides_of(torch.randn(3, 13)), ours, [False])


def test_views_with_gaps_are_a_layout_to_give_back_unless_they_overlap_or_lie_far_apart() -> None:
    keys, logits = torch.randn(2, 4, 12, 3), torch.randn(2, 40, 5)
    last_keys, last_logits = keys[:, :, -7:], logits[:, -1]
    overlapping = torch.randn(9).unfold(0, 4, 1)
    assert strides_of([padded(3, 13), last_keys, torch.randn(4, 3).t(), 7]) == [(16, 1), (144, 36, 3, 1), (1, 3)]
    assert (
        strides_of([last_logits, torch.randn(3, 1).expand(3, 4), overlapping, torch.empty(0, 3)[:, 1:]]) == [None] * 4
    )
    ours = last_keys.clone()
    assert ours.stride() != last_keys.stride()
    found = copied(ours, OutputStrides(strides_of(last_keys), ours, [True]).of(1)[0])
    assert found.stride() == last_keys.stride() and torch.equal(found, last_keys)


@pytest.mark.parametrize("is_fast", [True, False], ids=["direct", "through Dynamo's guards"])
def test_a_drop_in_returns_what_can_be_flattened_as_the_originals_result(
    is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model, x = Rows().eval(), torch.randn(3, 13)
    run_as_padded(monkeypatch)
    patch = install(Workload("rows", model, (x,)), [], name="candidate")
    if not is_fast:
        patch.model.take_fast_path(None)
    with torch.no_grad():
        assert patch.model(x).view(-1).shape == (39,)
        assert torch.equal(patch.model(x), x + 1)


def run_as_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiled graphs return their matrices as Inductor returns padded products on a GPU."""
    from agnitra_lab.patch.backend import Backend

    lower = Backend._lower

    def lowered(self: Backend, *args: Any, **kwargs: Any) -> Any:
        run = lower(self, *args, **kwargs)
        return lambda *given: [padded(*value.shape).copy_(value) for value in run(*given)]

    monkeypatch.setattr(Backend, "_lower", lowered)


def test_rows_with_gaps_are_known_by_their_strides() -> None:
    rows = torch.randn(2, 3, 16)[:, :, :13]
    assert row_stride(rows) == 16
    assert row_stride(rows[:1]) == 16
    assert row_stride(rows[:, :2]) is None, "a gap between the groups of rows"
    assert row_stride(rows.transpose(0, 1)) is None
    assert row_stride(rows.contiguous()) is None
    assert row_stride(rows[0, 0]) is None
