"""Small models with known structure, captured once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agnitra_lab.graph.capture import capture


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Decoder(nn.Module):
    """One block: attention (over a static cache when asked), gated MLP, language model head."""

    def __init__(self, width=32, num_heads=4, vocabulary=160, cache=None):
        super().__init__()
        self.num_heads, self.has_cache = num_heads, cache is not None
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = Norm(width)
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = (
            nn.Linear(width, width, bias=False) for _ in range(7)
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if cache:
            shape = (1, num_heads, cache, width // num_heads)
            self.register_buffer("keys", torch.zeros(shape))
            self.register_buffer("values", torch.zeros(shape))

    def heads(self, x):
        return x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def forward(self, ids, position=None):
        x = self.embedding(ids)
        h = self.norm(x)
        q, k, v = self.heads(self.query(h)), self.heads(self.key(h)), self.heads(self.value(h))
        if self.has_cache:
            k, v = self.keys.index_copy_(2, position, k), self.values.index_copy_(2, position, v)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=not self.has_cache)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.lm_head(x)


@pytest.fixture(scope="session")
def decoder():
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="session")
def prefill(decoder):
    return capture(decoder, (torch.arange(6)[None],))


@pytest.fixture(scope="session")
def cached_decoder():
    torch.manual_seed(0)
    return Decoder(cache=16).eval()


@pytest.fixture(scope="session")
def decode(cached_decoder):
    return capture(cached_decoder, (torch.tensor([[3]]), torch.tensor([5])))


@pytest.fixture(scope="session")
def conv_net():
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(*layers).eval()
