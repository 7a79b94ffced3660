"""Attention, layouts and opaque layers on a GPU: as close to fp64 as eager is, through Inductor and CUDA graphs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from agnitra_lab.contracts import Workload
from agnitra_lab.patch.install import install
from agnitra_lab.patch.masks import Band
from agnitra_lab.patch.windows import windowed_attentions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


class Hand(nn.Module):
    """softmax(q k^T / sqrt(D), capped, masked) v by hand; `kind` says which mask."""

    def __init__(self, kind: str, num_steps: int, cap: float | None = None) -> None:
        super().__init__()
        self.kind, self.cap = kind, cap
        self.register_buffer("tril", torch.tril(torch.ones(num_steps, num_steps)))
        self.bias = nn.Parameter(torch.randn(1, 4, num_steps, num_steps))

    def forward(self, q, k, v, padding):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        if self.kind == "causal":
            scores = scores.masked_fill(self.tril == 0, float("-inf"))
        elif self.kind == "padding, lowest":
            scores = scores + (1 - padding[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
        elif self.kind == "padding, filled":
            scores = scores.masked_fill(
                padding[:, None, None] == 0, float("-inf" if q.dtype is torch.float16 else -1e9)
            )
        elif self.kind == "padding, -inf":
            scores = scores.masked_fill(padding[:, None, None] == 0, float("-inf"))
        elif self.kind == "bias":
            scores = scores + self.bias
        elif self.kind == "turned bias":
            scores = scores + self.bias.movedim(1, -1).contiguous().movedim(-1, 1)
        elif self.kind == "window":
            steps = torch.arange(q.size(-2), device=q.device)
            distance = steps[:, None] - steps[None, :]
            scores = torch.where((distance >= 0) & (distance < 33), scores, float("-inf"))
        return scores.softmax(-1) @ v


KINDS = ["none", "causal", "padding, lowest", "padding, filled", "padding, -inf", "bias", "turned bias", "window"]


def error_of(result: Any, oracle: Any) -> float:
    return float((result.double() - oracle).nan_to_num().abs().mean())


def check_against_fp64(drop_in: Any, model: nn.Module, args: Any) -> None:
    q, k, v, padding = args
    with torch.no_grad():
        ours, theirs = drop_in(*args), model(*args)
        oracle = copy.deepcopy(model).double()(q.double(), k.double(), v.double(), padding)
    assert ours.stride() == theirs.stride()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert error_of(ours, oracle) <= 1.25 * error_of(theirs, oracle) + 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_steps", "size"), [(256, 64), (197, 80)])
@pytest.mark.parametrize("is_blind", [False, True], ids=["all see", "one text is padding"])
def test_attention_by_hand_is_as_close_to_fp64_as_eager(kind, dtype, num_steps, size, is_blind):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 4, num_steps, size, device="cuda", generator=generator).to(dtype) for _ in range(3))
    padding = (torch.rand(2, num_steps, device="cuda", generator=generator) > 0.3).long()
    if is_blind:
        padding[1] = 0
    model = Hand(kind, num_steps).to("cuda", dtype).eval()
    args = (q, k, v, padding)
    patch = install(Workload("hand", model, args), ["attention_by_hand", "sdpa_backend"], name="candidate")
    made = [descriptor.action for descriptor in patch.log().descriptors]
    is_refused = dtype is torch.float16 and kind == "padding, lowest"
    assert ("attention_by_hand" in made) is not is_refused, patch.log().refusals
    print([(descriptor.replacement, descriptor.config) for descriptor in patch.log().descriptors])
    if is_refused:
        return  # what is left is Inductor's own, which adds the lowest number without rounding the sum to fp16
    check_against_fp64(patch.model, model, args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_steps", "size"), [(512, 64), (197, 128), (640, 256)])
def test_capped_attention_is_as_close_to_fp64_as_eager(kind, dtype, num_steps, size):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 4, num_steps, size, device="cuda", generator=generator).to(dtype) for _ in range(3))
    padding = (torch.rand(2, num_steps, device="cuda", generator=generator) > 0.3).long()
    model = Hand(kind, num_steps, cap=2.0).to("cuda", dtype).eval()
    args = (q, k, v, padding)
    patch = install(Workload("capped", model, args), ["capped_attention", "cuda_graph"], name="candidate")
    made = [descriptor.action for descriptor in patch.log().descriptors]
    if dtype is torch.float16 and kind == "padding, lowest":
        assert "capped_attention" not in made
        return
    assert "capped_attention" in made, patch.log().refusals
    print([descriptor.config for descriptor in patch.log().descriptors], patch.log().refusals)
    check_against_fp64(patch.model, model, args)


@pytest.mark.parametrize(("left", "right"), [(127, 0), (40, 0), (63, 20)])
@pytest.mark.parametrize("num_steps", [512, 1000])
@pytest.mark.parametrize("num_key_heads", [8, 2])
def test_every_window_kernel_computes_the_band(left, right, num_steps, num_key_heads):
    shapes = [(8, num_steps), (num_key_heads, num_steps), (num_key_heads, num_steps)]
    q, k, v = (torch.randn(2, *shape, 64, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    steps = torch.arange(num_steps, device="cuda")
    distance = steps[None, :] - steps[:, None]
    mask = (distance >= -left) & (distance <= right)
    wide = [x.double().repeat_interleave(8 // x.shape[1], 1) for x in (q, k, v)]
    oracle = functional.scaled_dot_product_attention(*wide, attn_mask=mask)
    attentions = windowed_attentions(Band(left, right), num_steps, num_steps)
    assert "flash_window" in attentions
    for attention in attentions.values():
        ours = attention(query=q, key=k, value=v, attn_mask=mask, is_causal=False, scale=None, enable_gqa=True)
        assert error_of(ours, oracle) < 2e-3


def test_a_window_survives_inductor_and_a_cuda_graph():
    class Windowed(nn.Module):
        def forward(self, q, k, v):
            steps = torch.arange(q.size(-2), device=q.device)
            distance = steps[:, None] - steps[None, :]
            mask = (distance >= 0) & (distance < 256)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    q = torch.randn(1, 32, 4096, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    model = Windowed().eval()
    patch = install(Workload("window", model, (q, k, v)), ["sdpa_backend", "cuda_graph"], name="candidate")
    print([(descriptor.replacement, descriptor.config) for descriptor in patch.log().descriptors])
    with torch.no_grad():
        torch.testing.assert_close(patch.model(q, k, v), model(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_bias_whose_keys_do_not_lie_side_by_side_is_given_to_a_fused_kernel_as_a_copy():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(512, 512, 8))

        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.table.permute(2, 0, 1)[None] * 1.0)

    torch.manual_seed(0)
    model = Biased().to("cuda", torch.bfloat16).eval()
    q, k, v = (torch.randn(4, 8, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    patch = install(Workload("biased", model, (q, k, v)), ["sdpa_backend"], name="candidate")
    print([(change.replacement, change.config) for change in patch.log().descriptors], patch.log().refusals)
    assert [change.replacement for change in patch.log().descriptors if "dense_mask" in change.replacement]
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(q.double(), k.double(), v.double())
        # Eager has its math for such a bias, in fp32; fused kernels round the probabilities, whoever calls them.
        dense = model.table.permute(2, 0, 1)[None].contiguous()
        fused = functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        assert error_of(patch.model(q, k, v), oracle) <= 1.25 * error_of(fused, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_change_layout_where_that_is_faster(dtype, monkeypatch):
    model = nn.Sequential(
        nn.Conv3d(16, 64, 3, padding=1), nn.SiLU(), nn.Conv3d(64, 64, 3, stride=2), nn.GroupNorm(8, 64),
        nn.ConvTranspose3d(64, 32, 2, stride=2),
    ).to("cuda", dtype).eval()  # fmt: skip
    x = torch.randn(1, 16, 8, 40, 36, device="cuda", dtype=dtype)
    # TF32's error depends on which of cuDNN's algorithms it chooses for a layout.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    patch = install(Workload("conv", model, (x,)), ["channels_last", "keep_eager"], name="candidate")
    print([descriptor.config for descriptor in patch.log().descriptors], patch.log().refusals)
    with torch.no_grad():
        ours, theirs = patch.model(x), model(x)
        oracle = copy.deepcopy(model).double()(x.double())
        assert ours.stride() == theirs.stride()
        assert error_of(ours, oracle) <= 1.25 * error_of(theirs, oracle) + 1e-7
        model[0].weight.mul_(-1)
        torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)


def test_a_depthwise_convolution_is_as_it_was():
    model = nn.Sequential(nn.Conv2d(64, 64, 7, padding=3, groups=64), nn.GELU()).to("cuda", torch.bfloat16).eval()
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    patch = install(Workload("depthwise", model, (x,)), ["channels_last", "keep_eager"], name="candidate")
    print([(descriptor.action, descriptor.config) for descriptor in patch.log().descriptors], patch.log().refusals)
    with torch.no_grad():
        torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_opened_encoder_layer_computes_what_its_one_call_does(activation):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, activation=activation, batch_first=True).to("cuda").eval()
    x = torch.randn(2, 77, 64, device="cuda")
    patch = install(Workload("encoder", model, (x,)), ["open_layers"], name="candidate")
    assert [change.action for change in patch.log().descriptors] == ["open_layers"]
    with torch.no_grad():
        ours, theirs, exact = patch.model(x), model(x), copy.deepcopy(model).double()(x.double())
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("extra", [[], ["cuda_graph"]], ids=["compiled", "CUDA graph"])
def test_a_recurrent_layer_is_one_cudnn_call_in_one_graph(cell, extra, recwarn):
    def num_compacted(call) -> int:
        recwarn.clear()
        torch.set_warn_always(True)
        try:
            call()
        finally:
            torch.set_warn_always(False)
        return sum("contiguous chunk" in str(warning.message) for warning in recwarn)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = cell(64, 128, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(256, 10)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = Tagger().to("cuda", torch.bfloat16).eval()
    x = torch.randn(4, 300, 64, device="cuda", dtype=torch.bfloat16)
    patch = install(Workload("tagger", model, (x,)), ["keep_eager", *extra], name="candidate")
    log = patch.log()
    print(log.refusals, log.compile_s)
    assert log.num_graphs == 1
    with torch.no_grad():
        torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)
        model.rnn.weight_hh_l0.mul_(-1)
        torch.testing.assert_close(patch.model(x), model(x), rtol=2e-2, atol=2e-2)
        # cuDNN copies weights that are no parts of one buffer at each call; in eager bf16 ones are none either.
        assert num_compacted(lambda: patch.model(x)) <= num_compacted(lambda: model(x))
