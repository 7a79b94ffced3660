"""Patching on a real GPU: Triton kernels in the graph, SDPA backends, CUDA graphs, and rollback of a larger state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from agnitra_lab.contracts import Workload
from agnitra_lab.generate.kernels import KernelBook
from agnitra_lab.loop.rehearsal import Rehearsal
from agnitra_lab.patch.candidates import Candidate
from agnitra_lab.patch.ends import flat
from agnitra_lab.patch.graphed import GraphedCall
from agnitra_lab.patch.install import capture_eager, compile_mode, install
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.output_strides import OutputStrides
from agnitra_lab.patch.rewrites import activation_gemm, residual_gemm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WIDTH, INNER, HEADS = 256, 512, 4


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Norm(), Norm()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        rows, tokens, _ = x.shape
        h = self.first(x)
        q = self.query(h).view(rows, tokens, HEADS, -1).transpose(1, 2)
        k = self.key(h).view(rows, tokens, HEADS // 2, -1).transpose(1, 2)
        v = self.value(h).view(rows, tokens, HEADS // 2, -1).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        h = self.second(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Tower(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(num_layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().to("cuda", torch.bfloat16).eval()


def x_of(*shape):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(torch.bfloat16)


def kernels(num_rows):
    from agnitra_lab.generate.defaults import default_config
    from agnitra_lab.generate.render import render

    return lambda template, shape, dtype: render(default_config(template, shape, dtype))


def check_close(ours, theirs):
    scale = theirs.float().pow(2).mean().sqrt()
    within = (ours.float() - theirs.float()).abs() <= 1.6e-2 * (scale + theirs.float().abs())
    assert within.float().mean() >= 0.999


@pytest.mark.parametrize("tokens", [1, 77])
def test_all_actions_together_are_equivalent_and_roll_back(tower, tokens):
    x = x_of(2, tokens, WIDTH)
    actions = ["rms_norm", "swiglu", "qkv_concat", "gate_up_concat", "sdpa_backend", "cuda_graph"]
    patch = install(Workload("tower", tower, (x,)), actions, name="candidate", kernels=kernels(2 * tokens))
    made = [descriptor.action for descriptor in patch.log().descriptors]
    assert {name: made.count(name) for name in ("rms_norm", "swiglu", "qkv_concat", "gate_up_concat")} == {
        "rms_norm": 4, "swiglu": 2, "qkv_concat": 2, "gate_up_concat": 2,
    }  # fmt: skip
    with torch.no_grad():
        for _ in range(4):
            check_close(patch.model(x), tower(x))
    assert patch.model.num_guard_misses == 0
    proof = patch.rollback()
    assert proof.is_restored, proof.detail


def test_outputs_of_a_cuda_graph_outlive_the_next_call(tower):
    x = x_of(1, 3, WIDTH)
    for patch in (
        install(Workload("tower", tower, (x,)), ["cuda_graph"], name="candidate"),
        compile_mode(Workload("tower", tower, (x,)), "reduce-overhead"),
    ):
        with torch.no_grad():
            outputs = [patch.model(x * scale) for scale in (1, 2, 3, 4)]
            for scale, output in zip((1, 2, 3, 4), outputs, strict=True):
                check_close(output, tower(x * scale))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_large_results_of_a_cuda_graph_are_lent_and_keep_their_values_while_they_are_held(tower, is_compiled):
    inputs = [x_of(64, 512, WIDTH) * scale for scale in (1, 2, 3, 4)]
    call = torch.compile(tower, dynamic=False) if is_compiled else tower
    with torch.no_grad():
        graphed = GraphedCall(lambda leaves: flat(call(*leaves), []), [inputs[0]], Liveness(tower))
        expected = [call(x) for x in inputs]
        kept = [graphed([x])[0] for x in inputs]
        part = graphed([inputs[1]])[0][3:5]
        for found, right in zip([*kept, part], [*expected, expected[1][3:5]], strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)
        del kept, found
        places = set()
        for x, right in zip(inputs, expected, strict=True):
            (result,) = graphed([x])
            torch.testing.assert_close(result, right, rtol=0, atol=0)
            places.add(result.data_ptr())
        torch.testing.assert_close(part, expected[1][3:5], rtol=0, atol=0)
    assert len(graphed._instances) == 2 and len(places) <= 2


def test_a_call_that_is_one_large_product_is_captured_without_a_warning(recwarn):
    model = nn.Linear(WIDTH, 40_000, bias=False).to("cuda", torch.bfloat16).eval()
    x = x_of(512, WIDTH)
    with torch.no_grad():
        graphed = GraphedCall(lambda leaves: flat(model(*leaves), []), [x], Liveness(model))
        torch.testing.assert_close(graphed([2 * x]), [model(2 * x)], rtol=0, atol=0)
    assert not [warning for warning in recwarn if "empty" in str(warning.message)]


def test_products_add_themselves_to_a_residual_stream_under_a_cuda_graph(tower, monkeypatch):
    monkeypatch.setattr(residual_gemm, "measure", lambda *_: (2.0, 1.0))
    x = x_of(2, 77, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False).to(x), tower)
    actions = ["residual_gemm", "rms_norm", "cuda_graph"]
    patch = install(Workload("tower", model, (x,)), actions, name="candidate", kernels=KernelBook())
    assert [change.action for change in patch.log().descriptors].count("residual_gemm") == 2 * len(tower.layers)
    with torch.no_grad():
        for scale in (1, 2):
            check_close(patch.model(x * scale), model(x * scale))
    assert patch.model.num_guard_misses == 0


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_the_library_activates_as_torch_does_and_is_as_near_to_fp64(activation, has_bias, monkeypatch):
    assert activation_gemm.measure(x_of(64, WIDTH), x_of(INNER, WIDTH), None, True, activation) is not None
    monkeypatch.setattr(activation_gemm, "measure", lambda *_: (2.0, 1.0))
    torch.manual_seed(0)
    act = nn.ReLU() if activation == "relu" else nn.GELU(approximate="none" if activation == "gelu" else "tanh")
    up, down = nn.Linear(WIDTH, INNER, bias=has_bias), nn.Linear(INNER, WIDTH)
    model = nn.Sequential(up, act, down).to("cuda", torch.bfloat16).eval()
    x = x_of(300, WIDTH)
    patch = install(Workload("mlp", model, (x,)), ["activation_gemm"], name="candidate")
    assert [change.action for change in patch.log().descriptors] == ["activation_gemm"]
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        ours, theirs = ((out.double() - expected).norm() for out in (patch.model(x), model(x)))
    assert ours <= 1.25 * theirs


class Logits(nn.Module):
    """A product of 40 MB at the end, and what `kind` says after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40_000, bias=kind == "bias")
        self.table = nn.Embedding(40_000, 8)

    def forward(self, x):
        hidden = self.norm(x)
        logits = self.head(hidden)
        if self.kind == "capped":
            return 30 * torch.tanh(logits / 30)
        if self.kind == "index":
            return logits, self.table(logits.argmax(-1))
        if self.kind == "hidden":
            return hidden, logits
        return logits[:, -64:].transpose(0, 1) if self.kind == "view" else logits


