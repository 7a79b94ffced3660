"""The norm templates and gates on a real device: fp64 agreement at real shapes, no worse than eager, one graph."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.nn import functional as F  # noqa: E402

from agnitra_lab.contracts import KernelConfig, Workload  # noqa: E402
from agnitra_lab.generate import registry  # noqa: E402
from agnitra_lab.generate.defaults import default_config  # noqa: E402
from agnitra_lab.generate.kernels import KernelBook  # noqa: E402
from agnitra_lab.generate.render import render  # noqa: E402
from agnitra_lab.patch.install import install  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def random(*shape: int, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def edge_configs(template: str, shape: tuple[int, ...], dtype):
    configs = registry.load(template).space(shape, str(dtype)).configs
    looped = [config for config in configs if config.params["num_stages"] > 1]
    split = [config for config in configs if config.params.get("SPLIT", 1) > 1]
    # Blocks that hold the row together, and wait for each other.
    held = math.prod(shape[1:]) if template in ("layer_norm", "group_norm") else math.inf
    joined = [config for config in split if config.params["SPLIT"] * config.params["BLOCK_N"] >= held]
    chosen = [
        configs[0],
        configs[-1],
        default_config(template, shape, str(dtype)),
        *looped[-1:],
        *split[:1],
        *split[-1:],
        *joined[:1],
        *joined[-1:],
    ]
    return list({config.key(): config for config in chosen}.values())


def error(output, expected) -> float:
    return float((output.double() - expected).abs().mean())


def check(template: str, site: tuple[int, ...], dtype, run, eager, exact) -> None:
    """Hold every edge config to 1.25 times eager's mean error against fp64."""
    allowed = 1.25 * error(eager, exact) + 1e-9
    for config in edge_configs(template, site, dtype):
        output = run(render(config).call)
        assert output.shape == exact.shape and output.dtype == dtype
        assert error(output, exact) <= allowed, (config.key(), error(output, exact), allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(
    # A row's scale is right to a unit in its last place or it is not: a mean over 4 rows would be chance.
    "shape",
    [(1, 1), (5, 77), (257, 768), (33, 1023), (64, 4096), (40, 20001), (300, 20000), (1, 4096), (9, 2**20 + 3)],
)
def test_layer_norm_is_as_near_to_fp64_as_eager(shape, offset, dtype) -> None:
    x, weight, bias = (
        random(*shape, dtype=dtype) + offset,
        random(shape[-1], dtype=dtype),
        random(shape[-1], dtype=dtype),
    )
    residual = random(*shape, dtype=dtype)
    exact = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), EPS)
    eager = F.layer_norm(x, shape[1:], weight, bias, EPS)
    check("layer_norm", shape, dtype, lambda call: call(x, weight, bias, EPS), eager, exact)
    total = x + residual
    exact = F.layer_norm(total.double(), shape[1:], None, bias.double(), EPS)
    eager = F.layer_norm(total, shape[1:], None, bias, EPS)

    def fused(call):
        normed, summed = call(x, None, bias, EPS, residual)
        assert torch.equal(summed, total)
        return normed

    check("layer_norm", shape, dtype, fused, eager, exact)


