"""The templates of the decode path on a real device: fp64 agreement, operator contract, torch.compile, CUDA graphs."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from agnitra_lab.contracts.search import KernelConfig  # noqa: E402
from agnitra_lab.device.graphs import capture  # noqa: E402
from agnitra_lab.generate import registry  # noqa: E402
from agnitra_lab.generate.defaults import default_config  # noqa: E402
from agnitra_lab.generate.render import render  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EPS = 1e-5
FORMS = list(itertools.product(("none", "gate_first", "up_first"), (False, True)))


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def random(*shape: int, dtype=torch.float32):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error(output, expected) -> float:
    return float((output.double() - expected).abs().mean() / expected.pow(2).mean().sqrt())


def problem(output, expected) -> str | None:
    """Say how an output differs from the fp64 reference by the project's rule, or None."""
    rtol = RTOL[output.dtype]
    if output.shape != expected.shape:
        return f"shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    tolerance = rtol * (expected.pow(2).mean().sqrt() + expected.abs())
    share = float(((output.double() - expected).abs() <= tolerance).double().mean())
    return None if share >= 0.999 else f"only {share:.2%} of the elements are within {rtol}"


def edge_configs(template: str, shape: tuple[int, ...], dtype) -> list[KernelConfig]:
    """The first, last and default config, and one of several parts where there is one."""
    configs = registry.load(template).space(shape, str(dtype)).configs
    parts = [config for config in configs if config.params["SPLIT"] > 1][-1:]
    chosen = [configs[0], configs[-1], default_config(template, shape, str(dtype)), *parts]
    return list({config.key(): config for config in chosen}.values())