@pytest.mark.parametrize(
    ("kind", "is_left_out"),
    [("plain", True), ("bias", True), ("view", True), ("hidden", True), ("capped", False), ("index", False)],
)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_large_product_at_the_end_of_a_cuda_graph_writes_to_new_memory(kind, is_left_out, is_compiled):
    torch.manual_seed(0)
    model = Logits(kind).to("cuda", torch.bfloat16).eval()
    inputs = [torch.randn(4, 128, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    call = torch.compile(model, dynamic=False) if is_compiled else model
    with torch.no_grad():
        graphed = GraphedCall(lambda leaves: flat(call(*leaves), []), [inputs[0]], Liveness(model))
        kept = [graphed([x]) for x in inputs]
        for found, x in zip(kept, inputs, strict=True):
            torch.testing.assert_close(found, flat(call(x), []), rtol=0, atol=0)
        model.head.weight.mul_(2)
        torch.testing.assert_close(graphed([inputs[1]]), flat(call(inputs[1]), []), rtol=0, atol=0)
    assert (graphed._graph.tail is not None) == is_left_out


def test_a_product_that_stays_in_a_graph_of_many_ops_is_not_launched_again():
    torch.manual_seed(0)
    head = torch.randn(40_008, WIDTH, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn(512, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def call(leaves):
        (x,) = leaves
        for _ in range(30):
            x = x * 0.99
        return [functional.linear(x, head)[:, :40_001]]

    with torch.no_grad():
        strides = OutputStrides([(40_001, 1)], call(inputs[:1]), [True])
        graphed = GraphedCall(call, inputs[:1], Liveness(nn.Identity()), strides)
        for x in inputs:
            (found,) = graphed([x])
            assert found.is_contiguous()
            torch.testing.assert_close(found, call([x])[0], rtol=0, atol=0)
    assert graphed._graph.tail is None


def test_a_merged_weight_is_read_in_place_by_a_cuda_graph_and_follows_updates(tower):
    x = x_of(1, 3, WIDTH)
    patch = install(Workload("tower", tower, (x,)), ["cuda_graph", "qkv_concat", "gate_up_concat"], name="candidate")
    with torch.no_grad():
        for _ in range(4):
            patch.model(x)
        tower.layers[0].gate.weight.mul_(-1)
        for _ in range(2):
            check_close(patch.model(x), tower(x))
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as capture:
        patch.model(x)
        torch.cuda.synchronize()
    num_copies = sum(event.count for event in capture.key_averages() if "memcpy" in event.key.lower())
    # Four were counted on an H200 (torch 2.11) for one input and one output; which two the others are was not looked
    # into. Four merged weights copied in would come on top of them.
    assert num_copies <= 4


def test_a_cache_of_the_model_is_written_in_place_under_a_cuda_graph():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(WIDTH, 64, bias=False)
            self.value = nn.Linear(WIDTH, 64, bias=False)
            self.register_buffer("cache", torch.zeros(1, 16, 64))

        def forward(self, x, position):
            self.cache.index_copy_(1, position, self.key(x))
            return self.cache.sum(1) + self.value(x)[:, 0], self.cache

    torch.manual_seed(0)
    model = Caching().cuda().eval()
    torch.manual_seed(0)
    twin = Caching().cuda().eval()
    x = torch.randn(1, 1, WIDTH, device="cuda")
    workload = Workload("cache", model, (x, torch.zeros(1, dtype=torch.long, device="cuda")))
    patch = install(workload, ["cuda_graph", "qkv_concat"], name="candidate")
    assert model.cache.count_nonzero() == 0
    with torch.no_grad():
        for step in range(8):
            position = torch.full((1,), step, dtype=torch.long, device="cuda")
            ours, cache = patch.model(x + step, position)
            theirs, _ = twin(x + step, position)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert cache.data_ptr() == model.cache.data_ptr()
    torch.testing.assert_close(model.cache, twin.cache, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 8, 1024, 64), {"is_causal": True}),
        ((1, 8, 1, 128), {}),
        ((2, 8, 257, 64), {"mask": True}),
        ((2, 8, 512, 64), {"is_causal": True, "groups": 4}),
    ],
)
def test_the_chosen_sdpa_backend_is_the_one_that_runs(shape, options):
    class Attend(nn.Module):
        def forward(self, q, k, v, mask=None):
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=options.get("is_causal", False), enable_gqa="groups" in options
            )

    rows, heads, tokens, width = shape
    kv_heads = heads // options.get("groups", 1)
    q = x_of(rows, tokens, heads, width).transpose(1, 2)
    k, v = (x_of(rows, max(tokens, 300), kv_heads, width).transpose(1, 2) for _ in range(2))
    if options.get("is_causal"):
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    args = (q, k, v, torch.rand(tokens, k.shape[2], device="cuda") > 0.3) if options.get("mask") else (q, k, v)
    model = Attend().eval()
    patch = install(Workload("attend", model, args), ["sdpa_backend"], name="candidate")
    log = patch.log()
    assert len(log.descriptors) + len(log.refusals) == 1
    if log.refusals:
        assert "within 3%" in log.refusals[0].reason
    else:
        print(log.descriptors[0].replacement, log.descriptors[0].config)
    with torch.no_grad():
        ours, theirs = patch.model(*args), model(*args)
    assert ours.stride() == theirs.stride()
    check_close(ours, theirs)


