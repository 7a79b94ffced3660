"""skinny_gemm and decode_attention: they fire on what the graph computes, refuse with a reason, and keep the result.

On the CPU a kernel is its template's plain formula; the Triton kernels themselves are tested in the template suites.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Kernel, KernelConfig, Workload
from agnitra_lab.generate import registry
from agnitra_lab.patch.install import install
from agnitra_lab.workloads.decoders import llama_1b_decode

pytest.importorskip("triton")

WIDTH, OUT = 12, 6
ACTIONS = ["gate_up_concat", "qkv_concat", "skinny_gemm", "rms_norm", "swiglu", "decode_attention"]


def kernel_of(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
    config = KernelConfig(template=template, params={"BLOCK_N": 16})
    return Kernel(config, "", "0" * 64, registry.load(template).reference)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def applied(model: Any, *args: Tensor, actions: list[str] | str = "skinny_gemm", rtol: float = 1e-5) -> Any:
    """Install rewrites, compare with eager (values, shapes, dtypes, strides, arguments), and return the log."""
    actions = [actions] if isinstance(actions, str) else actions
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), actions, name="candidate", kernels=kernel_of, is_lowered=False)
    log = patch.log()
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    pairs = zip(as_tuple(ours) + args, as_tuple(theirs) + twin_args, strict=True)
    for left, right in pairs:
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)
    assert patch.model.num_guard_misses == 0
    return log


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def one(log: Any) -> dict[str, Any]:
    assert len(log.descriptors) == 1, (log.descriptors, log.refusals)
    return log.descriptors[0].config


class Net(nn.Module):
    """A module whose forward is the function given, over a fixed set of weights."""

    def __init__(self, function: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.plain = nn.Linear(WIDTH, OUT, bias=False)
        self.biased = nn.Linear(WIDTH, OUT)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, OUT)
        self.up = nn.Linear(WIDTH, OUT)
        self.both = nn.Linear(WIDTH, 2 * OUT)
        self.turned = nn.Parameter(torch.randn(WIDTH, OUT) / 4)
        self.row = nn.Parameter(torch.randn(OUT))
        self.single = nn.Parameter(torch.randn(1))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("fixed", torch.randn(OUT, WIDTH))
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
        self.to(dtype).eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def x_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X = x_of(2, 1, WIDTH)
NOT_FUSED = {"is_norm_fused": False, "is_residual_fused": False, "activation": "none", "gate": "none"}


# --- the product -----------------------------------------------------------------------------------------------------

SPELLINGS = {
    "module": lambda m, x: m.plain(x),
    "module with bias": lambda m, x: m.biased(x),
    "function": lambda m, x: functional.linear(x, m.plain.weight, bias=m.row),
    "a buffer as weight": lambda m, x: functional.linear(x, m.fixed),
    "@ t()": lambda m, x: x @ m.plain.weight.t(),
    "@ T": lambda m, x: x @ m.plain.weight.T,
    "matmul mT": lambda m, x: torch.matmul(x, m.plain.weight.mT),
    "matmul transpose": lambda m, x: x.matmul(m.plain.weight.transpose(-1, -2)),
    "@ permute": lambda m, x: x @ m.plain.weight.permute(1, 0),
    "@ a [K, N] Parameter": lambda m, x: x @ m.turned,
    "mm": lambda m, x: torch.mm(x.reshape(-1, WIDTH), m.turned).sum(0, keepdim=True),
    "addmm": lambda m, x: torch.addmm(m.row, x.view(-1, x.size(-1)), m.turned).view(2, 1, OUT),
    "addmm t()": lambda m, x: torch.addmm(m.row, x.view(-1, WIDTH), m.plain.weight.t()),
    "twice turned": lambda m, x: x @ m.turned.t().t(),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_few_rows_becomes_a_kernel(name, dtype):
    rtol = 1e-5 if dtype is torch.float32 else 1.6e-2
    config = one(applied(Net(SPELLINGS[name], dtype), x_of(2, 1, WIDTH, dtype=dtype), rtol=rtol))
    assert config["shape"] == [2, OUT, WIDTH]
    assert NOT_FUSED.items() <= config.items()


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (16, WIDTH), (2, 2, 4, WIDTH)], ids=str)
def test_leading_dimensions_are_rows(shape):
    assert one(applied(Net(lambda m, x: m.biased(x)), x_of(*shape)))["shape"][0] == max(
        1, x_of(*shape).numel() // WIDTH
    )


def test_a_turned_weight_follows_updates_of_its_parameter():
    model = Net(lambda m, x: x @ m.turned)
    workload = Workload("case", model, (X,))
    patch = install(workload, ["skinny_gemm"], name="candidate", kernels=kernel_of, is_lowered=False)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(patch.model(X), model(X))
            model.turned.mul_(3)


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("more than 16 rows", lambda m, x: m.plain(x.expand(2, 9, WIDTH))),
        ("few rows", lambda m, x: x * 2),
        ("few rows", lambda m, x: x @ x.transpose(1, 2)),
        ("computed or written", lambda m, x: functional.linear(x, m.plain.weight * 2)),
        ("computed or written", lambda m, x: (m.plain(x), m.plain.weight.clamp_(-9, 9))),
        ("bias is computed", lambda m, x: functional.linear(x, m.plain.weight, m.row + 1)),
        ("few rows", lambda m, x: torch.addmm(m.single, x.view(2, WIDTH), m.turned)),
        ("not of one floating dtype", lambda m, x: m.double().plain(x.double())),
        ("not a Parameter", lambda m, x: x @ m.fixed.t().contiguous().t().t() @ m.fixed),
    ],
    ids=["rows", "none", "two activations", "computed", "written", "bias", "broadcast bias", "fp64", "turned buffer"],
)
def test_what_no_kernel_can_take_is_refused(because, function):
    log = applied(Net(function), X.clone())
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


# --- the norm before it ----------------------------------------------------------------------------------------------


def by_hand(m: Net, x: Tensor) -> Tensor:
    wide = x.float()
    return m.norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.plain(m.norm(x)),
        lambda m, x: m.plain(by_hand(m, x)),
        lambda m, x: by_hand(m, x).view(-1, WIDTH) @ m.turned,
        lambda m, x: m.biased(m.drop(m.norm(x))),
    ],
    ids=["nn.RMSNorm", "by hand", "view and mm", "dropout in eval mode"],
)
def test_a_norm_that_only_products_read_goes_into_them(function, dtype):
    rtol = 1e-5 if dtype is torch.float32 else 1.6e-2
    log = applied(Net(function, dtype), x_of(2, 1, WIDTH, dtype=dtype), rtol=rtol)
    assert one(log)["is_norm_fused"] is True


def test_a_norm_stays_before_a_product_whose_kernel_would_norm_x_for_each_tile(monkeypatch):
    def through_stages(template: str, shape: tuple[int, ...], dtype: str) -> Kernel:
        config = KernelConfig(template=template, params={"BLOCK_N": 16, "num_stages": 4})
        return Kernel(config, "", "0" * 64, registry.load(template).reference)

    monkeypatch.setitem(globals(), "kernel_of", through_stages)
    model = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, OUT))
    assert one(applied(model, torch.randn(12, WIDTH)))["is_norm_fused"] is False


def test_two_products_of_one_norm_each_compute_it():
    log = applied(Net(lambda m, x: m.plain(m.norm(x)) * m.biased(m.norm(x))), X)
    assert [descriptor.config["is_norm_fused"] for descriptor in log.descriptors] == [True, True]
    shared = Net(lambda m, x: (lambda h: m.plain(h) - m.biased(h))(m.norm(x)))
    assert [descriptor.config["is_norm_fused"] for descriptor in applied(shared, X).descriptors] == [True, True]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda h: (m.plain(h), h * 2))(m.norm(x)),
        lambda m, x: (lambda h: (m.plain(h), h))(m.norm(x)),
        lambda m, x: (lambda h: (m.plain(h), m.square(h.expand(20, 2, 1, WIDTH))))(m.norm(x)),
        lambda m, x: (lambda x: (lambda h: (x.mul_(2), m.plain(h)))(m.norm(x)))(x * 1.5),
    ],
    ids=["another reader", "an output", "a product of many rows", "x written after the norm"],
)
def test_a_norm_that_others_read_or_whose_input_is_written_stays(function):
    configs = [descriptor.config for descriptor in applied(Net(function), X).descriptors]
    assert configs and not any(config["is_norm_fused"] for config in configs)


# --- what follows it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda y: functional.relu(y)),
        ("relu", lambda y: y.relu()),
        ("gelu", lambda y: functional.gelu(y)),
        ("gelu_tanh", lambda y: nn.GELU(approximate="tanh")(y)),
        ("silu", lambda y: nn.SiLU()(y)),
        ("silu", lambda y: y * torch.sigmoid(y)),
        ("sigmoid", lambda y: y.sigmoid()),
        ("none", lambda y: functional.relu(y) + y),
        ("none", lambda y: functional.relu(y, inplace=True)),
        ("none", lambda y: torch.tanh(y)),
    ],
)
def test_an_activation_goes_into_the_product_when_nothing_else_reads_it(activation, function):
    config = one(applied(Net(lambda m, x: function(m.biased(x))), X))
    assert config["activation"] == activation


def test_a_sigmoid_of_the_result_and_its_product_with_something_else_are_two_things():
    assert (
        one(applied(Net(lambda m, x, y: y * torch.sigmoid(m.plain(x))), X, x_of(2, 1, OUT)))["activation"] == "sigmoid"
    )


GATES = {
    "two linears": lambda m, x: functional.silu(m.gate(x)) * m.up(x),
    "up is called first": lambda m, x: (lambda u, g: functional.gelu(g) * u)(m.up(x), m.gate(x)),
    "x * sigmoid(x)": lambda m, x: (lambda g, u: u * (g * g.sigmoid()))(m.gate(x), m.up(x)),
}
MERGED = {
    "chunk": lambda m, x: (lambda g, u: functional.silu(g) * u)(*m.both(x).chunk(2, dim=-1)),
    "chunk, up first": lambda m, x: (lambda u, g: functional.silu(g) * u)(*m.both(x).chunk(2, -1)),
    "split": lambda m, x: (lambda g, u: functional.relu(g) * u)(*torch.split(m.both(x), OUT, dim=-1)),
    "slices": lambda m, x: (lambda y: functional.gelu(y[..., :OUT]) * y[..., OUT:])(m.both(x)),
    "narrow": lambda m, x: (lambda y: y.narrow(-1, 0, OUT) * torch.sigmoid(y.narrow(2, OUT, OUT)))(m.both(x)),
}


@pytest.mark.parametrize("name", GATES)
def test_gate_and_up_are_one_product(name):
    log = applied(Net(GATES[name]), X, actions=ACTIONS)
    (config,) = (descriptor.config for descriptor in log.descriptors if descriptor.action == "skinny_gemm")
    assert config["gate"] == ("up_first" if name == "up is called first" else "gate_first")
    assert config["shape"] == [2, 2 * OUT, WIDTH]


@pytest.mark.parametrize("name", MERGED)
def test_a_model_that_merges_gate_and_up_itself_is_understood(name):
    config = one(applied(Net(MERGED[name]), X))
    assert config["gate"] == ("up_first" if name in ("chunk, up first", "narrow") else "gate_first")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda g, u: functional.silu(g) * u + g)(*m.both(x).chunk(2, dim=-1)),
        lambda m, x: (lambda y: functional.silu(y[..., :OUT]) * y[..., :OUT])(m.both(x)),
        lambda m, x: (lambda y: functional.silu(y[..., : OUT + 1]) * y[..., OUT - 1 :])(m.both(x)),
        lambda m, x: (lambda y: functional.silu(y[:1]) * y[1:])(m.both(x)),
        lambda m, x: (lambda y: functional.silu(y[..., ::2]) * y[..., 1::2])(m.both(x)),
        lambda m, x: (lambda g, u: torch.tanh(g) * u)(*m.both(x).chunk(2, dim=-1)),
    ],
    ids=["gate read again", "one half twice", "overlapping", "rows", "interleaved", "tanh"],
)
def test_what_only_looks_like_a_gate_is_left_alone(function):
    assert one(applied(Net(function), X))["gate"] == "none"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.square(x),
        lambda m, x: m.square(x).add(x),
        lambda m, x: x + m.drop(functional.relu(m.square(x))),
        lambda m, x: x + m.square(x.view(-1, WIDTH)).view(2, 1, WIDTH),
    ],
    ids=["operator", "method", "activation and dropout", "views"],
)
def test_the_residual_goes_into_the_product(function):
    assert one(applied(Net(function), X))["is_residual_fused"] is True


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: y + y)(m.square(x)),
        lambda m, x: m.square(x) + 1.0,
        lambda m, x: m.square(x) + x[:1],
        lambda m, x: torch.add(x, m.square(x), alpha=2),
        lambda m, x: (lambda y: (x + y, y * 2))(m.square(x)),
        lambda m, x: x.double() + m.square(x),
        lambda m, x: x.transpose(0, 1).contiguous().transpose(0, 1) + m.square(x),
        lambda m, x: (lambda r: (lambda y: (r.mul_(3), r + y))(m.square(x)))(x * 2),
    ],
    ids=["twice itself", "a number", "broadcast", "alpha", "read again", "dtype", "strides", "written between"],
)
def test_other_sums_are_left_alone(function):
    log = applied(Net(function), x_of(3, 2, WIDTH))
    assert one(log)["is_residual_fused"] is False


def test_a_tower_of_residual_blocks_is_one_kernel_a_product():
    def tower(m, x):
        for _ in range(3):
            x = x + m.square(m.norm(x))
        return m.plain(m.norm(x)), x

    configs = [descriptor.config for descriptor in applied(Net(tower), X).descriptors]
    assert [config["is_norm_fused"] for config in configs] == [True] * 4
    assert [config["is_residual_fused"] for config in configs] == [True, True, True, False]


# --- decode_attention ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def qkv(heads: int = 4, kv_heads: int = 2, queries: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        x_of(2, heads, queries, 8, dtype=dtype),
        x_of(2, kv_heads, 11, 8, dtype=dtype, seed=2),
        x_of(2, kv_heads, 11, 8, dtype=dtype, seed=3),
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, mask, **options)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, keys, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, times, keys, size).reshape(batch, heads * times, keys, size)


GROUPED = {
    "enable_gqa": lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
    "repeat_kv": lambda q, k, v: sdpa(q, repeat_kv(k, 2), repeat_kv(v, 2)),
    "unsqueeze": lambda q, k, v: sdpa(
        q,
        k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
        v.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    ),
    "repeat_interleave": lambda q, k, v: sdpa(q, k.repeat_interleave(2, 1), torch.repeat_interleave(v, 2, dim=1)),
}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_of_few_queries_reads_each_key_head_where_it_lies(name, queries):
    log = applied(Attention(GROUPED[name]), *qkv(queries=queries), actions="decode_attention")
    config = one(log)
    assert config["shape"] == [2, 2, 2 * queries, 11, 8]
    assert config["is_repetition_dropped"] is (name != "enable_gqa")


@pytest.mark.parametrize(
    "mask",
    [torch.arange(11)[None] < 7, x_of(2, 1, 1, 11), x_of(4, 1, 11), torch.ones(2, 4, 1, 11, dtype=torch.bool)],
    ids=["boolean", "a batch", "a head", "full"],
)
def test_masks_that_broadcast_are_taken(mask):
    log = applied(
        Attention(lambda q, k, v, m: sdpa(q, k, v, m, scale=0.3)), *qkv(4, 4), mask, actions="decode_attention"
    )
    assert one(log)["has_mask"] is True


def test_the_result_keeps_its_strides_and_the_heads_may_lie_inside():
    def inside(q, k, v):
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

    tensors = x_of(2, 1, 4, 8), x_of(2, 11, 4, 8, seed=2), x_of(2, 11, 4, 8, seed=3)
    assert one(applied(Attention(inside), *tensors, actions="decode_attention"))["shape"] == [2, 4, 1, 11, 8]


@pytest.mark.parametrize("times", [2])
def test_heads_repeated_in_another_order_are_not_taken_for_groups(times):
    def turned(q, k, v):
        return sdpa(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))

    config = one(applied(Attention(turned), *qkv(), actions="decode_attention"))
    assert config["is_repetition_dropped"] is False and config["shape"][1] == 4


def test_a_cache_written_after_the_repetition_is_not_read_instead_of_the_copy():
    def written(q, k, v):
        wide = repeat_kv(k, 2)
        k.add_(1)
        return sdpa(q, wide, repeat_kv(v, 2))

    assert one(applied(Attention(written), *qkv(), actions="decode_attention"))["is_repetition_dropped"] is False


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("more than 4 queries", lambda q, k, v: sdpa(q.expand(2, 4, 5, 8), k, v)),
        ("is_causal", lambda q, k, v: sdpa(q, k, v, is_causal=True)),
        ("four dimensions", lambda q, k, v: sdpa(q[0], k[0], v[0])),
        ("floating dtype", lambda q, k, v: sdpa(q.double(), k.double(), v.double())),
        ("not contiguous", lambda q, k, v: sdpa(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)),
        ("no scaled_dot_product_attention", lambda q, k, v: q + 1),
    ],
    ids=["queries", "causal", "three dimensions", "fp64", "strides", "none"],
)
def test_attention_that_is_no_decode_is_refused(because, function):
    log = applied(Attention(function), *qkv(4, 4), actions="decode_attention")
    assert not log.descriptors
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


# --- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoders_layer_is_four_products_and_one_attention(dtype):
    workload = llama_1b_decode("tiny", "cpu", dtype)
    twin = copy.deepcopy(workload.model)
    patch = install(workload, ACTIONS, name="candidate", kernels=kernel_of, is_lowered=False)
    counts = [descriptor.action for descriptor in patch.log().descriptors]
    assert {name: counts.count(name) for name in counts} == {
        "gate_up_concat": 2, "qkv_concat": 2, "skinny_gemm": 9, "decode_attention": 2,
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(patch.model(*workload.args), twin(*workload.args))
