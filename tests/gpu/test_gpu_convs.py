"""The depthwise template on a real device: as near to fp64 as eager at real shapes, inside models, in one graph."""

import itertools
import math

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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _exact():
    torch.manual_seed(0)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.synchronize()


def error(output, expected) -> float:
    return float((output.double() - expected).abs().mean())


# x, taps, stride, padding, dilation.
CASES = {
    "convnext 7x7": ((4, 96, 56, 56), (7, 7), 1, 3, 1),
    "convnext, last stage": ((2, 768, 7, 7), (7, 7), 1, 3, 1),
    "mobilenet stride 2": ((4, 144, 112, 112), (3, 3), 2, 1, 1),
    "odd extents": ((3, 33, 57, 41), (5, 5), 1, 2, 1),
    "odd, strided, dilated": ((2, 24, 57, 43), (3, 5), 2, 4, 3),
    "31 x 31": ((1, 32, 32, 32), (31, 31), 1, 15, 1),
    "causal": ((2, 256, 1031), (4,), 1, 3, 1),
    "video": ((1, 40, 9, 14, 14), (3, 3, 3), 1, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_last", [False, True], ids=["planes", "channels innermost"])
@pytest.mark.parametrize("name", CASES)
def test_depthwise_conv_is_as_near_to_fp64_as_eager(name, is_last, dtype) -> None:
    shape, taps, *numbers = CASES[name]
    stride, padding, dilation = ([number] * len(taps) for number in numbers)
    x = torch.randn(shape, device="cuda").to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if is_last else x
    weight = torch.randn(shape[1], 1, *taps, device="cuda").to(dtype)
    bias = torch.randn(shape[1], device="cuda").to(dtype)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    eager = convolution(x, weight, bias, stride, padding, dilation, shape[1])
    exact = convolution(x.double(), weight.double(), bias.double(), stride, padding, dilation, shape[1])
    size = list(eager.shape[2:])
    filled = [(1,) * (3 - len(taps)) + tuple(values) for values in (shape[2:], taps, stride, dilation)]
    site = (shape[0], shape[1], *itertools.chain(*filled), 2 if is_last else 1)
    configs = registry.load("depthwise_conv").space(site, str(dtype)).configs
    chosen = [configs[0], configs[-1], configs[len(configs) // 2], default_config("depthwise_conv", site, str(dtype))]
    for config in chosen:
        output = render(config).call(x, weight, bias, taps, stride, padding, dilation, size, "none", is_last)
        assert output.shape == eager.shape and output.dtype == dtype
        # 1e-8 of slack, because some of these sums are so short that eager's error is a rounding or two.
        assert error(output, exact) <= 1.25 * error(eager, exact) + 1e-8, config.key()


@pytest.mark.parametrize("is_last", [False, True])
def test_the_operator_keeps_the_contract_of_torch(is_last) -> None:
    registry.load("depthwise_conv")
    x, weight = torch.randn(2, 16, 9, 8, device="cuda"), torch.randn(16, 1, 3, 3, device="cuda")
    numbers = ([3, 3], [2, 1], [1, 1], [1, 1], [5, 8])
    config = (4, 1, 2, 1, 2, 1) if not is_last else (4, 4, 1, 4, 2, 1)
    torch.library.opcheck(
        torch.ops.agnitra.depthwise_conv.default, (x, weight, None, *numbers, "silu", is_last, *config)
    )


class Mixed(torch.nn.Module):
    """A ConvNeXt block, a strided block of MobileNet, a causal row convolution."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 4, 4)
        self.depthwise = torch.nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.wide = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)
        self.strided = torch.nn.Conv2d(width, width, 3, 2, padding=1, groups=width)
        self.causal = torch.nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.inner = torch.nn.Linear(width, width)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.wide(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = F.relu(self.strided(x), inplace=True).flatten(2).transpose(1, 2)
        return F.silu(self.causal(self.inner(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_depthwise_convolutions_is_patched_and_keeps_its_output(dtype) -> None:
    model = Mixed().to("cuda", dtype).eval()
    x = torch.randn(2, 3, 64, 64, device="cuda").to(dtype)
    patch = install(Workload("mixed", model, (x,)), ["depthwise_conv"], name="candidate", kernels=KernelBook())
    assert len(patch.log().descriptors) == 3, patch.log().refusals
    eager, ours = model(x), patch.model(x)
    exact = model.double()(x.double())
    assert ours.shape == eager.shape and ours.stride() == eager.stride()
    assert error(ours, exact) <= 1.25 * error(eager, exact)
    assert math.isfinite(error(ours, exact))


def test_a_layout_in_which_cudnn_takes_tf32_alone_is_no_choice_for_fp32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    conv = torch.nn.Conv3d(3, 16, 3).cuda()
    x = torch.randn(8, 3, 16, 32, 32, device="cuda")
    eager = conv(x)
    patch = install(Workload("conv", conv, (x,)), ["channels_last"], name="agnitra")
    torch.testing.assert_close(patch.model(x), eager, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_few_channels_keeps_the_digits_that_eager_has(monkeypatch) -> None:
    # torch's default: cuDNN may choose TF32, which it does here with the channels innermost alone.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.GELU()).cuda()
    x = torch.randn(16, 8, 128, 128, device="cuda")
    eager, exact = model(x), model.double()(x.double())
    patch = install(Workload("conv", model.float(), (x,)), ["channels_last", "keep_eager"], name="candidate")
    assert error(patch.model(x), exact) <= 1.25 * error(eager, exact)
