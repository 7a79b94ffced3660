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
ATTENTIONS = st.tuples(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 128), st.integers(1, 5000), st.integers(1, 256)
)
SITES = {
    "channel_norm": st.tuples(*[st.integers(1, 5000)] * 3),
    "group_norm": st.tuples(*[st.integers(1, 5000)] * 3),
    "skinny_gemm": st.tuples(st.integers(1, 16), st.integers(1, 5000), st.integers(1, 5000)),
    "cached_attention": ATTENTIONS,
    "decode_attention": ATTENTIONS,
    "split_gemm": st.tuples(*[st.integers(1, 5000)] * 4),
    "linear_cross_entropy": st.tuples(
        st.integers(1, 5000), st.integers(1, 600).map(lambda k: 8 * k), st.integers(1, 5000)
    ),
    # Images and channels, three extents, three of taps, strides and dilations each, the layout.
    "depthwise_conv": st.tuples(
        *[st.integers(1, 500)] * 5, *[st.integers(1, 64)] * 3, *[st.integers(1, 4)] * 6, st.integers(1, 2)
    ),
}
"""The shapes of templates that do not count a tensor's rows and columns."""
SHAPES = {
    "channel_norm": (4, 6, 10), "group_norm": (4, 6, 10), "skinny_gemm": (4, 8, 8),
    "cached_attention": (1, 2, 4, 8, 8), "decode_attention": (1, 2, 4, 8, 8), "split_gemm": (1, 16, 16, 16),
    "depthwise_conv": (2, 4, 1, 6, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1), "linear_cross_entropy": (4, 16, 40),
}  # fmt: skip
ROWS = st.lists(st.integers(1, 5000), min_size=1, max_size=3).map(tuple)
sites = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), SITES.get(name, ROWS)))


def dtypes_of(name: str) -> tuple[str, ...]:
    if name == "linear_cross_entropy":
        return "bfloat16", "float16"
    return ("float32",) if name == "split_gemm" else DTYPES


@pytest.mark.parametrize("name", NAMES)
def test_a_template_has_its_public_names(name: str) -> None:
    module = registry.load(name)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key.islower()
        and (key == "kernel" or getattr(value, "__module__", None) == module.__name__)
        and (isinstance(value, tuple) or callable(value) or hasattr(value, "fn"))
        and not inspect.ismodule(value)
    }
    # A tuple of kernels belongs to no module; `is_ruled` is for templates that a search alone would mislead,
    # `library` for those that stand in for a library's call.
    own = (own | {"kernel"}) - {"is_ruled", "library"}
    assert own == {"kernel", "launch", "space", "reference", "supports", "default", "example", "cost"}


@pytest.mark.parametrize("name", sorted(registry.TEMPLATES))
def test_no_triton_function_has_a_text_for_a_default_which_triton_3_6_cannot_compile(name: str) -> None:
    kernel = registry.load(name).kernel
    for function in kernel if isinstance(kernel, tuple) else (kernel,):
        parameters = inspect.signature(function.fn).parameters.values()
        assert not [each.name for each in parameters if isinstance(each.default, str)], function.fn.__name__


def test_an_unknown_template_is_refused_by_the_registry() -> None:
    with pytest.raises(TemplateError, match=r"'no_such'; known are .*rms_norm.*swiglu"):
        registry.load("no_such")


def test_a_machine_without_a_gpu_says_so() -> None:
    reason = registry.is_available()
    assert (reason is None) == torch.cuda.is_available()
    if reason is not None:
        assert "no CUDA device" in reason