def test_layer_norm_over_a_whole_image_is_split() -> None:
    shape = (16, 64, 256, 256)
    x, weight, bias = random(*shape), random(*shape[1:]), random(*shape[1:])
    exact = F.layer_norm(x[:2].double(), shape[1:], weight.double(), bias.double(), 1e-5)
    eager = F.layer_norm(x, shape[1:], weight, bias, 1e-5)
    config = default_config("layer_norm", (16, 64 * 256 * 256), "float32")
    assert config.params["SPLIT"] > 1
    output = render(config).call(x, weight, bias, 1e-5, num_dims=3)
    assert error(output[:2], exact) <= 1.25 * error(eager[:2], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@pytest.mark.parametrize(
    "shape", [(2, 64, 64, 64), (4, 384, 14, 14), (3, 96, 7, 9), (1, 3000, 5, 5), (200, 5, 1, 1)], ids=str
)
def test_channel_norm_is_as_near_to_fp64_as_eager(shape, kind, dtype) -> None:
    template = registry.load("channel_norm")
    site = (shape[0], shape[1], shape[2] * shape[3])
    weight, bias = random(shape[1], dtype=dtype), random(shape[1], dtype=dtype)
    for x in (random(*shape, dtype=dtype) + 1, (random(*shape, dtype=dtype) + 1).to(memory_format=torch.channels_last)):
        # Eager rounds once here, as it would with an op of its own: the stricter of the two comparisons.
        exact = template.reference(x.double(), weight.double(), bias.double(), EPS, kind)
        eager = template.reference(x, weight, bias, EPS, kind)
        for is_last in (False, True):

            def run(call, x=x, is_last=is_last):
                return call(x, weight, bias, EPS, kind, 1, is_last)

            check("channel_norm", site, dtype, run, eager, exact)


def test_many_rows_whose_blocks_programs_take_one_after_the_other_are_each_right() -> None:
    # More blocks than the device holds at once, over and over, and the last one of each row is short.
    x, weight, bias = random(257, 40, 1000), random(40), random(40)
    exact = F.group_norm(x.double(), 1, weight.double(), bias.double(), EPS)
    eager = F.group_norm(x, 1, weight, bias, EPS)
    configs = registry.load("group_norm").space((257, 40, 1000), "float32").configs
    joined = [config for config in configs if config.params["SPLIT"] * config.params["BLOCK_N"] >= 40000]
    joined = [config for config in joined if config.params["SPLIT"] > 1]
    assert joined
    for config in joined:
        for _ in range(3):
            output = render(config).call(x, 1, weight, bias, EPS)
            assert error(output, exact) <= 1.25 * error(eager, exact), config.key()


def test_many_rows_whose_programs_wait_and_read_again_are_each_right() -> None:
    x, weight, bias = random(257, 40, 1000), random(40), random(40)
    exact = F.group_norm(x.double(), 1, weight.double(), bias.double(), EPS)
    eager = F.group_norm(x, 1, weight, bias, EPS)
    point = {"BLOCK_N": 1024, "ROWS_PER_PROGRAM": 1, "num_warps": 4}
    for split, stages in ((4, 1), (8, 3), (16, 1), (64, 1)):
        config = KernelConfig(template="group_norm", params={**point, "SPLIT": split, "num_stages": stages})
        for _ in range(3):
            output = render(config).call(x, 1, weight, bias, EPS)
            assert error(output, exact) <= 1.25 * error(eager, exact), config.key()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 320, 32, 32), 32),
        ((3, 12, 56, 56), 1),
        ((1, 16, 512, 1024), 1),
        ((2, 64, 257, 129), 8),
        ((3, 30, 7), 3),
        ((8, 64), 4),
    ],
)
def test_group_norm_is_as_near_to_fp64_as_eager(shape, groups, dtype) -> None:
    x, weight, bias = random(*shape, dtype=dtype) + 1, random(shape[1], dtype=dtype), random(shape[1], dtype=dtype)
    site = (shape[0] * groups, shape[1] // groups, max(1, x[0, 0].numel()))
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)
    eager = F.group_norm(x, groups, weight, bias, EPS)
    check("group_norm", site, dtype, lambda call: call(x, groups, weight, bias, EPS), eager, exact)
    check(
        "group_norm", site, dtype, lambda call: call(x, groups, weight, bias, EPS, True), F.silu(eager), F.silu(exact)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_every_gate_is_as_near_to_fp64_as_eager(activation, dtype) -> None:
    reference = registry.load("swiglu").reference
    gate, up = random(65, 2 * 1111, dtype=dtype).chunk(2, -1)
    exact = reference(gate.double(), up.double(), activation=activation)
    eager = reference(gate, up, activation=activation)
    check("swiglu", (65, 1111), dtype, lambda call: call(gate, up, activation=activation), eager, exact)
    check("swiglu", (65, 1111), dtype, lambda call: call(gate, up, False, activation), eager, exact)


def operator_cases():
    x, weight = random(2, 6, 40), random(6)
    return {
        "layer_norm": (x, random(40), None, 1, EPS, 64, 2, 1, 2, 1),
        "add_layer_norm": (x, x + 1, random(6, 40), random(6, 40), 2, EPS, 64, 1, 4, 4, 1),
        "channel_norm": (x, weight, None, 1, EPS, "layer", True, 16, 16, 2, 1),
        "group_norm": (x, 3, weight, weight, EPS, True, 128, 1, 1, 2, 1),
    }


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "channel_norm", "group_norm"])
def test_an_operator_keeps_the_contract_of_torch(name) -> None:
    for template in ("layer_norm", "channel_norm", "group_norm"):
        registry.load(template)
    torch.library.opcheck(getattr(torch.ops.agnitra, name).default, operator_cases()[name])


class Mixed(torch.nn.Module):
    """Convolution, channel norm, group norm with SiLU, tokens with residual layer norms, a gated MLP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv, self.conv2 = torch.nn.Conv2d(3, width, 4, 4), torch.nn.Conv2d(width, width, 3, padding=1)
        self.channel, self.group = torch.nn.LayerNorm(width), torch.nn.GroupNorm(8, width)
        self.mix, self.norm1, self.norm2 = (
            torch.nn.Linear(width, width),
            torch.nn.LayerNorm(width),
            torch.nn.LayerNorm(width),
        )
        self.gate, self.up, self.down = (torch.nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = self.channel(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        x = self.conv2(F.silu(self.group(x)))
        x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + EPS)
        x = x.flatten(2).transpose(1, 2).contiguous()
        x = x + self.mix(self.norm1(x))
        return self.down(F.gelu(self.gate(self.norm2(x))) * self.up(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_every_norm_is_patched_and_keeps_its_output(dtype) -> None:
    model, x = Mixed().to("cuda", dtype).eval(), random(2, 3, 64, 64, dtype=dtype)
    actions = ["layer_norm", "channel_norm", "group_norm", "swiglu"]
    patch = install(Workload("mixed", model, (x,)), actions, name="candidate", kernels=KernelBook())
    made = [descriptor.action for descriptor in patch.log().descriptors]
    assert {"channel_norm", "group_norm", "layer_norm", "swiglu"} <= set(made), patch.log().refusals
    eager, ours = model(x), patch.model(x)
    exact = model.double()(x.double())
    assert ours.stride() == eager.stride()
    assert error(ours, exact) <= 1.25 * error(eager, exact)