def test_a_backend_forced_into_the_graph_survives_inductor():
    from torch._inductor.utils import run_and_get_code
    from torch.nn.attention import SDPBackend

    from agnitra_lab.patch.rewrites import sdpa_backend

    q = x_of(1, 64, 4, 64).transpose(1, 2)
    forced = sdpa_backend._on_backend(SDPBackend.EFFICIENT_ATTENTION)
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(lambda q: forced(query=q, key=q, value=q)), q)
    assert "efficient_attention" in codes[0]


def test_a_fingerprint_of_two_gigabytes_takes_little_time_and_sees_one_bit():
    import time

    from agnitra_lab.patch.rollback import fingerprint

    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.randn(1_100_000_000, device="cuda", dtype=torch.bfloat16), requires_grad=False)
    before = fingerprint(model)
    torch.cuda.synchronize()
    started = time.perf_counter()
    assert fingerprint(model) == before
    print(f"fingerprint of 2.2 GB: {time.perf_counter() - started:.3f} s")
    model.weight.data.view(torch.int16)[777_777_777] ^= 1
    assert fingerprint(model) != before


def test_a_candidate_is_rehearsed_on_a_copy_of_the_model_in_another_process() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH)).cuda().eval()
    workload = Workload("mlp", model, (torch.randn(64, WIDTH, device="cuda"),))
    before = [parameter.clone() for parameter in model.parameters()]
    rehearsal = Rehearsal(workload, {}, (), timing_s=0.3, peaks=None, deadline_s=120.0)
    try:
        found = rehearsal(Candidate("torch.compile", "default", ("cuda_graph",)))
    finally:
        rehearsal.close()
    assert found.result.comparison is not None, found.result.reason
    assert found.result.comparison.equivalence.is_equivalent
    assert all(map(torch.equal, before, model.parameters()))


