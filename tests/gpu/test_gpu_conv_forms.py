"""Convolutions in other forms on a GPU: patches, groups and lines, as close to fp64 as eager is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ACTIONS = ["patch_conv", "grouped_conv", "channels_last", "pointwise_conv", "keep_eager", "cuda_graph"]

CASES: dict[str, tuple[list[nn.Module], tuple[int, ...], str]] = {
    "patches of an image": ([nn.Conv2d(3, 768, 16, stride=16)], (16, 3, 224, 224), "patch_conv"),
    "patches of few values": ([nn.Conv2d(3, 96, 4, stride=4), nn.GELU()], (16, 3, 224, 224), "patch_conv"),
    "the first layer of a sound": ([nn.Conv1d(1, 512, 10, stride=5), nn.GELU()], (4, 1, 80000), "patch_conv"),
    "wide groups with many taps": ([nn.Conv1d(768, 768, 128, padding=64, groups=16)], (4, 768, 499), "grouped_conv"),
    "groups with one tap": ([nn.Conv2d(240, 240, 1, groups=3), nn.ReLU()], (64, 240, 28, 28), "grouped_conv"),
    # Of two convolutions the copies at both ends cost more than turning them gains.
    "lines": (
        [*(layer for _ in range(8) for layer in (nn.Conv1d(256, 256, 3, padding=4, dilation=4), nn.GELU()))],
        (8, 256, 8000), "channels_last",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def error_of(result: Tensor, oracle: Tensor) -> float:
    return float((result.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_in_another_form_is_as_close_to_fp64_as_eager(name, dtype):
    layers, shape, expected = CASES[name]
    model = copy.deepcopy(nn.Sequential(*layers)).to("cuda", dtype).eval()
    x = torch.randn(shape, device="cuda", dtype=dtype)
    patch = install(Workload("conv", model, (x,)), ACTIONS, name="candidate")
    found = {change.action: change.config for change in patch.log().descriptors}
    print(name, dtype, found, patch.log().refusals)
    if dtype is torch.bfloat16:
        assert expected in found
    with torch.no_grad():
        ours, theirs = patch.model(x), model(x)
        oracle = copy.deepcopy(model).double()(x.double())
        assert ours.stride() == theirs.stride()
        assert error_of(ours, oracle) <= 1.25 * error_of(theirs, oracle) + 1e-7
        model[0].weight.mul_(-1)
        torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)