def product(shape: tuple[int, int, int], dtype, gate: str, is_normed: bool):
    rows, out, cols = shape
    weight = (random(out, cols) / cols**0.5).to(dtype)
    residual = random(rows, out // 2 if gate != "none" else out, dtype=dtype)
    tensors = (random(rows, cols, dtype=dtype), weight, random(out, dtype=dtype), residual)
    options = {"activation": "silu" if gate != "none" else "gelu", "gate": gate}
    if is_normed:
        options |= {"norm_weight": random(cols, dtype=dtype), "eps": EPS}
    return tensors, options


SHAPES = [(1, 2560, 2048), (1, 2048, 5632), (2, 34, 77), (4, 512, 14336), (8, 4096, 4096), (16, 130, 100), (5, 2, 1)]


@pytest.mark.parametrize(("gate", "is_normed"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_skinny_product_agrees_with_fp64_as_well_as_separate_ops_do(shape, dtype, gate, is_normed) -> None:
    reference = registry.load("skinny_gemm").reference
    tensors, options = product(shape, dtype, gate, is_normed)
    expected = reference(*map(wide, tensors), **{name: wide(value) for name, value in options.items()})
    eager = error(reference(*tensors, **options), expected)
    for config in edge_configs("skinny_gemm", shape, dtype):
        output = render(config).call(*tensors, **options)
        assert problem(output, expected) is None, config.key()
        # Half a unit in the last place is what rounding alone may add to a small sample.
        assert error(output, expected) <= 1.25 * eager + 0.05 * RTOL[dtype], config.key()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_dependent_launch_gives_the_same_bits(shape) -> None:
    tensors, options = product(shape, torch.bfloat16, "gate_first", True)
    config = default_config("skinny_gemm", shape, "bfloat16")
    plain = render(config).call(*tensors, **options)
    dependent = render(config.model_copy(update={"params": dict(config.params) | {"PDL": 2}})).call
    for _ in range(3):
        assert torch.equal(dependent(*tensors, **options), plain)


@pytest.mark.parametrize("pdl", [1, 2])
def test_a_chain_of_dependent_launches_reads_what_the_one_before_wrote(pdl) -> None:
    weights = [(random(1024, 1024) / 32).bfloat16() for _ in range(12)]
    config = default_config("skinny_gemm", (1, 1024, 1024), "bfloat16")
    call = render(config.model_copy(update={"params": dict(config.params) | {"PDL": pdl}})).call
    x = random(1, 1024, dtype=torch.bfloat16)

    def chain():
        h = x
        for weight in weights:
            h = call(h, weight, None, h, norm_weight=weight[0], eps=EPS)
        return h

    expected = chain()
    torch.cuda.synchronize()
    graph, output = capture(chain)
    for _ in range(20):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, expected)
    step = registry.load("skinny_gemm").reference
    h = x
    for weight in weights:
        h = step(h, weight, None, h, norm_weight=weight[0], eps=EPS)
    assert problem(output, h.double()) is None


def test_a_skinny_product_is_the_same_at_each_call() -> None:
    for shape in ((1, 512, 8192), (8, 512, 8192)):
        tensors, options = product(shape, torch.bfloat16, "none", False)
        for config in edge_configs("skinny_gemm", shape, torch.bfloat16):
            call = render(config).call
            first = call(*tensors, **options)
            assert all(torch.equal(call(*tensors, **options), first) for _ in range(5)), config.key()


def attention(shape: tuple[int, ...], dtype, mask: str):
    batch, heads, kv_heads, queries, keys, size = shape
    q = random(batch, queries, heads, size, dtype=dtype).transpose(1, 2)
    k = random(batch, kv_heads, keys, size, dtype=dtype)
    v = random(batch, keys, kv_heads, size, dtype=dtype).transpose(1, 2)
    masks = {
        "none": None,
        "boolean": torch.arange(keys, device="cuda")[None] < keys - keys // 3,
        "added": random(batch, 1, queries, keys, dtype=dtype),
        "nothing seen": torch.zeros(1, keys, dtype=torch.bool, device="cuda"),
    }
    return q, k, v, masks[mask]


ATTENTIONS = [
    (1, 32, 4, 1, 1024, 64),
    (8, 32, 8, 1, 4096, 128),
    (1, 71, 1, 1, 515, 64),
    (2, 12, 12, 4, 77, 80),
    (3, 6, 2, 2, 1, 256),
]


@pytest.mark.parametrize("mask", ["none", "boolean", "added", "nothing seen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_decode_attention_agrees_with_fp64_as_well_as_sdpa_does(shape, dtype, mask) -> None:
    batch, heads, kv_heads, queries, keys, size = shape
    q, k, v, given = attention(shape, dtype, mask)
    template = registry.load("decode_attention")
    expected = template.reference(wide(q), wide(k), wide(v), wide(given))
    eager = error(template.reference(q, k, v, given), expected) if mask != "nothing seen" else 0.0
    for config in edge_configs("decode_attention", (batch, kv_heads, heads // kv_heads * queries, keys, size), dtype):
        output = render(config).call(q, k, v, given)
        assert problem(output, expected) is None, config.key()
        if mask != "nothing seen":
            assert error(output, expected) <= 1.25 * eager + 0.05 * RTOL[dtype], config.key()


STEPS = [
    # batch, heads, key/value heads, tokens, slots, head size, form, rotary, angles, is normed, slot dimension
    (1, 32, 4, 1, 1024, 64, "halves", 64, "each", False, 2),
    (1, 32, 8, 1, 4096, 128, "halves", 128, "halves", True, 2),
    (3, 12, 12, 4, 77, 80, "halves", 20, "each", False, 1),
    (2, 6, 2, 2, 515, 64, "neighbours", 64, "neighbours", True, 2),
    (1, 42, 1, 3, 130, 64, "neighbours", 32, "each", False, 2),
    (2, 4, 4, 1, 33, 256, "none", 0, "each", False, 1),
]


def step_of(case, dtype):
    """Arguments and options of one decoding step over caches that hold NaN where the new slots are."""
    batch, heads, kv_heads, tokens, slots, size, form, rotary, angles, is_normed, slot_dim = case
    packed = random(batch, tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    q, k, v = (
        part.unflatten(-1, (-1, size)).transpose(1, 2)
        for part in packed.split([heads * size, kv_heads * size, kv_heads * size], -1)
    )
    position = torch.randperm(slots, device="cuda")[:tokens]
    caches = []
    for _ in range(2):
        cache = random(batch, kv_heads, slots, size, dtype=dtype)
        cache[:, :, position] = float("nan")
        caches.append(cache if slot_dim == 2 else cache.transpose(1, 2).contiguous())
    mask = torch.arange(slots, device="cuda")[None] <= position[:, None]
    options = {"slot_dim": slot_dim, "form": form, "rotary": rotary, "angles": angles}
    angle = random(1, tokens, max(1, rotary if angles == "each" else rotary // 2))
    cos, sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if form != "none" else (None, None)
    if is_normed:
        options |= {"q_weight": random(size, dtype=dtype), "k_weight": random(size, dtype=dtype), "eps": (EPS, EPS)}
    return [q, k, v, *caches, position, mask, cos, sin], options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_decoding_step_agrees_with_fp64_as_well_as_separate_ops_do(case, dtype) -> None:
    batch, heads, kv_heads, tokens, slots, size = case[:6]
    tensors, options = step_of(case, dtype)
    reference = registry.load("cached_attention").reference

    def with_caches(change=lambda x: x):
        return [change(x.clone()) if i in (3, 4) else change(x) for i, x in enumerate(tensors)]

    exact, single = with_caches(wide), with_caches()
    expected = reference(*exact, **{name: wide(value) for name, value in options.items()})
    eager = reference(*single, **options)
    shape = (batch, kv_heads, heads // kv_heads * tokens, slots, size)
    for config in edge_configs("cached_attention", shape, dtype):
        for pdl in (1, 2):
            ours = with_caches()
            call = render(config.model_copy(update={"params": dict(config.params) | {"PDL": pdl}})).call
            output = call(*ours, **options)
            assert problem(output, expected) is None, config.key()
            assert error(output, expected) <= 1.25 * error(eager, expected) + 0.05 * RTOL[dtype], config.key()
            for index in (3, 4):
                is_new = torch.isnan(tensors[index])
                assert torch.equal(ours[index][~is_new], tensors[index][~is_new]), "only the new slots are written"
                new, wanted = ours[index][is_new], exact[index][is_new]
                assert problem(new, wanted) is None, config.key()
                if index == 4:
                    assert torch.equal(new, single[index][is_new]), "values are copied bit by bit"


def test_a_chain_of_dependent_steps_reads_what_the_steps_before_wrote() -> None:
    case = (1, 8, 2, 1, 256, 64, "halves", 64, "each", False, 2)
    (q, k, v, k_cache, v_cache, _, _, cos, sin), options = step_of(case, torch.bfloat16)
    k_cache.zero_(), v_cache.zero_()
    places = torch.arange(12, device="cuda")
    masks = torch.arange(256, device="cuda")[None] <= places[:, None]
    call = render(default_config("cached_attention", (1, 2, 4, 256, 64), "bfloat16")).call
    plain = registry.load("cached_attention").reference

    def chain(step, caches):
        h = q
        for i in range(12):
            h = step(h, k, v, *caches, places[i : i + 1], masks[i : i + 1], cos, sin, **options)
        return h

    expected = chain(plain, (k_cache.clone(), v_cache.clone()))
    graph, output = capture(lambda: chain(call, (k_cache, v_cache)))
    for _ in range(20):
        output.fill_(float("nan"))
        k_cache.fill_(float("nan"))
        v_cache.zero_()
        graph.replay()
        assert problem(output, expected.double()) is None


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_step_writes_its_caches_where_they_lie(mode) -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    (q, k, v, k_cache, v_cache, position, mask, cos, sin), options = step_of(STEPS[0], torch.bfloat16)
    call = render(default_config("cached_attention", (1, 4, 8, 1024, 64), "bfloat16")).call
    compiled = torch.compile(
        lambda q, k, v, place: call(q * 1.1, k, v, k_cache, v_cache, place, mask, cos, sin, **options) * 2.0,
        fullgraph=True, mode=mode,
    )  # fmt: skip
    mine = k_cache.clone(), v_cache.clone()
    expected = 2.0 * registry.load("cached_attention").reference(
        q * 1.1, k, v, *mine, position, mask, cos, sin, **options
    )
    output, (code, *_) = run_and_get_code(compiled, q, k, v, position)
    assert problem(output, expected.double()) is None
    assert torch.equal(v_cache, mine[1])
    assert "clone" not in code and f"empty_strided_cuda({tuple(k_cache.shape)}" not in code
    for _ in range(3):
        k_cache[:, :, position] = float("nan")
        assert problem(compiled(q, k, v, position).clone(), expected.double()) is None


def operator_cases():
    x, weight, norm = random(3, 96), random(8, 96), random(96)
    q, k, v, mask = attention((1, 4, 2, 1, 100, 32), torch.float32, "boolean")
    skinny = (x, weight, None, norm, random(3, 4), EPS, True, 4, 1, 2, 128, 1, 1, 1)
    step, _ = step_of((1, 4, 2, 1, 100, 32, "halves", 32, "each", False, 2), torch.float32)
    step = [torch.nan_to_num(x) if i in (3, 4) else x for i, x in enumerate(step)]
    return {
        "skinny_gemm": skinny,
        "skinny_gemm_dependent": skinny,
        "cached_attention": (
            *step,
            None,
            None,
            0,
            2,
            [1, 32, 0],
            [0.0, 0.0],
            0.2,
            [128, 32, 32, 1],
            [32, 2, 1, 4, 2],
        ),
        "decode_attention": (q, k, v, mask, 0.2, [128, 32, 32, 1], 32, 2, 4, 2),
    }


@pytest.mark.parametrize("name", ["skinny_gemm", "skinny_gemm_dependent", "decode_attention", "cached_attention"])
def test_an_operator_keeps_the_contract_of_torch(name) -> None:
    for template in ("skinny_gemm", "decode_attention", "cached_attention"):
        registry.load(template)
    torch.library.opcheck(getattr(torch.ops.agnitra, name).default, operator_cases()[name])


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("pdl", [1, 2])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_layer_of_products_and_attention_compiles_as_one_graph(rows, pdl, mode) -> None:
    torch._dynamo.reset()
    shapes = {"qkv": (rows, 1024, 512), "o": (rows, 512, 512), "mlp": (rows, 2048, 512), "down": (rows, 512, 1024)}
    weights = {name: (random(*shape[1:]) / shape[2] ** 0.5).bfloat16() for name, shape in shapes.items()}
    norm = random(512, dtype=torch.bfloat16)
    products = {}
    for name, shape in shapes.items():
        params = dict(default_config("skinny_gemm", shape, "bfloat16").params) | {"PDL": pdl}
        products[name] = render(KernelConfig(template="skinny_gemm", params=params)).call
    attend = render(default_config("decode_attention", (rows, 4, 2, 128, 64), "bfloat16")).call
    reference, plain = registry.load("skinny_gemm").reference, registry.load("decode_attention").reference

    def layer(h, cache, calls, attention):
        parts = calls["qkv"](h, weights["qkv"], norm_weight=norm, eps=EPS)
        q, k = parts[:, :512].view(rows, 8, 1, 64) * 1.1, parts[:, 512:768].view(rows, 4, 1, 64)
        keys = torch.cat([cache[:, :, 1:], k], dim=2)
        out = attention(q, keys, cache).transpose(1, 2).flatten(1)
        h = calls["o"](out, weights["o"], residual=h)
        g = calls["mlp"](h, weights["mlp"], norm_weight=norm, eps=EPS, activation="silu", gate="gate_first")
        return calls["down"](g, weights["down"], residual=h)

    compiled = torch.compile(lambda h, cache: layer(h, cache, products, attend), fullgraph=True, mode=mode)
    for _ in range(4):
        h, cache = random(rows, 512, dtype=torch.bfloat16), random(rows, 4, 128, 64, dtype=torch.bfloat16)
        output = compiled(h, cache).clone()
        expected = layer(h, cache, dict.fromkeys(shapes, reference), plain)
        assert problem(output, expected.double()) is None
