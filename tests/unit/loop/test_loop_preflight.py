"""What is known before a run: a model that does not run, and values that nothing could compare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agnitra_lab.contracts import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.loop.preflight import check_comparable, check_runs


class Mixed(nn.Module):
    """A product with a sparse matrix, given back sparse or dense."""

    def __init__(self, is_dense):
        super().__init__()
        self.is_dense = is_dense

    def forward(self, matrix, x):
        result = torch.sparse.mm(matrix, x) if matrix.is_sparse else matrix @ x
        return result if self.is_dense else result.to_sparse()


def test_a_model_that_does_not_take_its_inputs_is_named_with_its_own_words():
    with pytest.raises(UsageError, match="case does not run on its inputs: RuntimeError: mat1 and mat2"):
        check_runs(Workload("case", nn.Linear(4, 2), (torch.ones(3, 5),)))


@pytest.mark.parametrize(
    ("is_dense", "matrix", "what"),
    [(True, torch.eye(3).to_sparse(), "input"), (False, torch.eye(3), "output")],
    ids=["taken", "given"],
)
def test_a_sparse_tensor_is_refused_by_its_place_before_anything_is_measured(is_dense, matrix, what):
    workload = Workload("case", Mixed(is_dense), (matrix, torch.ones(3, 3)))
    check_runs(workload)
    with pytest.raises(UsageError, match=f"case has the {what}.*sparse"):
        check_comparable(workload)


def test_dense_values_of_any_kind_can_be_compared():
    check_comparable(Workload("case", nn.Linear(4, 2), (torch.ones(1, 4).expand(3, 4),)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("wrap", "what"),
    [(lambda inner: inner, "case is TorchScript"), (nn.Sequential, "case has the TorchScript module 0")],
    ids=["whole", "a part"],
)
@pytest.mark.parametrize("convert", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 4))])
def test_torch_script_is_refused_with_what_to_give_instead(convert, wrap, what):
    workload = Workload("case", wrap(convert(nn.Linear(4, 2))), (torch.ones(3, 4),))
    check_runs(workload)
    with pytest.raises(UsageError, match=what) as refused:
        check_comparable(workload)
    assert "nn.Module" in str(refused.value.hint)
