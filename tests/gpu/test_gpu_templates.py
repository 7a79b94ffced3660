"""Every template on a real device: fp64 agreement, operator contract, torch.compile, dynamic shapes."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from agnitra_lab.contracts.search import KernelConfig  # noqa: E402
from agnitra_lab.errors import TemplateError  # noqa: E402
from agnitra_lab.generate import registry  # noqa: E402
from agnitra_lab.generate.defaults import default_config  # noqa: E402
from agnitra_lab.generate.render import render  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SHAPES = [(1,), (1, 1), (5, 77), (3, 1023), (2, 3, 64), (257, 2048), (4, 20001), (1, 4096), (33, 16)]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def random(*shape: int, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def problem(output, expected) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype]
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs())
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def edge_configs(template: str, shape: tuple[int, ...], dtype) -> list[KernelConfig]:
    configs = registry.load(template).space(shape, str(dtype)).configs
    looped = [config for config in configs if config.params["BLOCK_N"] < shape[-1]]
    chosen = [configs[0], configs[-1], default_config(template, shape, str(dtype)), *looped[-1:], *looped[:1]]
    return list({config.key(): config for config in chosen}.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cast_before_weight", [True, False])
def test_rms_norm_agrees_with_fp64_on_a_device(shape, dtype, cast_before_weight) -> None:
    template = registry.load("rms_norm")
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    weight = random(shape[-1], dtype=dtype)
    for config in edge_configs("rms_norm", shape, dtype):
        call = render(config).call
        plain = call(x, weight, EPS, cast_before_weight=cast_before_weight)
        assert problem(plain, template.reference(x.double(), weight.double(), EPS)) is None, config.key()
        normed, summed = call(x, weight, EPS, residual, cast_before_weight=cast_before_weight)
        assert torch.equal(summed, x + residual), config.key()
        assert problem(normed, template.reference(summed.double(), weight.double(), EPS)) is None, config.key()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_agrees_with_fp64_on_a_device(shape, dtype) -> None:
    template = registry.load("swiglu")
    gate, up = random(*shape[:-1], 2 * shape[-1], dtype=dtype).chunk(2, dim=-1)
    for config in edge_configs("swiglu", shape, dtype):
        output = render(config).call(gate, up)
        assert problem(output, template.reference(gate.double(), up.double())) is None, config.key()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_follows_the_models_own_code_on_a_device(dtype) -> None:
    rms_norm, swiglu = registry.load("rms_norm"), registry.load("swiglu")
    x, weight = random(256, 2048, dtype=dtype), random(2048, dtype=dtype)
    call = render(default_config("rms_norm", (256, 2048), str(dtype))).call
    # The sum over a row may differ in the last bit of fp32, which moves a rounded result only now and then.
    share = 0.99
    for flag in (True, False):
        same = call(x, weight, EPS, cast_before_weight=flag) == rms_norm.reference(
            x, weight, EPS, cast_before_weight=flag
        )
        assert float(same.double().mean()) > share
    gate, up = random(256, 4096, dtype=dtype).chunk(2, dim=-1)
    fused = render(default_config("swiglu", (256, 2048), str(dtype))).call(gate, up)
    assert float((fused == swiglu.reference(gate, up)).double().mean()) > share


def test_rms_norm_takes_row_strides_and_transposed_tensors_on_a_device() -> None:
    template = registry.load("rms_norm")
    weight, wide, turned = random(77), random(6, 200)[:, 50:127], random(77, 6).t()
    call = render(default_config("rms_norm", (6, 77), "float32")).call
    for x, residual in ((wide, turned), (turned, wide)):
        normed, summed = call(x, weight, EPS, residual)
        assert torch.equal(summed, x + residual)
        assert problem(normed, template.reference(summed.double(), weight.double(), EPS)) is None


def test_row_offsets_pass_two_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of device memory")
    rows, cols = 2**18 + 8, 8192
    x, weight = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16).normal_(), random(cols).bfloat16()
    output = render(default_config("rms_norm", (rows, cols), "bfloat16")).call(x, weight, EPS)
    expected = registry.load("rms_norm").reference(x[-4:].double(), weight.double(), EPS)
    assert problem(output[-4:], expected) is None


def operator_cases():
    x, residual, weight = random(6, 96), random(6, 96), random(96)
    gate, up = random(6, 192).chunk(2, dim=-1)
    return {
        "rms_norm": (x, weight, EPS, True, 128, 1, 1, 1),
        "add_rms_norm": (x, residual, weight, EPS, False, 128, 1, 1, 1),
        "swiglu": (gate, up, True, 128, 2, 1, 1),
    }


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu"])
def test_an_operator_keeps_the_contract_of_torch(name) -> None:
    for template in registry.TEMPLATES:
        registry.load(template)
    torch.library.opcheck(getattr(torch.ops.agnitra, name).default, operator_cases()[name])


class Block(torch.nn.Module):
    """A residual, a norm and a gated product, with both templates inside."""

    def __init__(self, shape: tuple[int, ...], dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(random(shape[-1], dtype=dtype))
        self.norm = render(default_config("rms_norm", shape, str(dtype))).call
        self.glu = render(default_config("swiglu", (*shape[:-1], shape[-1] // 2), str(dtype))).call

    def forward(self, x, residual):
        normed, summed = self.norm(x * 1.5, self.weight, EPS, residual)
        gate, up = normed.chunk(2, dim=-1)
        return self.glu(gate, up) + 1.0, summed


def plain_block(block, x, residual):
    normed, summed = registry.load("rms_norm").reference(x * 1.5, block.weight, EPS, residual)
    gate, up = normed.chunk(2, dim=-1)
    return registry.load("swiglu").reference(gate, up) + 1.0, summed


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_with_both_templates_compiles_as_one_graph(mode, dtype) -> None:
    torch._dynamo.reset()
    block = Block((64, 512), dtype)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(4):
        x, residual = random(64, 512, dtype=dtype), random(64, 512, dtype=dtype)
        before = x.clone(), residual.clone()
        outputs = [output.clone() for output in compiled(x, residual)]
        for output, expected in zip(outputs, plain_block(block, x, residual), strict=True):
            assert problem(output, expected.double()) is None
        assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_a_compiled_module_takes_other_batch_sizes_without_a_new_graph_each() -> None:
    torch._dynamo.reset()
    block = Block((64, 512), torch.float32)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in (64, 33, 7, 128):
        x, residual = random(rows, 512), random(rows, 512)
        for output, expected in zip(compiled(x, residual), plain_block(block, x, residual), strict=True):
            assert problem(output, expected.double()) is None


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="torch 2.11 cannot functionalise a Triton launch outside torch.compile",
)
def test_the_compiler_sees_that_only_the_outputs_are_written() -> None:
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    block = Block((64, 512), torch.bfloat16)
    x, residual = random(64, 512, dtype=torch.bfloat16), random(64, 512, dtype=torch.bfloat16)
    graph = make_fx(dispatch_functionalize(block.forward), tracing_mode="fake")(x, residual).graph
    written = [set(node.kwargs["tensors_to_clone"]) for node in graph.nodes if "tensors_to_clone" in node.kwargs]
    assert written == [{"out_ptr", "summed_ptr"}, {"out_ptr"}]


def test_a_kernel_can_be_captured_in_a_cuda_graph() -> None:
    x, weight = random(64, 512), random(512)
    call = render(default_config("rms_norm", (64, 512), "float32")).call
    call(x, weight, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(x, weight, EPS)
    x.copy_(random(64, 512))
    graph.replay()
    assert problem(output, registry.load("rms_norm").reference(x.double(), weight.double(), EPS)) is None


def test_a_template_refuses_to_run_under_grad_on_a_device() -> None:
    weight = random(64).requires_grad_()
    call = render(default_config("rms_norm", (4, 64), "float32")).call
    with torch.enable_grad(), pytest.raises(TemplateError, match="no backward"):
        call(random(4, 64), weight, EPS)
