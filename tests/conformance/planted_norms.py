"""Planted bugs of norms, softmax and cross-entropy (see planted_bugs.py for what a family is)."""

from __future__ import annotations

import torch
from planted_bugs import Family, Op, randn, truncated, weight
from torch import Tensor, nn
from torch.nn import functional as F

# Norms --------------------------------------------------------------------------------------------------------------


def _rms(m: nn.Module, x: Tensor, eps: float = 1e-5, width: int | None = None) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    mean = wide.square().sum(-1, keepdim=True) / (width or x.shape[-1])
    return (wide * torch.rsqrt(mean + eps)).to(x.dtype) * m.weight


def _uneven_rows(dtype: torch.dtype, size: int, generator: torch.Generator) -> tuple[Tensor]:
    """Draw rows of sizes 1, 0.1 and 0.01, so that an epsilon of 1e-5 is seen."""
    scale = 10.0 ** -(torch.arange(size) % 3)
    return ((torch.randn(size, 48, generator=generator) * scale[:, None]).to(dtype),)


def _wide_rms(m: nn.Module, x: Tensor) -> Tensor:
    wide = x.double()
    return (wide / (wide.flip(-1).square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight.double()).to(x.dtype)


def _scaled(m: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return ((x.float() * scale.float()) * m.weight.float()).to(x.dtype)


RMS_NORM = Family(
    lambda dtype: Op(_rms, dtype, weight=weight(48)),
    _uneven_rows,
    _wide_rms,
    {
        "adds epsilon outside the root": lambda m, x: _scaled(
            m, x, 1 / (x.float().square().mean(-1, True).sqrt() + 1e-5)
        ),
        "forgets epsilon": lambda m, x: _rms(m, x, eps=0.0),
        "divides by the padded block width": lambda m, x: _rms(m, x, width=64),
        "subtracts the mean": lambda m, x: _rms(m, x - x.mean(-1, keepdim=True)),
        "adds one to the weight": lambda m, x: _rms(m, x) + _rms(m, x) / m.weight,
        "shifts the weight by one column": lambda m, x: _rms(m, x) / m.weight * m.weight.roll(1),
        "normalises over the wrong axis": lambda m, x: _scaled(
            m, x, torch.rsqrt(x.float().square().mean(0, True) + 1e-5)
        ),
        "skips the last column in the sum": lambda m, x: _scaled(
            m, x, torch.rsqrt(x.float()[:, :-1].square().sum(-1, True) / 48 + 1e-5)
        ),
        "uses the scale of the row above": lambda m, x: _scaled(
            m, x, torch.rsqrt(x.float().square().mean(-1, True) + 1e-5).roll(1, 0)
        ),
        "sums squares in bf16": lambda m, x: _scaled(
            m, x, torch.rsqrt(x.bfloat16().square().cumsum(-1)[:, -1:] / 48 + 1e-5)
        ),
        "stores by truncation": lambda m, x: truncated(_wide_rms(m, x.double())),
    },
    fp32_only=frozenset({"sums squares in bf16"}),
    bf16_only=frozenset({"stores by truncation"}),
)


def _layer(m: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, (48,), m.weight, m.bias, 1e-5)


def _layer_by(m: nn.Module, x: Tensor, var: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (var.double() + eps).sqrt()
    return (normed * m.weight.double() + m.bias.double()).to(x.dtype)


def _var(x: Tensor) -> Tensor:
    return x.double().var(-1, keepdim=True, correction=0)


LAYER_NORM = Family(
    lambda dtype: Op(_layer, dtype, weight=weight(48), bias=weight(48, seed=2)),
    lambda dtype, size, generator: (randn(generator, dtype, size, 48) + 3,),
    lambda m, x: _layer_by(m, x, _var(x)),
    {
        "takes the unbiased variance": lambda m, x: _layer_by(m, x, x.double().var(-1, keepdim=True)),
        "takes the variance of the row below": lambda m, x: _layer_by(m, x, _var(x).roll(-1, 0)),
        "takes the standard deviation for the variance": lambda m, x: _layer_by(m, x, _var(x).square()),
        "takes the squares without the mean": lambda m, x: _layer_by(m, x, x.double().square().mean(-1, True)),
        "cancels in E[x^2]-E[x]^2 in half precision": lambda m, x: _layer_by(
            m, x, (x.half().square().mean(-1, True) - x.half().mean(-1, True).square()).clamp(min=0)
        ),
        "drops the bias": lambda m, x: F.layer_norm(x, (48,), m.weight, None, 1e-5),
        "swaps weight and bias": lambda m, x: F.layer_norm(x, (48,), m.bias, m.weight, 1e-5),
        "adds the bias before the weight": lambda m, x: (F.layer_norm(x, (48,)) + m.bias) * m.weight,
        "keeps the mean": lambda m, x: (x.double() / (_var(x) + 1e-5).sqrt() * m.weight + m.bias).to(x.dtype),
        "broadcasts the bias along the rows": lambda m, x: (
            F.layer_norm(x, (48,), m.weight) + m.bias.repeat(2)[: x.shape[0], None]
        ),
    },
    fp32_only=frozenset({"cancels in E[x^2]-E[x]^2 in half precision"}),
)


def _residual(m: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return _rms(m, summed), summed


RESIDUAL_NORM = Family(
    lambda dtype: Op(_residual, dtype, weight=weight(48)),
    lambda dtype, size, generator: (randn(generator, dtype, size, 48), randn(generator, dtype, size, 48)),
    lambda m, x, r: (_wide_rms(m, r + x), r + x),
    {
        "applies the residual twice": lambda m, x, r: _residual(m, x + r, r),
        "drops the residual": lambda m, x, r: (_rms(m, x), x + r),
        "ignores the residual": lambda m, x, r: _residual(m, x, x),
        "returns the residual unsummed": lambda m, x, r: (_rms(m, x + r), r.clone()),
        "returns the norm as the new residual": lambda m, x, r: (_rms(m, x + r), _rms(m, x + r)),
        "sums into its input": lambda m, x, r: (_rms(m, x.add_(r)), x.clone()),
        "returns a view of its input": lambda m, x, r: (_rms(m, x + r), x.add_(r)),
        "swaps its two outputs": lambda m, x, r: _residual(m, x, r)[::-1],
        "returns one tensor for two": lambda m, x, r: _rms(m, x + r),
        "normalises before it adds": lambda m, x, r: (_rms(m, x) + r, x + r),
    },
    has_output_bugs=False,
)


# Softmax and losses -------------------------------------------------------------------------------------------------


def _softmax(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(mask, float("-inf")), -1).nan_to_num(0.0)


def _masked_rows(dtype: torch.dtype, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw logits whose plain exponentials overflow, with one row that is masked as a whole."""
    mask = torch.rand(size, 40, generator=generator) < 0.2
    mask[3] = True
    return (torch.randn(size, 40, generator=generator) * 2 + 95).to(dtype), mask


def _exp(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float().masked_fill(mask, float("-inf"))
    top = wide.amax(-1, keepdim=True).clamp(min=-1e30)
    return torch.exp(wide - top), top


def _over(power: Tensor, total: Tensor, x: Tensor) -> Tensor:
    return (power / total).nan_to_num(0.0).to(x.dtype)


def _softmax_control(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    power, _ = _exp(x, mask)
    return _over(power, power.flip(-1).cumsum(-1)[:, -1:], x)


def _online_without_rescale(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    first, _ = _exp(x[:, :16], mask[:, :16])
    second, _ = _exp(x[:, 16:], mask[:, 16:])
    power, _ = _exp(x, mask)
    return _over(power, first.sum(-1, True) + second.sum(-1, True), x)


SOFTMAX = Family(
    lambda dtype: Op(_softmax, dtype),
    _masked_rows,
    _softmax_control,
    {
        "gives NaN for a fully masked row": lambda m, x, mask: torch.softmax(x.masked_fill(mask, float("-inf")), -1),
        "gives a uniform fully masked row": lambda m, x, mask: torch.softmax(x.masked_fill(mask, -1e9), -1),
        "does not subtract the maximum": lambda m, x, mask: _over(
            x.float().masked_fill(mask, float("-inf")).exp(),
            x.float().masked_fill(mask, float("-inf")).exp().sum(-1, True),
            x,
        ),
        "counts the padding in the sum": lambda m, x, mask: _over(
            _exp(x, mask)[0], _exp(x, mask)[0].sum(-1, True) + 0.05, x
        ),
        "does not rescale the running sum": _online_without_rescale,
        "normalises over the rows": lambda m, x, mask: torch.softmax(x.masked_fill(mask, float("-inf")), 0).nan_to_num(
            0.0
        ),
        "ignores the mask": lambda m, x, mask: torch.softmax(x, -1),
        "inverts the mask": lambda m, x, mask: _softmax(m, x, ~mask),
        "shifts the mask by one": lambda m, x, mask: _softmax(m, x, mask.roll(1, -1)),
        "masks after it normalises": lambda m, x, mask: torch.softmax(x, -1).masked_fill(mask, 0.0),
        "sums in bf16": lambda m, x, mask: _over(
            _exp(x, mask)[0], _exp(x, mask)[0].bfloat16().cumsum(-1)[:, -1:].float(), x
        ),
        "sums all but the last column": lambda m, x, mask: _over(
            _exp(x, mask)[0], _exp(x, mask)[0][:, :-1].sum(-1, True), x
        ),
    },
)


def _losses(m: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=-100, reduction="none")


def _tokens(dtype: torch.dtype, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.randint(50, (size,), generator=generator)
    target[::5] = -100
    return (torch.randn(size, 50, generator=generator) * 2 + 95).to(dtype), target


def _loss(logits: Tensor, target: Tensor, log_sum: Tensor | None = None, ignored: float = 0.0) -> Tensor:
    wide = logits.double()
    picked = wide.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    loss = (torch.logsumexp(wide, -1) if log_sum is None else log_sum.double()) - picked
    return torch.where(target == -100, ignored, loss).to(logits.dtype)


CROSS_ENTROPY = Family(
    lambda dtype: Op(_losses, dtype),
    _tokens,
    lambda m, x, t: _loss(x, t),
    {
        "charges ignored tokens": lambda m, x, t: F.cross_entropy(x, t.clamp(min=0), reduction="none"),
        "reads the target one to the right": lambda m, x, t: _loss(x, torch.where(t < 0, t, (t + 1) % 50)),
        "reads the target of the next row": lambda m, x, t: _loss(x, torch.where(t < 0, t, t.clamp(min=0).roll(1))),
        "overflows without the maximum": lambda m, x, t: _loss(x, t, x.float().exp().sum(-1).log()),
        "takes the logarithm to base two": lambda m, x, t: _loss(x, t, x.double().exp().sum(-1).log2()),
        "leaves the last class out of the sum": lambda m, x, t: _loss(x, t, torch.logsumexp(x[:, :-1].double(), -1)),
        "adds the maximum twice": lambda m, x, t: _loss(x, t, torch.logsumexp(x.double(), -1) + x.double().amax(-1)),
        "uses the log-sum of the row above": lambda m, x, t: _loss(x, t, torch.logsumexp(x.double(), -1).roll(1)),
        "gives the mean for each token": lambda m, x, t: F.cross_entropy(x, t).expand(x.shape[0]).clone(),
        "smooths the labels": lambda m, x, t: F.cross_entropy(x, t, reduction="none", label_smoothing=0.01),
        "forgets the minus sign": lambda m, x, t: -_losses(m, x, t),
        "gives NaN for ignored tokens": lambda m, x, t: _loss(x, t, ignored=float("nan")),
        "sums exponentials in bf16": lambda m, x, t: _loss(
            x, t, (x.float() - 95).exp().bfloat16().cumsum(-1)[:, -1].float().log() + 95
        ),
        "writes its gradient over the logits": lambda m, x, t: (_losses(m, x, t), x.copy_(torch.softmax(x, -1)))[0],
    },
    fp32_only=frozenset({"sums exponentials in bf16"}),
    has_output_bugs=False,
)
