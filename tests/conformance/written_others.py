"""Further models in plain torch as people write them, of kinds that neither the suite nor the other tables have.

Shape legend: B batch, S sequence, H heads, D head size, E hidden, C channels (see written_language.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from written_language import B, Built, D, E, Formula, H, LlamaNorm, S, V, hidden, linear, rope, tokens
from written_vision import C, image


def _latent(m: Any, x: Tensor) -> Tensor:
    """Attend over keys and values of one low-rank latent, part of each head rotated (DeepSeek's MLA)."""
    b, s, _ = x.shape
    q = m.q_up(m.q_norm(m.q_down(x))).view(b, s, H, D + 4).transpose(1, 2)
    plain, turned = torch.split(q, [D, 4], dim=-1)
    latent, shared = torch.split(m.kv_down(x), [E // 2, 4], dim=-1)
    keys, values = torch.split(m.kv_up(m.kv_norm(latent)).view(b, s, H, 2 * D).transpose(1, 2), [D, D], dim=-1)
    shared = rope(shared.view(b, s, 1, 4).transpose(1, 2)).expand(-1, H, -1, -1)
    q, k = torch.cat([plain, rope(turned)], dim=-1), torch.cat([keys, shared], dim=-1)
    scores = torch.matmul(q, k.transpose(2, 3)) * (D + 4) ** -0.5 + torch.full((s, s), float("-inf")).triu(1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return m.out((weights @ values).transpose(1, 2).reshape(b, s, -1))


def _detr(m: Any, x: Tensor, places: Tensor) -> Tensor:
    """Encode a picture with the sequence first: places join queries and keys, and not the values."""
    q = k = x + places
    x = m.first(x + m.dropout(m.attention(q, k, value=x)[0]))
    return m.second(x + m.down(m.dropout(F.relu(m.up(x)))))


def _lora(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.base.weight + (m.right @ m.left) * 0.5) + m.other(x)


def _standardised(m: Any, x: Tensor) -> Tensor:
    """Standardise the weight of a convolution at each call (BiT)."""
    w = m.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / torch.sqrt(w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5)
    return F.relu(m.norm(F.conv2d(x, w, m.conv.bias, padding=1)))


def _shuffle(m: Any, x: Tensor) -> Tensor:
    """Work on half of the channels, then shuffle them (ShuffleNet V2)."""
    left, right = x.chunk(2, dim=1)
    right = F.relu(m.bn1(m.conv1(right)))
    right = F.relu(m.bn3(m.conv3(m.bn2(m.conv2(right)))))
    out = torch.cat((left, right), dim=1)
    n, c, height, width = out.shape
    return out.view(n, 2, c // 2, height, width).transpose(1, 2).contiguous().view(n, c, height, width)


def _channel_mix(m: Any, x: Tensor) -> Tensor:
    """Mix each token with the one before it (RWKV)."""
    before = F.pad(x, (0, 0, 1, -1))
    k = m.key(x * m.mix_k + before * (1 - m.mix_k))
    r = torch.sigmoid(m.receptance(x * m.mix_r + before * (1 - m.mix_r)))
    return r * m.value(torch.square(torch.relu(k)))


def _inception(m: Any, x: Tensor) -> Tensor:
    third = m.third(F.max_pool2d(x, 3, 1, 1))
    return torch.cat([F.relu(m.first(x)), F.relu(m.wide(F.relu(m.second(x)))), F.relu(third)], dim=1)


def _relative(m: Any, x: Tensor) -> Tensor:
    """Attend with biases of content and of place, shifted by a padded view (Transformer-XL)."""
    b, s, _ = x.shape
    q, k, v = (layer(x).view(b, s, H, D).transpose(1, 2) for layer in (m.q, m.k, m.v))
    r = m.r(m.places).view(1, s, H, D).transpose(1, 2)
    content, place = (q + m.u[:, None]) @ k.mT, (q + m.w[:, None]) @ r.mT
    place = F.pad(place, (1, 0)).view(b, H, s + 1, s)[:, :, 1:].view(b, H, s, s)
    scores = ((content + place) / D**0.5).masked_fill(torch.ones(s, s).triu(1).bool(), -1e9)
    return m.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1))


def _one_key_head(m: Any, x: Tensor) -> Tensor:
    """Let all query heads share one head of keys and values, without repeating it."""
    b, s, _ = x.shape
    q = m.q(x).view(b, s, H, D).transpose(1, 2)
    k, v = m.kv(x).split(D, dim=-1)
    weights = (q @ k.unsqueeze(1).transpose(-1, -2) / D**0.5).softmax(-1)
    return m.out((weights @ v[:, None]).transpose(1, 2).reshape(b, s, -1))


def _perceiver(m: Any, x: Tensor) -> Tensor:
    keys = F.layer_norm(x, (E,))
    return m.attention(m.latents.expand(x.shape[0], -1, -1), keys, keys, need_weights=False)[0]


def _modulated(m: Any, x: Tensor, condition: Tensor) -> Tensor:
    """Scale and shift a norm without weights by a condition (DiT)."""
    shift, scale, gate = m.modulation(F.silu(condition)).chunk(3, dim=1)
    h = m.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return x + gate.unsqueeze(1) * m.down(F.gelu(m.up(h), approximate="tanh"))


def _embedded_loss(m: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(m.head(m.embed(ids)), dim=-1).view(-1, V), labels.view(-1))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


OTHERS: dict[str, Callable[[], Built]] = {
    "latent attention": lambda: (
        Formula(_latent, q_down=linear(16, E), q_norm=LlamaNorm(16), q_up=linear(H * (D + 4), 16),
                kv_down=linear(E // 2 + 4, E), kv_norm=LlamaNorm(E // 2), kv_up=linear(H * 2 * D, E // 2),
                out=linear(E, H * D)), (hidden(),)
    ),
    "detr encoder": lambda: (
        Formula(_detr, attention=nn.MultiheadAttention(E, 4), first=nn.LayerNorm(E), second=nn.LayerNorm(E),
                up=linear(64, E, True), down=linear(E, 64, True), dropout=nn.Dropout(0.1)),
        (hidden(S, B, E), hidden(S, B, E, seed=9)),
    ),
    "merged lora": lambda: (
        Formula(_lora, base=linear(E, E), other=linear(E, E), left=nn.Parameter(hidden(4, E)),
                right=nn.Parameter(hidden(E, 4))), (hidden(),)
    ),
    "standardised convolution": lambda: (
        Formula(_standardised, conv=nn.Conv2d(C, C, 3), norm=nn.GroupNorm(4, C)), (image(),)
    ),
    "shufflenet block": lambda: (
        Formula(_shuffle, conv1=nn.Conv2d(8, 8, 1, bias=False), bn1=batch_norm(8),
                conv2=nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), bn2=batch_norm(8),
                conv3=nn.Conv2d(8, 8, 1, bias=False), bn3=batch_norm(8)), (image(),)
    ),
    "rwkv channel mix": lambda: (
        Formula(_channel_mix, key=linear(64, E), value=linear(E, 64), receptance=linear(E, E),
                mix_k=nn.Parameter(torch.rand(E)), mix_r=nn.Parameter(torch.rand(E))), (hidden(),)
    ),
    "inception block": lambda: (
        Formula(_inception, first=nn.Conv2d(C, 8, 1), second=nn.Conv2d(C, 8, 1), wide=nn.Conv2d(8, 8, 3, padding=1),
                third=nn.Conv2d(C, 8, 1)), (image(),)
    ),
    "transformer-xl attention": lambda: (
        Formula(_relative, q=linear(H * D, E), k=linear(H * D, E), v=linear(H * D, E), r=linear(H * D, E),
                out=linear(E, H * D), u=nn.Parameter(hidden(H, D)), w=nn.Parameter(hidden(H, D, seed=2)),
                places=nn.Parameter(hidden(S, E))), (hidden(),)
    ),
    "one key head": lambda: (
        Formula(_one_key_head, q=linear(H * D, E), kv=linear(2 * D, E), out=linear(E, H * D)), (hidden(),)
    ),
    "perceiver": lambda: (
        Formula(_perceiver, latents=nn.Parameter(hidden(1, 6, E)),
                attention=nn.MultiheadAttention(E, 4, batch_first=True)), (hidden(),)
    ),
    "dit block": lambda: (
        Formula(_modulated, modulation=linear(3 * E, E, True), up=linear(64, E, True), down=linear(E, 64, True),
                norm=nn.LayerNorm(E, elementwise_affine=False, eps=1e-6)), (hidden(), hidden(B, E))
    ),
    "loss of an embedding": lambda: (
        Formula(_embedded_loss, embed=nn.Embedding(V, E), head=linear(V, E)), (tokens(), tokens(seed=4))
    ),
}  # fmt: skip
"""Name -> builder of a module and the inputs of one call."""