def test_our_changes_on_both_sides_of_python_run_in_inductors_own_cuda_graphs(tower):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, x):
            x = self.tower(x)
            torch._dynamo.graph_break()
            return self.tower(x)

    model, x = Broken(), x_of(1, 3, WIDTH)
    actions = ["qkv_concat", "gate_up_concat"]
    patch = install(Workload("broken", model, (x,)), actions, name="candidate", base_mode="reduce-overhead")
    assert patch.log().num_graphs == 2 and len(patch.log().descriptors) == 4 * len(tower.layers)
    with torch.no_grad():
        outputs = [patch.model(x * scale) for scale in (1, 2, 3, 4)]
        for scale, output in zip((1, 2, 3, 4), outputs, strict=True):
            check_close(output, model(x * scale))


def test_a_call_that_ends_in_a_large_product_with_a_bias_is_one_cuda_graph():
    """Installed as users do, with gradients recorded around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40_000)).to("cuda", torch.bfloat16).eval()
    x = x_of(512, WIDTH)
    patch = install(Workload("logits", model, (x,)), ["cuda_graph"], name="candidate")
    assert patch.is_whole, patch.log().refusals
    with torch.no_grad():
        check_close(patch.model(2 * x), model(2 * x))


def test_ops_that_run_in_a_capture_alone_leave_nothing_of_the_call_out():
    """The masks of transformers' models are made by other ops while a stream is captured."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40_000)

        def forward(self, x):
            if torch.cuda.is_current_stream_capturing():
                x = (x + 1) - 1
            return self.last(torch.tanh(self.first(x)))

    model = Asking().to("cuda", torch.bfloat16).eval()
    x = x_of(512, WIDTH)
    patch = capture_eager(Workload("asking", model, (x,)), "candidate")
    with torch.no_grad():
        for scale in (1, 2, 3):
            check_close(patch.model(x * scale), model(x * scale))


