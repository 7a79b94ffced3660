"""What makes an optimisation another one: code, attributes, metadata, inputs, switches; weights' values do not."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.loop.identity import identity_of

H200 = DeviceInfo(type="cuda", name="NVIDIA H200", torch_version="2.11.0", triton_version="3.6.0")
ROOT = Path(__file__).parents[3]


class Net(nn.Module):
    def __init__(self, width: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.eps, self.options = eps, {"scale": [1.0, None]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.eps)


def of(model: object, *args: object, device: DeviceInfo = H200, **kwargs: object) -> str | None:
    return identity_of(Workload("net", model, args or (torch.zeros(2, 8),), kwargs), device)


def changed(change) -> nn.Module:
    model = Net()
    change(model)
    return model


def test_two_models_made_alike_are_the_same_whatever_their_weights() -> None:
    assert of(Net()) == of(Net())
    assert of(Net()) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "eps", 1e-6),
        lambda model: model.options["scale"].append(2.0),
        lambda model: model.train(not model.training),
        lambda model: model.half(),
        lambda model: setattr(model.last, "weight", model.first.weight),
        lambda model: setattr(model.last, "weight", nn.Parameter(model.last.weight.detach().t())),
        lambda model: model.first.requires_grad_(False),
        lambda model: model.register_buffer("extra", torch.zeros(1)),
        lambda model: model.first.register_forward_hook(lambda *given: None),
        lambda model: setattr(model.first, "forward", lambda x: x),
        lambda model: setattr(model, "last", nn.Identity()),
    ],
    ids=["attribute", "nested", "mode", "dtype", "tied", "stride", "grad", "buffer", "hook", "forward", "part"],
)  # fmt: skip
def test_a_model_that_differs_in_one_thing_is_another(change) -> None:
    assert of(changed(change)) != of(Net())


def test_inputs_of_another_shape_dtype_layout_or_name_are_another_workload() -> None:
    x = torch.zeros(2, 8)
    found = [of(Net(), x), of(Net(), x[:1]), of(Net(), x.half()), of(Net(), torch.zeros(8, 2).t()), of(Net(), x=x)]
    assert len(set(found)) == len(found)
    assert of(Net(), x + 1) == found[0]


def test_another_device_or_version_is_another_optimisation() -> None:
    others = [H200.model_copy(update={field: "other"}) for field in ("name", "torch_version", "driver_version")]
    assert len({of(Net()), *(of(Net(), device=device) for device in others)}) == 4


def test_a_switch_of_torch_that_kernels_depend_on_counts() -> None:
    before, precision = of(Net()), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision != "high" else "highest")
        assert of(Net()) != before
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_function_has_no_identity() -> None:
    assert of(lambda x: x) is None


def test_an_edited_file_that_the_code_comes_from_counts_and_processes_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scaled_layers.py").write_text("SCALE = 2\ndef scaled(x):\n    return x * SCALE\n")
    (tmp_path / "scaled_net.py").write_text(
        "from torch import nn\nfrom scaled_layers import scaled\nclass Net(nn.Module):\n"
        "    names = frozenset({'a', 'b', 'c'})\n    def forward(self, x):\n        return scaled(x)\n"
    )
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "from scaled_net import Net\nfrom agnitra_lab.contracts import DeviceInfo, Workload\n"
        "from agnitra_lab.loop.identity import identity_of\n"
        "print(identity_of(Workload('net', Net(), (torch.zeros(2),)), DeviceInfo(type='cuda', name='d')))"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    net = importlib.import_module("scaled_net")

    def asked_here() -> str | None:
        return of(net.Net(), torch.zeros(2), device=DeviceInfo(type="cuda", name="d"))

    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert there == asked_here()
    (tmp_path / "scaled_layers.py").write_text("SCALE = 30\ndef scaled(x):\n    return x * SCALE\n")
    assert there != asked_here()
