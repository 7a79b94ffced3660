"""Language models and their layers in plain torch, as people write them: what the optimiser was not tuned on.

Each builder returns a module in eval mode and the inputs of one call, tiny, from fixed seeds. Spellings follow the
published code of the model in the builder's name; none of them is shared with `agnitra_lab.workloads`.

Shape legend: B batch, S sequence, H heads, G key/value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, S, H, G, D, E, V = 2, 12, 4, 2, 8, 32, 40
Built = tuple[nn.Module, tuple[Any, ...]]


def hidden(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (B, S, E), generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, V, shape or (B, S), generator=torch.Generator().manual_seed(seed))


def linear(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias)


def rope(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate halves, with the angles made in the graph."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


# --- Gemma -----------------------------------------------------------------------------------------------------------


class GemmaNorm(nn.Module):
    def __init__(self, width: int = E) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class Gemma(nn.Module):
    """Norms with 1 + weight, grouped heads by repeat_interleave, soft caps on scores and logits, GeGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, E)
        self.before, self.after, self.last = GemmaNorm(), GemmaNorm(), GemmaNorm()
        self.q, self.k, self.v, self.o = linear(H * D, E), linear(G * D, E), linear(G * D, E), linear(E, H * D)
        self.gate, self.up, self.down = linear(2 * E, E), linear(2 * E, E), linear(E, 2 * E)

    def attend(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = rope(self.q(x).view(b, s, H, D).transpose(1, 2))
        k = rope(self.k(x).view(b, s, G, D).transpose(1, 2)).repeat_interleave(H // G, dim=1)
        v = self.v(x).view(b, s, G, D).transpose(1, 2).repeat_interleave(H // G, dim=1)
        scores = torch.tanh(q @ k.transpose(-1, -2) * D**-0.5 / 50.0) * 50.0
        mask = torch.full((s, s), -2.3819763e38).triu(1)
        weights = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        return self.o((weights @ v).transpose(1, 2).reshape(b, s, -1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * E**0.5
        x = x + self.attend(self.before(x))
        h = self.after(x)
        x = x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))
        logits = self.last(x) @ self.embed.weight.T
        return (torch.tanh(logits / 30.0) * 30.0)[:, -1]


# --- GPT-NeoX and Phi ------------------------------------------------------------------------------------------------


class ParallelBlock(nn.Module):
    """GPT-NeoX: attention and MLP side by side, packed q k v of each head, a quarter of each head rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(E), nn.LayerNorm(E)
        self.qkv, self.dense = linear(3 * H * D, E, True), linear(E, H * D, True)
        self.up, self.down = linear(4 * E, E, True), linear(E, 4 * E, True)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64))

    def attend(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, H, 3 * D).permute(0, 2, 1, 3).chunk(3, dim=-1)
        part = D // 4
        q = torch.cat((rope(q[..., : 2 * part]), q[..., 2 * part :]), dim=-1)
        k = torch.cat((rope(k[..., : 2 * part]), k[..., 2 * part :]), dim=-1)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
        lowest = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.bias[:, :, :s, :s], scores, lowest)
        context = torch.matmul(nn.functional.softmax(scores, dim=-1).to(v.dtype), v)
        return self.dense(context.permute(0, 2, 1, 3).contiguous().view(b, s, -1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.first(x)) + self.down(F.gelu(self.up(self.second(x))))


# --- Llama by hand ---------------------------------------------------------------------------------------------------


class LlamaNorm(nn.Module):
    def __init__(self, width: int = E, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, times, s, d).reshape(b, g * times, s, d)


class LlamaLayer(nn.Module):
    """Hugging Face's eager attention: repeat_kv, an additive mask made before, softmax in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = LlamaNorm(), LlamaNorm()
        self.q, self.k, self.v, self.o = linear(H * D, E), linear(G * D, E), linear(G * D, E), linear(E, H * D)
        self.gate, self.up, self.down = linear(2 * E, E), linear(2 * E, E), linear(E, 2 * E)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.before(x)
        q = self.q(h).view(b, s, -1, D).transpose(1, 2)
        k = repeat_kv(self.k(h).view(b, s, -1, D).transpose(1, 2), H // G)
        v = repeat_kv(self.v(h).view(b, s, -1, D).transpose(1, 2), H // G)
        weights = torch.matmul(rope(q), rope(k).transpose(2, 3)) * D**-0.5
        weights = weights + mask[:, :, :, : k.shape[-2]]
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = nn.functional.dropout(weights, p=0.1, training=self.training)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(b, s, -1).contiguous()
        x = x + self.o(out)
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LlamaLoss(nn.Module):
    """The loss of a language model, shifted as Hugging Face does it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = LlamaNorm(), linear(V, E)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        shift_logits = logits[..., :-1, :].contiguous().float()
        shift_labels = labels[..., 1:].contiguous()
        return F.cross_entropy(shift_logits.view(-1, V), shift_labels.view(-1))


# --- attention with biases -------------------------------------------------------------------------------------------


class Alibi(nn.Module):
    """BLOOM: slopes times positions are the input of a baddbmm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = linear(3 * H * D, E, True), linear(E, H * D, True)
        self.register_buffer("slopes", 2.0 ** -(8.0 / H * torch.arange(1, H + 1)))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, H, 3, D).unbind(dim=3)
        q = q.transpose(1, 2).reshape(b * H, s, D)
        k = k.permute(0, 2, 3, 1).reshape(b * H, D, s)
        v = v.transpose(1, 2).reshape(b * H, s, D)
        alibi = (self.slopes[:, None, None] * torch.arange(s)[None, None, :]).repeat(b, 1, 1).to(x.dtype)
        scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=1 / math.sqrt(D)).view(b, H, s, s)
        mask = torch.ones(s, s, dtype=torch.bool).triu(1)
        scores = torch.masked_fill(scores, mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1).view(b * H, s, s)
        context = torch.bmm(weights, v).view(b, H, s, D).permute(0, 2, 1, 3).reshape(b, s, -1)
        return self.dense(context)


class AlibiDistances(nn.Module):
    """ALiBi as its paper's distances, added to scores that a causal mask of -inf follows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(H * D, E), linear(H * D, E), linear(H * D, E)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).reshape(b, s, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        distance = torch.arange(s)[None, :] - torch.arange(s)[:, None]
        slopes = torch.tensor([2.0 ** -(2 * i + 2) for i in range(H)])
        bias = slopes[:, None, None] * distance.clamp(max=0)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / D**0.5 + bias.to(x.dtype)
        scores = scores.masked_fill(distance > 0, float("-inf"))
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).reshape(b, s, -1)


class T5Attention(nn.Module):
    """T5: no scale, a learned bias of buckets of distances, RMSNorm without mean before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bias = LlamaNorm(eps=1e-6), nn.Embedding(8, H)
        self.q, self.k, self.v, self.o = linear(H * D, E), linear(H * D, E), linear(H * D, E), linear(E, H * D)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm(x)
        q, k, v = (f(h).view(b, -1, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        distance = (torch.arange(s)[None, :] - torch.arange(s)[:, None]).clamp(-4, 3) + 4
        bias = self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        bias = bias + (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        scores += bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, -1, H * D)
        return x + self.o(out)


class BertLayer(nn.Module):
    """BERT: transpose_for_scores, the extended mask of Hugging Face, norms after the residual, erf GELU by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (linear(H * D, E, True) for _ in range(3))
        self.dense, self.norm = linear(E, H * D, True), nn.LayerNorm(E, eps=1e-12)
        self.up, self.down, self.last = linear(4 * E, E, True), linear(E, 4 * E, True), nn.LayerNorm(E, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], H, D).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D) + mask
        weights = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.size()[:-2], H * D)
        x = self.norm(self.dropout(self.dense(context)) + x)
        h = self.up(x)
        h = h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))
        return self.last(self.dropout(self.down(h)) + x)


class CrossAttention(nn.Module):
    """Perceiver and diffusers: queries of another input, heads folded into the batch, baddbmm of empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linear(H * D, E), linear(H * D, E), linear(H * D, E), linear(E, H * D, True)

    def fold(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        return x.reshape(b, s, H, D).permute(0, 2, 1, 3).reshape(b * H, s, D)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.fold(self.q(x)), self.fold(self.k(context)), self.fold(self.v(context))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
        out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
        return self.o(out.reshape(b, H, s, D).permute(0, 2, 1, 3).reshape(b, s, H * D))


class LinearAttention(nn.Module):
    """No softmax over scores, which must stay as it is: elu + 1 features, sums over keys first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(H * D, E), linear(H * D, E), linear(H * D, E)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, H, D) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bshd,bshe->bhde", k, v)
        norm = 1.0 / (torch.einsum("bshd,bhd->bsh", q, k.sum(1)) + 1e-6)
        return torch.einsum("bshd,bhde,bsh->bshe", q, state, norm).reshape(b, s, -1)


class CatCacheStep(nn.Module):
    """One token: the cache grows by torch.cat, grouped heads by repeat_kv, SDPA without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = LlamaNorm(), linear(H * D, E), linear(G * D, E), linear(G * D, E)
        self.o, self.up, self.gate, self.down = linear(E, H * D), linear(2 * E, E), linear(2 * E, E), linear(E, 2 * E)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        h = self.norm(x)
        q = self.q(h).view(b, s, H, D).transpose(1, 2)
        keys = torch.cat([keys, self.k(h).view(b, s, G, D).transpose(1, 2)], dim=2)
        values = torch.cat([values, self.v(h).view(b, s, G, D).transpose(1, 2)], dim=2)
        out = F.scaled_dot_product_attention(q, repeat_kv(keys, H // G), repeat_kv(values, H // G))
        x = x + self.o(out.transpose(1, 2).reshape(b, s, H * D))
        return x + self.down(F.silu(self.gate(x)) * self.up(x)), keys, values


# --- layers ----------------------------------------------------------------------------------------------------------


class Formula(nn.Module):
    """A function over a few layers."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def _annotated(m: Any, x: Tensor) -> Tensor:
    """Normalise as the Annotated Transformer: eps outside the root, the unbiased deviation. It is no LayerNorm."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return m.out(m.weight * (x - mean) / (std + 1e-6) + m.bias)


def _tf_style(m: Any, x: Tensor) -> Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    x = (x - u) / torch.sqrt(s + 1e-12)
    return m.out(m.weight * x + m.bias)


def _by_var(m: Any, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return m.out((x - mean) * (var + 1e-5).rsqrt() * m.weight + m.bias)


def _by_var_mean(m: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return m.out((x - mean) / torch.sqrt(var + 1e-5) * m.weight + m.bias)


def _norm_layers() -> dict[str, Any]:
    return {"weight": nn.Parameter(torch.rand(E) + 0.5), "bias": nn.Parameter(hidden(E)), "out": linear(E, E)}


def _geglu(m: Any, x: Tensor) -> Tensor:
    x, gate = m.proj(x).chunk(2, dim=-1)
    return m.down(x * F.gelu(gate))


def _reglu(m: Any, x: Tensor) -> Tensor:
    a, b = torch.split(m.proj(x), 2 * E, dim=-1)
    return m.down(a.relu() * b)


def _packed_swiglu(m: Any, x: Tensor) -> Tensor:
    x1, x2 = m.proj(x).chunk(2, dim=-1)
    return m.down(F.silu(x1) * x2)


def _experts(m: Any, x: Tensor) -> Tensor:
    """Sum all experts, each weighted, as a loop over a ModuleList."""
    weights = F.softmax(m.router(x), dim=-1)
    out = torch.zeros_like(x)
    for index, expert in enumerate(m.experts):
        out = out + weights[..., index : index + 1] * expert(x)
    return out


def _pooling(m: Any, x: Tensor) -> Tensor:
    """Pool a sequence by attention: softmax over the middle dimension."""
    weights = torch.softmax(m.score(torch.tanh(m.proj(x))), dim=1)
    return (weights * x).sum(dim=1)


def _gru_cell(m: Any, x: Tensor) -> Tensor:
    state, outs = torch.zeros(x.shape[0], E, dtype=x.dtype), []
    for step in range(4):
        state = m.cell(x[:, step], state)
        outs.append(state)
    return torch.stack(outs, dim=1)


def _clip(m: Any, image: Tensor, text: Tensor) -> Tensor:
    """Compare two towers by their directions."""
    image, text = m.image(image.mean(1)), m.text(text[:, -1])
    image = image / image.norm(dim=-1, keepdim=True)
    text = text / text.norm(p=2, dim=-1, keepdim=True)
    return m.scale.exp() * image @ text.t()


def expert() -> nn.Sequential:
    return nn.Sequential(linear(2 * E, E), nn.SiLU(), linear(E, 2 * E))


KEEP = torch.ones(B, S, dtype=torch.long).index_fill(1, torch.tensor([S - 2, S - 1]), 0)
CAUSAL = torch.full((S, S), torch.finfo(torch.float32).min).triu(1)[None, None].expand(B, 1, S, S)

LANGUAGE: dict[str, Callable[[], Built]] = {
    "linear attention": lambda: (LinearAttention(), (hidden(),)),
    "gemma": lambda: (Gemma(), (tokens(),)),
    "neox": lambda: (ParallelBlock(), (hidden(),)),
    "llama layer": lambda: (LlamaLayer(), (hidden(), CAUSAL)),
    "llama loss": lambda: (LlamaLoss(), (hidden(), tokens())),
    "alibi by baddbmm": lambda: (Alibi(), (hidden(),)),
    "alibi by distances": lambda: (AlibiDistances(), (hidden(),)),
    "t5 attention": lambda: (T5Attention(), (hidden(), KEEP)),
    "bert layer": lambda: (BertLayer(), (hidden(), KEEP)),
    "cross attention": lambda: (CrossAttention(), (hidden(), hidden(B, 7, E, seed=3))),
    "cache by cat": lambda: (CatCacheStep(), (hidden(B, 1, E), hidden(B, G, 9, D), hidden(B, G, 9, D, seed=4))),
    "encoder layer of torch": lambda: (
        nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True, norm_first=True, activation="gelu"), (hidden(),)
    ),
    "multihead attention of torch": lambda: (
        Formula(lambda m, x: m.attention(x, x, x, need_weights=True)[0],
                attention=nn.MultiheadAttention(E, H, batch_first=True)), (hidden(),)
    ),
    "annotated norm": lambda: (Formula(_annotated, **_norm_layers()), (hidden(),)),
    "norm of TensorFlow": lambda: (Formula(_tf_style, **_norm_layers()), (hidden(),)),
    "norm by var": lambda: (Formula(_by_var, **_norm_layers()), (hidden(),)),
    "norm by var_mean": lambda: (Formula(_by_var_mean, **_norm_layers()), (hidden(),)),
    "geglu by chunk": lambda: (Formula(_geglu, proj=linear(4 * E, E), down=linear(E, 2 * E)), (hidden(),)),
    "reglu by split": lambda: (Formula(_reglu, proj=linear(4 * E, E), down=linear(E, 2 * E)), (hidden(),)),
    "packed swiglu": lambda: (Formula(_packed_swiglu, proj=linear(4 * E, E), down=linear(E, 2 * E)), (hidden(),)),
    "experts in a loop": lambda: (
        Formula(_experts, router=linear(3, E), experts=nn.ModuleList(expert() for _ in range(3))), (hidden(),)
    ),
    "pooling by attention": lambda: (Formula(_pooling, proj=linear(E, E), score=linear(1, E)), (hidden(),)),
    "gru cell in a loop": lambda: (Formula(_gru_cell, cell=nn.GRUCell(E, E)), (hidden(),)),
    "clip": lambda: (
        Formula(_clip, image=linear(E, E), text=linear(E, E), scale=nn.Parameter(torch.tensor(2.6))),
        (hidden(), hidden(seed=5)),
    ),
}  # fmt: skip
"""Name -> builder of a module and the inputs of one call."""
