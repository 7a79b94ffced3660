"""open_layers: torch's attention modules as steps, with every mask and order of dimensions, beside eager's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rewrites import check_applied, check_refused, fresh_dynamo, x_of
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from written_language import Formula

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.install import install
from agnitra_lab.patch.rewrites import open_layers

__all__ = ["fresh_dynamo"]

N, L, S, E, H = 2, 6, 9, 16, 4
X, CONTEXT = x_of(N, L, E), x_of(N, S, E, seed=2)
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.zeros(N, L, dtype=torch.bool).index_fill(1, torch.tensor([L - 1]), True)


def module(function: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"batch_first": True} | options
    attention = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for bias in (attention.in_proj_bias, attention.out_proj.bias):
            if bias is not None:
                bias.uniform_(-1, 1)
    return Formula(function, attention=attention, first=nn.LayerNorm(E)).eval()


SELF: dict[str, Any] = {
    "weights that nobody reads": lambda m, x: m.attention(x, x, x)[0],
    "weights": lambda m, x: m.attention(x, x, x),
    "weights of each head": lambda m, x: m.attention(x, x, x, average_attn_weights=False),
    "no weights": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
    "boolean mask": lambda m, x: m.attention(x, x, x, attn_mask=CAUSAL)[0],
    "boolean mask, no weights": lambda m, x: m.attention(x, x, x, attn_mask=CAUSAL, need_weights=False)[0],
    "causal": lambda m, x: m.attention(x, x, x, attn_mask=CAUSAL, need_weights=False, is_causal=True)[0],
    "padding": lambda m, x: m.attention(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
    "padding and causal": lambda m, x: m.attention(
        x, x, x, key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False, is_causal=True
    )[0],
    "mask of each head": lambda m, x: m.attention(x, x, x, attn_mask=x_of(N * H, L, L, seed=5))[0],
    "keys of other values": lambda m, x: m.attention(x, x + 1, x * 2)[0],
    "residual and norm": lambda m, x: m.first(x + m.attention(x, x, x)[0]),
}


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_module_becomes_its_steps(name: str, batch_first: bool) -> None:
    x = X if batch_first else X.transpose(0, 1).contiguous()
    check_applied("open_layers", module(SELF[name], batch_first=batch_first), x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_over_another_input_takes_two_products(batch_first: bool, bias: bool) -> None:
    x, other = (X, CONTEXT) if batch_first else (X.transpose(0, 1).contiguous(), CONTEXT.transpose(0, 1).contiguous())
    model = module(lambda m, x, y: m.attention(x, y, y)[0] + x, batch_first=batch_first, bias=bias)
    check_applied("open_layers", model, x, other)


def test_what_nobody_reads_is_fused_and_what_somebody_reads_is_not() -> None:
    for name, fused in (("weights that nobody reads", 1), ("weights", 0)):
        workload = Workload("case", module(SELF[name]), (X,))
        actions = ["open_layers", "attention_by_hand"]
        found = install(workload, actions, name="candidate", is_lowered=False).log().descriptors
        assert [one.action for one in found] == actions[: 1 + fused]
        torch._dynamo.reset()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_becomes_its_steps(norm_first: bool, activation: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True, norm_first=norm_first, activation=activation)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    log = check_applied("open_layers", encoder, X, expected=2)
    assert {found.replacement for found in log.descriptors} == {"the steps of an encoder layer"}


@pytest.mark.parametrize(("device", "approximate"), [("cuda", "tanh"), ("cpu", "none")])
def test_the_gelu_of_an_encoder_layer_is_the_one_that_its_call_computes_on_the_device(device, approximate) -> None:
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    with FakeTensorMode():
        hidden.meta["example_value"] = torch.empty(2, 3, 4, device=device)
    last = graph.output(hidden)
    context = RewriteContext(fx.GraphModule(nn.Module(), graph), [], None)
    assert open_layers._activated(hidden, True, last, context).kwargs == {"approximate": approximate}


def test_a_decoder_layer_becomes_its_steps() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 24, batch_first=True).eval()
    check_applied("open_layers", layer, X, CONTEXT, expected=2)


@pytest.mark.parametrize(
    ("because", "model"),
    [
        ("extra keys", module(SELF["no weights"], add_bias_kv=True)),
        ("extra keys", module(SELF["no weights"], add_zero_attn=True)),
        ("separate", module(lambda m, x: m.attention(x, x[..., :5], x[..., :7])[0], kdim=5, vdim=7)),
        ("without a batch", module(lambda m, x: m.attention(x[0], x[0], x[0])[0])),
        ("no call", module(lambda m, x: functional.relu(x))),
        ("has a mask", Formula(lambda m, x: m.layer(x, src_mask=CAUSAL),
                               layer=nn.TransformerEncoderLayer(E, H, 24, batch_first=True)).eval()),
    ],
    ids=["bias", "zero", "separate", "unbatched", "none", "masked layer"],
)  # fmt: skip
def test_other_attention_modules_stay(because: str, model: nn.Module) -> None:
    check_refused("open_layers", model, X, because=because)


def test_dropout_in_training_mode_stays() -> None:
    model: Any = module(SELF["no weights"], dropout=0.0).train()
    check_applied("open_layers", model, X)
    model = Formula(
        lambda m, x: (m.attention(x, x, x)[0] * 0).sum(), attention=nn.MultiheadAttention(E, H, 0.5)
    ).train()
    check_refused("open_layers", model, X, because="random numbers")


def test_a_mask_that_the_graph_makes_in_place_is_read_as_it_is() -> None:
    def masked(m: Any, x: Tensor) -> Tensor:
        mask = torch.zeros(L, L)
        mask.masked_fill_(CAUSAL, float("-inf"))
        return m.attention(x, x, x, attn_mask=mask)[0]

    check_applied("open_layers", module(masked), X)
