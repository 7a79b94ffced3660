import inspect

import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.points import DTYPES, next_power_of_two
from agnitra_lab.generate.render import render

NAMES = sorted(registry.TEMPLATES)
shapes = st.lists(st.integers(1, 5000), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_has_its_public_names(name: str) -> None:
    module = registry.load(name)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key.islower()
        and getattr(value, "__module__", None) == module.__name__
        and (callable(value) or hasattr(value, "fn"))
        and not inspect.ismodule(value)
    }
    assert own == {"kernel", "launch", "space", "reference", "supports", "default", "example", "cost"}


def test_an_unknown_template_is_refused_by_the_registry() -> None:
    with pytest.raises(TemplateError, match=r"'no_such'; known are .*rms_norm.*swiglu"):
        registry.load("no_such")


def test_a_machine_without_a_gpu_says_so() -> None:
    reason = registry.is_available()
    assert (reason is None) == torch.cuda.is_available()
    if reason is not None:
        assert "no CUDA device" in reason


@given(st.sampled_from(NAMES), shapes, st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_every_config_of_a_space_can_be_rendered_and_the_default_is_one_of_them(name, shape, dtype) -> None:
    space = registry.load(name).space(shape, dtype)
    assert (space.template, space.shape, space.dtype) == (name, shape, dtype)
    assert 1 <= len(space.configs) <= 200
    assert len({config.key() for config in space.configs}) == len(space.configs)
    for config in space.configs:
        assert all(config.params[param] in values for param, values in space.params.items())
    for config in (space.configs[0], space.configs[-1]):
        render(config)
    assert default_config(name, shape, dtype) in space.configs


@given(st.integers(0, 2**40))
def test_the_next_power_of_two_is_one_and_the_smallest(number: int) -> None:
    power = next_power_of_two(number)
    assert power & (power - 1) == 0 and power >= max(1, number)
    assert power == 1 or power // 2 < number


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 8)])
def test_an_empty_shape_has_no_space(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(TemplateError, match="needs a shape"):
        registry.load(name).space(shape, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_has_no_space(name: str) -> None:
    with pytest.raises(TemplateError, match=r"not torch\.float64"):
        registry.load(name).space((4, 8), "torch.float64")


def test_supports_says_why_rms_norm_cannot_take_a_call() -> None:
    supports = registry.load("rms_norm").supports
    x, weight = torch.empty(2, 8), torch.empty(8)
    assert supports(x, weight) is None
    assert supports(x, weight, torch.empty(2, 8)) is None
    assert "not torch.float64" in supports(x.double(), weight.double())
    assert "weight of x's dtype" in supports(x.half(), weight)
    assert "weight of shape (8,)" in supports(x, torch.empty(7))
    assert "contiguous weight" in supports(x, torch.empty(16)[::2])
    assert "residual like x" in supports(x, weight, torch.empty(1, 8))
    assert "at least one value" in supports(torch.empty(0, 8), weight)


def test_supports_says_why_swiglu_cannot_take_a_call() -> None:
    supports = registry.load("swiglu").supports
    assert supports(torch.empty(2, 8), torch.empty(2, 8)) is None
    assert "not torch.int64" in supports(torch.empty(2, 8).long(), torch.empty(2, 8).long())
    assert "one shape" in supports(torch.empty(2, 8), torch.empty(8))
    assert "one dtype" in supports(torch.empty(2, 8), torch.empty(2, 8).half())
    assert "at least one value" in supports(torch.empty(2, 0), torch.empty(2, 0))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_fake_tensors_get_the_shapes_dtypes_and_strides_of_real_ones(shape: tuple[int, ...]) -> None:
    norm = render(default_config("rms_norm", shape, "bfloat16")).call
    glu = render(default_config("swiglu", shape, "bfloat16")).call
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(8, device="cuda", dtype=torch.bfloat16)
        gate, up = torch.empty((*shape[:-1], 16), device="cuda", dtype=torch.bfloat16).chunk(2, dim=-1)
        for output in (norm(x, weight, 1e-6), *norm(x, weight, 1e-6, x), glu(gate, up)):
            assert (tuple(output.shape), output.dtype, output.device.type) == (shape, torch.bfloat16, "cuda")
            assert output.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rms_norm_reference_is_the_one_of_torch_when_it_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 96).to(dtype), torch.randn(96).to(dtype)
    ours = registry.load("rms_norm").reference(x, weight, 1e-6, cast_before_weight=False)
    assert torch.allclose(
        ours, torch.nn.functional.rms_norm(x, (96,), weight, 1e-6), rtol=1e-6 if dtype == torch.float32 else 0
    )