@given(sites, st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_every_config_of_a_space_can_be_rendered_and_the_default_is_one_of_them(site, dtype) -> None:
    name, shape = site
    if dtype not in dtypes_of(name):
        return
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


@pytest.mark.parametrize("name", ["channel_norm", "group_norm"])
def test_a_shape_of_another_rank_has_no_space(name: str) -> None:
    with pytest.raises(TemplateError, match=f"{name} needs a shape of 3 numbers"):
        registry.load(name).space((4, 8), "float32")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_is_supported_and_its_cost_counts_at_least_its_result(name: str, dtype: str) -> None:
    if dtype not in dtypes_of(name):
        return
    module, shape = registry.load(name), SHAPES.get(name, (6, 10))
    arguments, options = module.example(shape, dtype, "cpu")
    outputs = module.reference(*arguments, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    bytes_moved, flops = module.cost(shape, dtype)
    assert bytes_moved > sum(output.numel() * output.element_size() for output in outputs) and flops > 0


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_has_no_space(name: str) -> None:
    shape = SHAPES.get(name, (4, 8))
    with pytest.raises(TemplateError, match=r"not torch\.float64"):
        registry.load(name).space(shape, "torch.float64")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("skinny_gemm", (4, 8)),
        ("skinny_gemm", (17, 8, 8)),
        ("decode_attention", (1, 2, 8, 8)),
        ("decode_attention", (1, 2, 129, 8, 8)),
        ("decode_attention", (1, 2, 8, 8, 257)),
        ("cached_attention", (1, 2, 8, 8)),
        ("cached_attention", (1, 2, 129, 8, 8)),
        ("cached_attention", (1, 2, 8, 8, 257)),
    ],
)
def test_a_shape_that_is_no_site_of_the_template_is_refused_in_words(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(TemplateError, match=r"needs a shape \(.*at most"):
        registry.load(name).space(shape, "float32")


def test_rows_too_long_for_all_registers_have_no_config() -> None:
    with pytest.raises(TemplateError, match="no valid config"):
        default_config("skinny_gemm", (1, 8, 10**6), "float32")


def test_supports_says_why_rms_norm_cannot_take_a_call() -> None:
    supports = registry.load("rms_norm").supports
    x, weight = torch.empty(2, 8), torch.empty(8)
    assert supports(x, weight) is None
    assert supports(x, weight, torch.empty(2, 8)) is None
    assert "not torch.float64" in supports(x.double(), weight.double())
    assert supports(x.half(), weight) is None, "a weight in float32 is taken"
    assert "weight of x's dtype" in supports(x.half(), weight.bfloat16())
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


def test_supports_says_why_the_norms_cannot_take_a_call() -> None:
    x, weight = torch.empty(2, 8, 3), torch.empty(8)
    layer, channel, group = (registry.load(name).supports for name in ("layer_norm", "channel_norm", "group_norm"))
    assert layer(x, None, torch.empty(8, 3), num_dims=2) is None
    assert channel(x, weight, None, "l2", 1) is group(x, 4, weight, weight) is None
    assert channel(x.half(), weight, weight) is None, "a weight in float32 is taken"
    for refusal in (layer(x.double(), None, None), channel(x.double(), None, None), group(x.double(), 2, None, None)):
        assert "not torch.float64" in str(refusal)
    assert "weight of shape (8, 3)" in str(layer(x, weight, None, num_dims=2))
    assert "residual like x" in str(layer(x, None, None, torch.empty(2, 8)))
    assert "dimension" in str(layer(x, None, None, num_dims=4))
    assert "bias of x's dtype" in str(channel(x, None, weight.half()))
    assert "knows rms, layer, l2" in str(channel(x, None, None, "l1"))
    assert "a dimension of x" in str(channel(x, None, None, "rms", 3))
    assert "divides 8 channels, not 3" in str(group(x, 3, None, None))
    assert "contiguous weight" in str(group(x, 2, torch.empty(16)[::2], None))


def test_fake_tensors_get_the_layouts_that_the_norms_promise() -> None:
    shape = (2, 6, 4, 5)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(shape, device="cuda", dtype=torch.float16)
        weight = torch.empty(6, device="cuda")
        channel = render(default_config("channel_norm", (2, 6, 20), "float16")).call
        group = render(default_config("group_norm", (4, 3, 20), "float16")).call
        layer = render(default_config("layer_norm", (2, 120), "float16")).call
        last = channel(x, weight, None, 1e-6, "layer", 1, True)
        assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
        outputs = (channel(x, None, None, 1e-6), group(x, 2, weight, weight, 1e-6, is_silu=True),
                   *layer(x, None, None, 1e-6, x, num_dims=3))  # fmt: skip
        assert all(output.is_contiguous() for output in outputs)
        assert {(tuple(output.shape), output.dtype) for output in (last, *outputs)} == {(shape, torch.float16)}


def test_supports_says_why_skinny_gemm_cannot_take_a_call() -> None:
    supports = registry.load("skinny_gemm").supports
    x, weight = torch.empty(2, 8), torch.empty(6, 8)
    assert supports(x, weight, torch.empty(6), torch.empty(2, 6), torch.empty(8)) is None
    assert supports(x, weight, None, torch.empty(2, 3), gate="gate_first") is None
    assert "not torch.float64" in supports(x.double(), weight.double())
    assert "1 to 16 rows" in supports(torch.empty(17, 8), weight)
    assert "weight of shape (N, 8)" in supports(x, torch.empty(8, 6))
    assert "contiguous rows" in supports(x, torch.empty(8, 6).t())
    assert "weight of x's dtype" in supports(x, weight.half())
    assert "as many rows of gate" in supports(x, torch.empty(5, 8), gate="up_first")
    assert "bias of shape (6,)" in supports(x, weight, torch.empty(1, 6))
    assert "residual of shape (2, 6)" in supports(x, weight, None, torch.empty(6))
    assert "contiguous norm weight" in supports(x, weight, None, None, torch.empty(16)[::2])


def test_supports_says_why_decode_attention_cannot_take_a_call() -> None:
    supports = registry.load("decode_attention").supports
    q, k = torch.empty(1, 4, 1, 8), torch.empty(1, 2, 9, 8)
    assert supports(q, k, k) is None
    assert supports(q, k, k, torch.empty(1, 9, dtype=torch.bool), (32, 8, 8, 1)) is None
    assert "one dtype" in supports(q, k.half(), k)
    assert "4-dimensional" in supports(q[0], k, k)
    assert "H a multiple of G" in supports(torch.empty(1, 3, 1, 8), k, k)
    assert "4 queries" in supports(torch.empty(1, 4, 5, 8), k, k)
    assert "contiguous last dimension" in supports(q, k.transpose(2, 3).contiguous().transpose(2, 3), k)
    assert "boolean or floating mask" in supports(q, k, k, torch.empty(1, 9, dtype=torch.int64))
    assert "broadcasts to (1, 4, 1, 9)" in supports(q, k, k, torch.empty(8))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("pdl", [1, 2])
def test_a_skinny_product_of_fake_tensors_has_the_shape_of_the_real_one(rows: int, pdl: int) -> None:
    config = default_config("skinny_gemm", (rows, 64, 96), "bfloat16")
    call = render(config.model_copy(update={"params": dict(config.params) | {"PDL": pdl}})).call
    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((1, rows, 96), (64, 96)))
        for gate, width in (("none", 64), ("gate_first", 32)):
            output = call(x, weight, gate=gate)
            assert (tuple(output.shape), output.dtype) == ((1, rows, width), torch.bfloat16)
            assert output.is_contiguous()