class Broken(nn.Module):
    """Two towers with Python between them, and an op that no graph holds."""

    def __init__(self, tower, num_columns: int) -> None:
        super().__init__()
        self.tower, self.logits = tower, nn.Linear(WIDTH, num_columns, dtype=torch.bfloat16, device="cuda")

    def forward(self, x):
        # A tensor of a number is new memory, in a graph or out of it.
        first = self.tower(x) * torch.tensor(0.5, device=x.device, dtype=x.dtype)
        torch._dynamo.graph_break()
        second = self.tower(first)
        torch._dynamo.graph_break()
        return {"states": (first, second), "logits": self.logits(second)}


@pytest.mark.parametrize("num_columns", [64, 40_000], ids=["small", "a large last product"])
def test_graphs_with_python_between_them_are_one_cuda_graph_of_ours(tower, num_columns):
    model, x = Broken(tower, num_columns).eval(), x_of(8, 64, WIDTH)
    actions = ["qkv_concat", "gate_up_concat", "cuda_graph"]
    patch = install(Workload("broken", model, (x,)), actions, name="candidate")
    assert patch.log().num_graphs == 3 and patch.is_whole, patch.log().refusals
    assert patch.model.__dict__["_agnitra_fast"].name == "cuda_graph"
    compiled = patch.model.__dict__["_agnitra_compiled"]
    with torch.no_grad():
        kept = [(scale, patch.model(x * scale)) for scale in (1, 2, 3, 4)]
        for scale, found in kept:
            # The same kernels: two towers in bf16 are further from eager's than one.
            expected = compiled(x * scale)
            check_close(found["logits"], expected["logits"])
            check_close(found["states"][0], expected["states"][0])
            check_close(found["states"][0], model(x * scale)["states"][0])
        before = patch.model(x)["logits"]
        # A derived weight follows, and so does the graph.
        tower.layers[0].query.weight.mul_(1.5)
        after = patch.model(x)["logits"]
        check_close(after, compiled(x)["logits"])
        assert not torch.equal(before, after)


class Layer:
    def __init__(self, keys) -> None:
        self.keys = keys


class Cache:
    def __init__(self, keys) -> None:
        self.layers = [Layer(keys)]


class Decoder(nn.Module):
    """A step with a cache: one that it makes, one that it writes, or one that it makes longer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.key, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, position, cache=None):
        keys = self.key(x)
        if self.kind == "made":
            cache = Cache(keys)
        elif self.kind == "written":
            cache.layers[0].keys.index_copy_(1, position, keys)
            position.add_(1)
        else:
            cache.layers[0].keys = torch.cat([cache.layers[0].keys, keys], 1)
        return {"out": self.out(torch.tanh(cache.layers[0].keys).mean(1)), "cache": cache}


@pytest.mark.parametrize("num_rows", [16, 40_000], ids=["copied", "lent"])
@pytest.mark.parametrize("kind", ["made", "written", "longer"])
def test_a_step_with_a_cache_object_is_one_cuda_graph(kind, num_rows):
    torch.manual_seed(0)
    model = Decoder(kind).cuda().eval()

    def make(seed: int):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(1, 1 if kind != "made" else num_rows, WIDTH, device="cuda", generator=generator)
        keys = torch.randn(1, num_rows, WIDTH, device="cuda", generator=generator)
        return (x, torch.full((1,), num_rows - 2, device="cuda")), {} if kind == "made" else {"cache": Cache(keys)}

    args, kwargs = make(0)
    patch = install(Workload("step", model, args, kwargs), ["cuda_graph"], name="candidate")
    assert patch.is_whole and int(args[1]) == num_rows - 2
    kept = []
    with torch.no_grad():
        for seed in range(1, 6):
            (args, kwargs), (theirs, their_kwargs) = make(seed), make(seed)
            kept.append((patch.model(*args, **kwargs), model(*theirs, **their_kwargs)))
            assert torch.equal(args[1], theirs[1])
            if kind != "made":
                assert kept[-1][0]["cache"] is kwargs["cache"]
    for ours, expected in kept:
        torch.testing.assert_close(ours["out"], expected["out"], rtol=1e-4, atol=1e-5)
        keys, their_keys = (result["cache"].layers[0].keys for result in (ours, expected))
        torch.testing.assert_close(keys, their_keys, rtol=1e-4, atol=1e-4)
    assert not patch.model.guard_misses and not patch.model.fast_path_misses
