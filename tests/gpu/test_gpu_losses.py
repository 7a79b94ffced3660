"""linear_cross_entropy on a real device: fp64 agreement at real heads, torch.compile, CUDA graphs, the rewrite."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.nn import functional as F  # noqa: E402

from agnitra_lab.contracts import Workload  # noqa: E402
from agnitra_lab.generate import registry  # noqa: E402
from agnitra_lab.generate.defaults import default_config  # noqa: E402
from agnitra_lab.generate.kernels import KernelBook  # noqa: E402
from agnitra_lab.generate.render import render  # noqa: E402
from agnitra_lab.patch.install import install  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(1, 64, 11), (5, 40, 1000), (257, 768, 50_257), (2048, 2048, 32_000), (16, 4096, 128_256)]


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def head(shape, dtype):
    num_tokens, num_k, num_classes = shape
    x = torch.randn(num_tokens, num_k, device="cuda").to(dtype)
    weight = (2 * num_k**-0.5 * torch.randn(num_classes, num_k, device="cuda")).to(dtype)
    return x, weight, torch.randint(0, num_classes, (num_tokens,), device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_heads_loss_is_nearer_to_fp64_than_eager(shape, dtype) -> None:
    x, weight, target = head(shape, dtype)
    exact = F.cross_entropy(x.double() @ weight.double().t(), target, reduction="none")
    eager = F.cross_entropy(F.linear(x, weight).float(), target, reduction="none")
    configs = registry.load("linear_cross_entropy").space(shape, str(dtype)).configs
    own = default_config("linear_cross_entropy", shape, str(dtype))
    for chosen in {
        config.key(): config for config in (own, configs[0], configs[-1], configs[len(configs) // 2])
    }.values():
        ours = render(chosen).call(x, weight, target, reduction="none", out_dtype=torch.float32)
        theirs = float((eager.double() - exact).pow(2).mean())
        assert float((ours.double() - exact).pow(2).mean()) <= 1.25**2 * theirs + 1e-12, chosen.key()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_rules_bias_and_infinities_are_those_of_torch(label_smoothing) -> None:
    x, weight, target = head((70, 128, 3000), torch.bfloat16)
    bias = torch.randn(3000, device="cuda")
    bias[7], target[:3] = -float("inf"), torch.tensor([7, -100, 2999], device="cuda")
    call = render(default_config("linear_cross_entropy", (70, 128, 3000), "bfloat16")).call
    rules = {"label_smoothing": label_smoothing}
    for reduction in ("none", "mean", "sum"):
        ours = call(x, weight, target, bias, reduction=reduction, out_dtype=torch.float32, **rules)
        exact = F.cross_entropy(
            F.linear(x.double(), weight.double(), bias.double()), target, reduction=reduction, **rules
        )
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(256, 256), torch.nn.Linear(256, 5000, bias=False)

    def forward(self, x, labels):
        logits = self.head(torch.relu(self.body(x))).float()
        return F.cross_entropy(logits[:, :-1].reshape(-1, 5000), labels[:, 1:].reshape(-1))


def test_the_rewrite_survives_inductor_and_a_cuda_graph() -> None:
    model = Model().to("cuda", torch.bfloat16).eval()
    args = (torch.randn(4, 129, 256, device="cuda").bfloat16(), torch.randint(0, 5000, (4, 129), device="cuda"))
    twin = copy.deepcopy(model).double()
    patch = install(Workload("loss", model, args), ["linear_cross_entropy", "cuda_graph"], name="candidate",
                    kernels=KernelBook())  # fmt: skip
    assert "linear_cross_entropy" in [found.action for found in patch.log().descriptors]
    torch.testing.assert_close(
        patch.model(*args).double(), twin(args[0].double(), args[1]).double(), rtol=1e-2, atol=1e-2
    )
