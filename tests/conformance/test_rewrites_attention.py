"""Attention written by hand in any spelling becomes SDPA with the same values, hidden rows included, or is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.masks import Band, allowed_keys, band_of
from agnitra_lab.patch.rewrites import sdpa_backend
from agnitra_lab.patch.windows import windowed_attentions

BATCH, HEADS, STEPS, SIZE = 2, 3, 7, 8
WIDTH = HEADS * SIZE
INF = float("-inf")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A module whose forward is the function given, over the buffers of people's attention layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias_table = nn.Parameter(torch.randn(HEADS, STEPS, STEPS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.register_buffer("allowed", torch.tril(torch.ones(STEPS, STEPS, dtype=torch.bool)))
        self.plain = torch.full((STEPS, STEPS), INF).triu(1)
        self.dropout = nn.Dropout(0.1)
        self.eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def heads(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = (heads(BATCH, HEADS, STEPS, SIZE, seed=seed) for seed in (1, 2, 3))
PADDING = torch.ones(BATCH, STEPS, dtype=torch.int64)
PADDING[0, 5:] = 0
BLIND = PADDING.clone()
BLIND[1] = 0


def check(function: Any, *args: Tensor, expected: int = 1, tolerance: float = 1e-5, model: Any = None) -> Any:
    """Install the rewrite, compare with eager (values, strides), and return patch and log."""
    torch.manual_seed(0)
    model = Net(function) if model is None else model
    twin, twin_args = copy.deepcopy((model, args))
    patch = install(Workload("case", model, args), ["attention_by_hand"], name="candidate", is_lowered=False)
    log = patch.log()
    assert len(log.descriptors) == expected, log.refusals
    with torch.no_grad():
        ours, theirs = patch.model(*args), twin(*twin_args)
    for left, right in zip(as_tuple(ours), as_tuple(theirs), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    return patch, log


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_refused(function: Any, *args: Tensor, because: str) -> None:
    _, log = check(function, *args, expected=0)
    assert any(because in refusal.reason for refusal in log.refusals), log.refusals


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


PRODUCTS = {
    "operators": lambda m, q, k, v: attend(q @ k.transpose(-2, -1) * SIZE**-0.5, v),
    "mT": lambda m, q, k, v: attend(q @ k.mT / math.sqrt(SIZE), v),
    "methods": lambda m, q, k, v: q.matmul(k.transpose(3, 2)).div(math.sqrt(SIZE)).softmax(dim=-1).matmul(v),
    "scale on q": lambda m, q, k, v: attend((q * 0.3) @ k.transpose(-1, -2), v),
    "scale on k": lambda m, q, k, v: attend(q @ (k / 3.0).transpose(-1, -2), v),
    "no scale": lambda m, q, k, v: attend(torch.matmul(q, k.permute(0, 1, 3, 2)), v),
    "scale of a tensor": lambda m, q, k, v: attend(q @ k.mT / torch.sqrt(torch.tensor(q.size(-1))), v),
    "temperature": lambda m, q, k, v: attend(q @ k.mT * m.temperature, v),
    "in place": lambda m, q, k, v: attend((q @ k.mT).mul_(0.2).div_(0.5), v),
    "softmax in float": lambda m, q, k, v: (
        functional.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "scores in float": lambda m, q, k, v: functional.softmax((q @ k.mT).float(), dim=3).type_as(q) @ v,
    "nn.Softmax and dropout": lambda m, q, k, v: torch.matmul(m.dropout(nn.Softmax(dim=-1)(q @ k.mT)), v),
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
    ),
    "einsum with spaces and dots": lambda m, q, k, v: torch.einsum(
        "... i j, ... j d -> ... i d", torch.einsum("...id, ...jd -> ...ij", [q, k]).softmax(-1), v
    ),
    "bmm": lambda m, q, k, v: (
        torch.bmm(
            torch.bmm(q.reshape(-1, STEPS, SIZE), k.reshape(-1, STEPS, SIZE).transpose(1, 2)).softmax(-1),
            v.reshape(-1, STEPS, SIZE),
        ).view(BATCH, HEADS, STEPS, SIZE)
    ),
    "baddbmm": lambda m, q, k, v: (
        torch.baddbmm(
            m.plain[None].expand(BATCH * HEADS, -1, -1),
            q.flatten(0, 1),
            k.flatten(0, 1).mT,
            beta=1.0,
            alpha=0.25,
        )
        .view(BATCH, HEADS, STEPS, STEPS)
        .softmax(-1)
        .view(BATCH * HEADS, STEPS, STEPS)
        .bmm(v.flatten(0, 1))
    ),
    "one head": lambda m, q, k, v: torch.softmax(q[0, 0] @ k[0, 0].T, dim=1) @ v[0, 0],
    "one key head": lambda m, q, k, v: attend(q @ k[:, :1].mT, v[:, :1]),
    "one key head, einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bjd->bihd", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "layout b i h d": lambda m, q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)) * 0.5, -1),
        v.transpose(1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_any_spelling_becomes_sdpa(name, dtype):
    if name in ("baddbmm", "temperature") and dtype is torch.bfloat16:
        pytest.skip("its weights are float32")
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    _, log = check(PRODUCTS[name], Q.to(dtype), K.to(dtype), V.to(dtype), tolerance=tolerance)
    assert log.descriptors[0].replacement == "scaled_dot_product_attention"


def masked(change: Any) -> Any:
    return lambda m, q, k, v, *rest: attend(change(m, q @ k.mT / math.sqrt(SIZE), *rest), v)


def statement(m, s):
    s.masked_fill_(~m.allowed, INF)
    return s


def old_bert(m, s):
    grid = torch.arange(s.size(-1))
    mask = torch.full((s.size(-1), s.size(-1)), torch.finfo(s.dtype).min)
    mask.masked_fill_(grid < (grid + 1).view(-1, 1), 0)
    return s + mask


def by_conditions(m, s):
    """As transformers 5 makes it for every decoder: conditions on places, one after the other."""
    places = torch.arange(s.size(-1), device=s.device)
    seen = places.new_ones((), dtype=torch.bool)
    seen = seen & (places[None, None, None, :] <= places[None, None, :, None])
    same_text = torch.zeros_like(places).expand(BATCH, -1)
    seen = seen & (same_text[:, None, :, None] == same_text[:, None, None, :])
    return s + torch.where(seen.expand(BATCH, -1, s.size(-2), -1), 0.0, torch.finfo(s.dtype).min)


CAUSAL = {
    "transformers 5": by_conditions,
    "minGPT": lambda m, s: s.masked_fill(m.tril[:, :, :STEPS, :STEPS] == 0, INF),
    "-1e10": lambda m, s: s.masked_fill(m.tril[:, :, :STEPS, :STEPS] == 0, -1e10),
    "not of a boolean buffer": statement,
    "GPT-2": lambda m, s: torch.where(m.allowed, s, torch.full([], torch.finfo(s.dtype).min)),
    "method where": lambda m, s: s.where(m.allowed, INF),
    "tensor attribute": lambda m, s: s + m.plain,
    "added in place": lambda m, s: s.add_(m.plain),
    "tril in the graph": lambda m, s: s.masked_fill(torch.tril(torch.ones(STEPS, STEPS)).logical_not(), INF),
    "triu of -inf": lambda m, s: torch.triu(torch.full((STEPS, STEPS), INF), diagonal=1) + s,
    "arange": lambda m, s: torch.where(
        torch.arange(STEPS)[:, None] >= torch.arange(STEPS)[None, :], s, torch.tensor(-1e9)
    ),
    "transformers": old_bert,
    "scaled later": lambda m, s: (s + m.plain) * 0.5,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_constant_causal_mask_becomes_is_causal(name):
    _, log = check(masked(CAUSAL[name]), Q, K, V)
    assert log.descriptors[0].config["mask"] == "causal"


ADDITIVE = {
    "relative bias": lambda m, s, p: s + m.bias_table,
    "bias and causal": lambda m, s, p: (s + m.bias_table).masked_fill(~m.allowed, INF),
    "padding, additive": lambda m, s, p: s + (1.0 - p[:, None, None, :].float()) * torch.finfo(s.dtype).min,
    "padding, subtracted": lambda m, s, p: s - 1e4 * (1.0 - p[:, None, None, :].float()),
    "padding, -inf": lambda m, s, p: s.masked_fill(p[:, None, None, :] == 0, INF),
    "padding, -1e9": lambda m, s, p: s.masked_fill(
        p[:, None, None, :] == 0, -6e4 if s.dtype is torch.float16 else -1e9
    ),
    "padding, lowest": lambda m, s, p: s.masked_fill(
        p.bool().logical_not()[:, None, None], torch.finfo(s.dtype).min
    ),
    "padding and causal": lambda m, s, p: s.masked_fill(
        ((p[:, None, None, :] > 0) & m.allowed).logical_not(), INF
    ),
    "padding where": lambda m, s, p: torch.where(p[:, None, None, :] > 0, s, -1e9),
    "two masks": lambda m, s, p: (s + m.plain).masked_fill(p[:, None, None, :] == 0, -1e9),
    "windows": lambda m, s, p: (
        (s.view(1, BATCH, HEADS, STEPS, STEPS) + p[:, None, None, :].float()[None]).view(-1, HEADS, STEPS, STEPS)
    ),
    "one head each": lambda m, s, p: (
        s.flatten(0, 1).masked_fill((p == 0).repeat_interleave(HEADS, 0)[:, None], INF).view_as(s)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("padding", [PADDING, BLIND], ids=["some hidden", "a text that is all padding"])
def test_other_masks_become_additive_ones_that_keep_what_hidden_rows_do(name, padding):
    _, log = check(masked(ADDITIVE[name]), Q, K, V, padding)
    assert log.descriptors[0].config["mask"] == "additive"


def test_a_bias_made_as_steps_by_heads_reaches_the_kernel_with_its_keys_side_by_side(monkeypatch):
    """No fused kernel of a GPU takes it as T5 makes it: from rows of a table, one value a head in each."""
    seen = []
    original = functional.scaled_dot_product_attention

    def spy(*args: Tensor, **options: Any) -> Tensor:
        seen.append(options["attn_mask"].stride(-1))
        return original(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    check(masked(lambda m, s: s + m.bias_table.movedim(1, -1).contiguous().movedim(-1, 1)), Q, K, V)
    assert seen and set(seen) == {1}


def test_a_causal_mask_over_more_keys_than_queries_stays_a_mask():
    function = masked(lambda m, s: s.masked_fill(m.tril[:, :, :3, :STEPS] == 0, INF))
    _, log = check(function, Q[:, :, :3], K, V)
    assert log.descriptors[0].config["mask"] == "additive"


def test_a_condition_that_two_masks_share_is_known_to_both():
    def tower(m, q, k, v):
        places = torch.arange(STEPS)
        causal = places[:, None] >= places
        window = causal & (places[:, None] - places < 3)
        q = attend((q @ k.mT).masked_fill(~window, INF), v)
        return attend((q @ k.mT).masked_fill(~causal, INF), v)

    _, log = check(tower, Q, K, V, expected=2)
    assert [descriptor.config["mask"] for descriptor in log.descriptors] == ["additive", "causal"]


def test_layers_share_one_mask():
    def tower(m, q, k, v, p):
        bias = (1.0 - p[:, None, None, :].float()) * -1e4
        for _ in range(3):
            q = attend(q @ k.mT + bias, v)
        return q

    patch, _ = check(tower, Q, K, V, PADDING, expected=3)
    assert patch.model.num_guard_misses == 0


def test_a_module_with_merged_projections_and_views_after_it():
    def layer(m, x):
        q, k, v = m.qkv(x).view(BATCH, STEPS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        out = attend(q @ k.transpose(-2, -1) * SIZE**-0.5, v)
        return out.transpose(1, 2).contiguous().view(BATCH, STEPS, WIDTH), out.view(BATCH, -1).relu()

    check(layer, heads(BATCH, STEPS, WIDTH))


def test_half_precision_queries_that_were_widened_for_the_scores():
    def widened(m, q, k, v):
        return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v

    check(widened, *(x.to(torch.bfloat16) for x in (Q, K, V)), tolerance=2e-2)


def test_a_causal_buffer_that_changes_sends_calls_to_the_original_graph():
    model = Net(masked(CAUSAL["minGPT"]))
    patch, _ = check(None, Q, K, V, model=model)
    with torch.no_grad():
        before = patch.model(Q, K, V)
        model.tril.fill_(1.0)
        changed = patch.model(Q, K, V)
        torch.testing.assert_close(changed, model(Q, K, V))
        assert (changed - before).abs().max() > 1e-3
        model.tril.copy_(torch.tril(torch.ones(16, 16)))
        torch.testing.assert_close(patch.model(Q, K, V), before)


def returns_weights(m, q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize(
    ("because", "function"),
    [
        ("used elsewhere", returns_weights),
        ("no softmax", lambda m, q, k, v: torch.relu(q @ k.mT) @ v),
        ("no softmax", lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v),
        ("capped by tanh", lambda m, q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v),
        ("multiplied by a tensor", lambda m, q, k, v: attend(q @ k.mT * m.tril[..., :STEPS, :STEPS], v)),
        ("does not hide", masked(lambda m, s: s.masked_fill(~m.allowed, -100.0))),
        ("scaled by", lambda m, q, k, v: attend(q @ k.mT * -1.0, v)),
        ("written between", lambda m, q, k, v: (lambda s: (k.add_(1), attend(s, v)))(q @ k.mT)),
        ("dropout", lambda m, q, k, v: functional.dropout((q @ k.mT).softmax(-1), 0.5) @ v * 0),
    ],
    ids=["weights", "relu", "dim", "soft cap", "gate", "-100", "negative", "written", "dropout"],
)
def test_what_is_no_plain_attention_is_refused(because, function):
    check_refused(function, Q, K.clone(), V, because=because)


def test_float16_takes_biases_and_refuses_sums_that_may_hide_whole_rows():
    q, k, v = (x.half() for x in (Q, K, V))
    check(masked(lambda m, s: s + m.bias_table.half()), q, k, v, tolerance=5e-3)
    for name in ("padding, additive", "padding, -1e9"):
        function = masked(lambda m, s, p, name=name: ADDITIVE[name](m, s, p).half())
        _, log = check(function, q, k, v, BLIND, expected=0, tolerance=5e-3)
        assert "float16" in log.refusals[0].reason or "float32" in log.refusals[0].reason


# --- sdpa_backend on constant masks ----------------------------------------------------------------------------------


def sdpa_case(function: Any, *args: Tensor) -> Any:
    model = Net(function)
    patch = install(Workload("case", model, args), ["sdpa_backend"], name="candidate", is_lowered=False)
    with torch.no_grad():
        ours, theirs = patch.model(*args), model(*args)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return patch.log()


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, q: m.allowed,
        lambda m, q: m.plain,
        lambda m, q: m.tril[:, :, :STEPS, :STEPS] > 0,
        lambda m, q: torch.arange(STEPS)[None, :] <= torch.arange(STEPS)[:, None],
    ],
    ids=["boolean buffer", "additive attribute", "slice", "arange"],
)
def test_a_constant_causal_mask_of_sdpa_becomes_is_causal(mask):
    log = sdpa_case(lambda m, q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask(m, q)), Q, K, V)
    assert log.descriptors[0].replacement == "SDPA backend default, is_causal for its mask"


def test_a_mask_that_hides_nothing_goes_away_and_one_of_the_call_stays():
    log = sdpa_case(
        lambda m, q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(STEPS, STEPS)),
        Q,
        K,
        V,
    )
    assert log.descriptors[0].replacement == "SDPA backend default, no mask"
    given = torch.ones(STEPS, STEPS, dtype=torch.bool).tril()
    log = sdpa_case(
        lambda m, q, k, v, mask: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), Q, K, V, given
    )
    assert not log.descriptors


def window_of(num_steps: int, left: int, right: int) -> Tensor:
    distance = torch.arange(num_steps)[None, :] - torch.arange(num_steps)[:, None]
    return (distance >= -left) & (distance <= right)


@pytest.mark.parametrize(("num_steps", "left", "right"), [(300, 40, 0), (257, 63, 0), (200, 20, 11), (140, 0, 0)])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_attention_in_blocks_is_the_attention_of_the_band(num_steps, left, right, num_key_heads):
    q = heads(1, 4, num_steps, 8)
    k, v = heads(1, num_key_heads, num_steps, 8, seed=2), heads(1, num_key_heads, num_steps, 8, seed=3)
    mask = window_of(num_steps, left, right)
    band = band_of(mask, num_steps, num_steps)
    assert band == Band(left, right)
    expected = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=num_key_heads != 4)
    attentions = windowed_attentions(band, num_steps, num_steps)
    blocks = {name: attention for name, attention in attentions.items() if name.startswith("blocks")}
    assert blocks
    for attention in blocks.values():
        ours = attention(query=q, key=k, value=v, attn_mask=mask, is_causal=False, scale=None, enable_gqa=True)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_window_that_measures_faster_takes_over(monkeypatch):
    times = iter([9.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr(sdpa_backend, "time_ms", lambda call, device: next(times))
    q, k, v = (heads(1, 2, 300, 8, seed=seed) for seed in (1, 2, 3))

    def windowed(m, q, k, v):
        distance = torch.arange(300)[:, None] - torch.arange(300)[None, :]
        mask = (distance >= 0) & (distance < 40)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    log = sdpa_case(windowed, q, k, v)
    assert log.descriptors[0].replacement.startswith("SDPA backend blocks_of_")


def test_masks_that_are_no_band_are_none():
    for mask in (torch.eye(5, dtype=torch.bool).flip(0), torch.zeros(5, 5, dtype=torch.bool)):
        assert band_of(mask, 5, 5) is None
    per_head = torch.stack([window_of(5, 1, 0), window_of(5, 2, 0)])
    assert band_of(per_head, 5, 5) is None
    assert allowed_keys(torch.full((2, 3), INF)) is None
    assert allowed_keys(torch.tensor([[0.0, -100.0]])) is None


def test_a_window_by_hand_reaches_the_windows_kernels(monkeypatch):
    times = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(sdpa_backend, "time_ms", lambda call, device: next(times))
    q, k, v = (heads(1, 2, 300, 8, seed=seed) for seed in (1, 2, 3))

    def windowed(m, q, k, v):
        distance = torch.arange(300)[:, None] - torch.arange(300)[None, :]
        scores = (q @ k.mT).masked_fill(~((distance >= 0) & (distance < 40)), INF)
        return scores.softmax(-1) @ v

    model = Net(windowed)
    workload = Workload("case", model, (q, k, v))
    patch = install(workload, ["attention_by_hand", "sdpa_backend"], name="candidate", is_lowered=False)
    by_hand, backend = patch.log().descriptors
    assert by_hand.config["mask"] == "additive"
    assert backend.replacement.startswith("SDPA backend blocks_of_")
    with torch.no_grad():
        torch.testing.assert_close(patch.model(q, k, v), model(q, k, v), rtol=1e-5, atol=1e-5)
