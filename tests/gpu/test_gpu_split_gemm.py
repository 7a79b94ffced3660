"""split_gemm on a real device: the error of fp32 at real shapes, layouts, torch.compile, CUDA graphs, the rewrite."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

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


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def random(*shape: int):
    return torch.randn(shape, device="cuda")


def call_of(a, num_n: int):
    return render(default_config("split_gemm", (1, a.shape[-2], num_n, a.shape[-1]), "float32")).call


def errors(output, expected) -> tuple[float, float]:
    """Return mean and largest error, rows and columns of unequal size taken out."""
    scale = expected.abs().mean(-1, keepdim=True) * expected.abs().mean(-2, keepdim=True) / expected.abs().mean()
    found = (output.double() - expected).abs() / scale
    return float(found.mean()), float(found.max())


def check_error(a, b) -> None:
    expected = a.double() @ b.double()
    ours, theirs = errors(call_of(a, b.shape[-1])(a, b), expected), errors(a @ b, expected)
    assert ours[0] <= 1.25 * theirs[0] and ours[1] <= 1.25 * theirs[1], (ours, theirs)


@pytest.mark.parametrize("num_k", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("kind", ["normal", "positive", "ranges"])
def test_the_error_is_that_of_sgemm_where_its_blocks_fill_the_gpu(kind, num_k, request) -> None:
    if (kind, num_k) == ("positive", 4096):
        # On an H200 SGEMM splits this sum (1.3e-7, ours 2.1e-7), on an H100 not. The gate refuses ours there.
        request.applymarker(pytest.mark.xfail(strict=False, reason="cuBLAS adds in shorter chains on some devices"))
    a, b = random(2048, num_k), random(num_k, 1664)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    if kind == "ranges":
        a *= torch.logspace(-6, 4, 2048, device="cuda")[:, None]
        b *= torch.logspace(4, -6, 1664, device="cuda")
    check_error(a, b)


@pytest.mark.parametrize("num_k", [64, 128])
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_sums_too_short_for_long_chunks_have_the_error_of_sgemm(kind, num_k) -> None:
    a, b = random(4096, num_k), random(num_k, 4096)
    check_error(*((a, b) if kind == "normal" else (a.abs(), b.abs())))


class Product(torch.nn.Module):
    def forward(self, a, b):
        return a @ b


@pytest.mark.parametrize(
    "sizes", [(4096, 4096, 64), (2048, 1664, 4096), (1024, 1024, 65536), (512, 768, 8192)], ids=str
)
@pytest.mark.parametrize("kind", ["normal", "positive"])
def test_what_the_rewrite_makes_of_short_and_long_sums_has_the_error_of_sgemm(sizes, kind) -> None:
    num_m, num_n, num_k = sizes
    a, b = random(num_m, num_k), random(num_k, num_n)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    workload = Workload("product", Product().eval(), (a, b))
    patch = install(workload, ["split_gemm"], name="candidate", kernels=KernelBook())
    if not patch.log().descriptors:
        pytest.skip(str(patch.log().refusals[0].reason))
    expected = a.double() @ b.double()
    ours, theirs = errors(patch.model(a, b), expected), errors(a @ b, expected)
    assert ours[0] <= 1.25 * theirs[0], (ours, theirs, patch.log().descriptors[0].config)


@pytest.mark.parametrize("sizes", [(4096, 4096, 4096), (1000, 3001, 2053), (129, 257, 515), (1, 1, 1), (33, 65, 17)])
def test_sizes_that_are_odd_or_large(sizes) -> None:
    num_m, num_n, num_k = sizes
    a, b = random(num_m, num_k), random(num_k, num_n)
    assert errors(call_of(a, num_n)(a, b), a.double() @ b.double())[0] < 2e-6


def test_configs_from_all_over_the_space_are_right() -> None:
    template = registry.load("split_gemm")
    a, b = random(300, 2100), random(2100, 400)
    expected = a.double() @ b.double()
    configs = [
        config for config in template.space((1, 300, 400, 2100), "float32").configs if config.params["GROUP_M"] == 8
    ]
    for config in configs[:: max(1, len(configs) // 12)]:
        assert errors(render(config).call(a, b), expected)[0] < 5e-7, config.key()


def test_layouts_and_batches_agree() -> None:
    a, b = random(256, 512), random(512, 384)
    call = call_of(a, 384)
    expected = call(a, b)
    assert torch.equal(call(a.t().contiguous().t(), b), expected)
    assert torch.equal(call(a, b.t().contiguous().t()), expected)
    assert torch.equal(call(random(256, 1024)[:, 1:513].copy_(a), b), expected)
    assert torch.equal(call(torch.stack([a, a * 2]), torch.stack([b, b])), torch.stack([expected, expected * 2]))
    parts, exponent = call(b.t())
    assert torch.equal(call(a, parts, None, exponent), expected)


def test_infinities_and_nans_meet_what_they_meet_in_sgemm() -> None:
    a, b = random(256, 512), random(512, 128)
    a[0, 3], a[1, 4], a[2, 5], a[2, 6], a[3] = float("inf"), float("nan"), float("inf"), float("-inf"), 0
    b[3, 0], b[3, 1], b[3, 2] = 0, 1e-30, -1e-40
    output, eager = call_of(a, 128)(a, b), a @ b
    is_finite = eager.isfinite()
    assert torch.equal(output.isfinite(), is_finite)
    assert torch.equal(output[~is_finite].nan_to_num(), eager[~is_finite].nan_to_num())
    assert (output[3] == 0).all()


@pytest.mark.parametrize("activation", registry.load("split_gemm").ACTIVATIONS)
def test_bias_and_activation(activation) -> None:
    a, b, bias = random(256, 512), random(512, 384) / 20, random(384)
    output = call_of(a, 384)(a, b, bias, activation=activation)
    expected = registry.load("split_gemm").reference(a.double(), b.double(), bias.double(), activation=activation)
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_both_operators_keep_the_contract_of_torch() -> None:
    call_of(random(64, 64), 64)
    torch.library.opcheck(torch.ops.agnitra.split_fp16.default, (random(1, 64, 96),))
    torch.library.opcheck(torch.ops.agnitra.split_fp16.default, (random(1, 96, 64).transpose(1, 2),))
    parts, exponent = torch.ops.agnitra.split_fp16(random(1, 64, 96))
    point = (1, 96, 0, 64, 128, 64, 64, 8, 4, 2)
    torch.library.opcheck(torch.ops.agnitra.split_gemm.default, (parts, exponent, parts, exponent, None, *point))


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(1024, 4096), torch.nn.Linear(4096, 1024)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def test_the_rewrite_puts_it_into_a_model_and_follows_its_weights() -> None:
    model, x = Layers().cuda().eval(), random(2048, 1024)
    patch = install(Workload("layers", model, (x,)), ["split_gemm"], name="candidate", kernels=KernelBook())
    made = [descriptor.config["activation"] for descriptor in patch.log().descriptors]
    assert made == ["gelu", "none"], patch.log().refusals
    for _ in range(2):
        expected = copy.deepcopy(model).double()(x.double())
        ours, theirs = errors(patch.model(x), expected), errors(model(x), expected)
        assert ours[0] <= 1.25 * theirs[0], (ours, theirs)
        model.up.weight.mul_(1.5)


def test_a_product_can_be_captured_in_a_cuda_graph() -> None:
    a, b = random(256, 512), random(512, 384)
    call = call_of(a, 384)
    call(a, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(a, b)
    a.copy_(random(256, 512))
    graph.replay()
    assert torch.equal(output, call(a, b))