@pytest.mark.parametrize("split", [1, 4])
def test_decode_attention_of_fake_tensors_has_the_strides_that_were_asked_for(split: int) -> None:
    config = default_config("decode_attention", (2, 2, 2, 300, 64), "bfloat16")
    call = render(config.model_copy(update={"params": dict(config.params) | {"SPLIT": split}})).call
    with FakeTensorMode(), torch.no_grad():
        shapes = ((2, 4, 1, 64), (2, 2, 300, 64), (2, 2, 300, 64))
        q, k, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        assert call(q, k, v).stride() == (256, 64, 64, 1)
        assert call(q, k, v, out_stride=(256, 64, 256, 1)).stride() == (256, 64, 256, 1)


def test_supports_says_why_cached_attention_cannot_take_a_call() -> None:
    supports = registry.load("cached_attention").supports
    q, k, cache, slots = (
        torch.empty(1, 4, 1, 8),
        torch.empty(1, 2, 1, 8),
        torch.empty(1, 2, 9, 8),
        torch.zeros(1).long(),
    )
    cos, turns = torch.empty(1, 1, 8), ("halves", 8, "each")
    mask = torch.empty(1, 9, dtype=torch.bool)
    assert supports(q, k, k, cache, cache, slots, mask, cos, cos, (torch.empty(8), None), turns=turns) is None
    assert supports(q, k, k, cache.transpose(1, 2), cache.transpose(1, 2), slots, slot_dim=1) is None
    assert "one dtype" in supports(q, k.half(), k, cache, cache)
    assert "4-dimensional" in supports(q[0], k, k, cache, cache)
    assert "H a multiple of G" in supports(torch.empty(1, 3, 1, 8), k, k, cache, cache)
    assert "caches of 1 x 8" in supports(q, k, k, cache[..., :4], cache[..., :4])
    assert "4 tokens" in supports(*(x.expand(-1, -1, 5, -1) for x in (q, k, k)), cache, cache)
    assert "contiguous last" in supports(q, k, k, *[cache.transpose(2, 3).contiguous().transpose(2, 3)] * 2)
    assert "whole numbers as positions" in supports(q, k, k, cache, cache, slots.float())
    assert "norm weights of 8" in supports(q, k, k, cache, cache, slots, weights=(torch.empty(4), None))
    assert "knows the forms" in supports(q, k, k, cache, cache, slots, turns=("thirds", 8, "each"))
    assert "even number" in supports(q, k, k, cache, cache, slots, None, cos, cos, turns=("halves", 7, "each"))
    assert "broadcast to (1, 1, 4)" in supports(
        q, k, k, cache, cache, slots, None, cos, cos, turns=("halves", 8, "halves")
    )
    assert "boolean or floating mask" in supports(q, k, k, cache, cache, slots, torch.empty(1, 9).long())
    assert "broadcasts to (1, 4, 1, 9)" in supports(q, k, k, cache, cache, slots, torch.empty(8))


@pytest.mark.parametrize("split", [1, 4])
def test_cached_attention_of_fake_tensors_has_the_strides_that_were_asked_for(split: int) -> None:
    config = default_config("cached_attention", (2, 2, 2, 300, 64), "bfloat16")
    call = render(config.model_copy(update={"params": dict(config.params) | {"SPLIT": split}})).call
    with FakeTensorMode(), torch.no_grad():
        shapes = ((2, 4, 1, 64), (2, 2, 1, 64), (2, 2, 1, 64), (2, 2, 300, 64), (2, 2, 300, 64))
        tensors = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        assert call(*tensors, first_position=7).stride() == (256, 64, 64, 1)
        assert call(*tensors, first_position=7, out_stride=(256, 64, 256, 1)).stride() == (256, 64, 256, 1)


def test_the_step_over_a_cache_takes_any_layout_where_torch_can_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    template = registry.load("cached_attention")
    assert torch.Tag.flexible_layout in torch.ops.agnitra.cached_attention.default.tags
    monkeypatch.setattr(torch, "Tag", object())
    assert template._layout_tags() == ()


def test_supports_says_why_a_row_template_cannot_take_a_call() -> None:
    x = torch.empty(2, 8)
    for name in ("softmax", "cumsum"):
        supports = registry.load(name).supports
        assert supports(x) is None
        assert "not torch.float64" in supports(x.double())
        assert "at least one value" in supports(x[:, :0])
    assert "bool mask" in registry.load("cumsum").supports(x, x)
    supports = registry.load("cross_entropy").supports
    assert supports(x, torch.zeros(2, dtype=torch.int64)) is None
    assert "not torch.int64" in supports(x.long(), torch.zeros(2, dtype=torch.int64))
    assert "int64 classes of shape (2,)" in supports(x, torch.zeros(2))
    assert "int64 classes of shape (2,)" in supports(x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("num_cols", [8, 20_000, 100_000])
def test_fake_tensors_get_the_results_of_row_templates(num_cols: int) -> None:
    shape = (2, 3, num_cols)
    softmax, loss, sums = (
        render(default_config(name, shape, "bfloat16")).call for name in ("softmax", "cross_entropy", "cumsum")
    )
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(shape[:2], device="cuda", dtype=torch.int64)
        for output in (softmax(x, out_dtype=torch.float32), sums(x, out_dtype=torch.float32)):
            assert (tuple(output.shape), output.dtype) == (shape, torch.float32) and output.is_contiguous()
        assert tuple(loss(x, target, reduction="none").shape) == (2, 3)
        mean = loss(x, target)
        assert (tuple(mean.shape), mean.dtype) == ((), torch.bfloat16)


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


def test_split_gemm_takes_fp32_products_of_four_sizes() -> None:
    template = registry.load("split_gemm")
    with pytest.raises(TemplateError, match="takes float32, not bfloat16"):
        template.space((1, 256, 256, 256), "bfloat16")
    with pytest.raises(TemplateError, match="four numbers"):
        template.space((256, 256, 256), "float32")
    spaces = [template.space((1, 256, 256, num_k), "float32") for num_k in (64, 1024, 4096)]
    assert [space.params["K_CHUNK"] for space in spaces] == [(32,), (64,), (64, 128)]


def test_supports_says_why_split_gemm_cannot_take_a_call() -> None:
    supports = registry.load("split_gemm").supports
    a, b = torch.empty(4, 8), torch.empty(8, 6)
    parts, exponent = torch.empty(2, 6, 8, dtype=torch.float16), torch.empty(6, dtype=torch.int32)
    assert supports(a, b) is None and supports(a, b, torch.empty(6), None, "relu") is None
    assert supports(a, parts, None, exponent) is None and supports(b) is None
    assert "not torch.float16" in supports(a.half(), b.half())
    assert "cannot multiply" in supports(a, b.t())
    assert "leading ones of a" in supports(a[None], b[None].expand(2, 8, 6))
    assert "float32 bias of shape (6,)" in supports(a, b, torch.empty(8))
    assert "activations" in supports(a, b, None, None, "mish")
    assert "parts of shape" in supports(a, parts[:, :5].contiguous(), None, exponent)
    assert "made itself" in supports(a, parts.float(), None, exponent)
    assert "two dimensions" in supports(a[None])


def test_fake_products_have_the_shape_of_real_ones() -> None:
    call = render(default_config("split_gemm", (1, 4, 6, 8), "float32")).call
    with FakeTensorMode(), torch.no_grad():
        a, b = torch.empty(2, 4, 8, device="cuda"), torch.empty(8, 6, device="cuda")
        parts, exponent = call(b.t())
        outputs = (call(a, b), call(a, parts, None, exponent), call(a, torch.empty(2, 8, 6, device="cuda")))
        assert (tuple(parts.shape), parts.dtype, tuple(exponent.shape)) == ((2, 6, 8), torch.float16, (6,))
        for output in outputs:
            assert (tuple(output.shape), output.dtype) == ((2, 4, 6), torch.float32)
            assert output.is_contiguous()


def test_linear_cross_entropy_takes_heads_of_half_precision() -> None:
    template = registry.load("linear_cross_entropy")
    with pytest.raises(TemplateError, match="not float32"):
        template.space((4, 16, 40), "float32")
    with pytest.raises(TemplateError, match="multiple of 8 values, not 12"):
        template.space((4, 12, 40), "bfloat16")
    with pytest.raises(TemplateError, match="3 numbers"):
        template.space((4, 16), "bfloat16")


def test_supports_says_why_linear_cross_entropy_cannot_take_a_call() -> None:
    supports = registry.load("linear_cross_entropy").supports
    x, weight = torch.empty(2, 3, 16, dtype=torch.float16), torch.empty(40, 16, dtype=torch.float16)
    target = torch.zeros(2, 3, dtype=torch.int64)
    assert supports(x, weight, target) is supports(x, weight, target, torch.empty(40)) is None
    assert "bfloat16 or float16" in supports(x.float(), weight.float(), target)
    assert "bfloat16 or float16" in supports(x, weight.bfloat16(), target)
    assert "weight [V, K]" in supports(x, weight[:, :8], target)
    assert "multiple of 16 bytes" in supports(x, torch.empty(16, 40, dtype=torch.float16).t(), target)
    assert "int64 classes" in supports(x, weight, target.int())
    assert "int64 classes" in supports(x, weight, target[0])
    assert "contiguous bias" in supports(x, weight, target, torch.empty(39))
