"""A norm over a middle dimension, such as the channels of [B, C, Y, X], becomes one kernel that reads x once.

Trigger: x / sqrt(mean(x^2, dim) + eps), (x - mean) / sqrt(var + eps), F.normalize(x, dim=dim) or x / norm(x), each in
its spellings (`agnitra_lab.patch.moment_norms`) with a weight and a bias per channel; or a permutation that brings a
dimension to the end and F.layer_norm over it. Over the last dimension, the kinds without a weight that no other action
takes: F.normalize and the plain root mean square.
Algebra: the same formula with sums in float32, centred for the variance, rounded once.
Guard: x is contiguous or has its channels innermost, the result has the same order; weight and bias have x's dtype or
float32, nothing writes them in between. Over the last dimension the norm stays between pointwise ops, with which the
compiler fuses it.
Sources: Zhang and Sennrich, arXiv 1910.07467, section 4; Liu et al., arXiv 2201.03545 (norm over channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.patch.context import RewriteContext, erase_unused
from agnitra_lab.patch.moment_norms import MomentNorm, find_moment_norms, why_not_written
from agnitra_lab.patch.neighbours import is_pointwise, is_read_by_pointwise_alone
from agnitra_lab.patch.ops import fake_of, op_name
from agnitra_lab.patch.residuals import shaped, why_not_affine

ACTION = "channel_norm"


@dataclass(frozen=True)
class _Site:
    """One norm with the layout that it reads and writes.

    Attributes:
        x: what the kernel reads: the norm's x, or what its permutation permuted.
        dim: the normalised dimension of that.
        is_permuted: the norm's own x and result have that dimension last.
        is_channels_last: the result is laid out with that dimension innermost.
    """

    norm: MomentNorm
    x: fx.Node
    dim: int
    is_permuted: bool
    is_channels_last: bool


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Replace each norm over a middle dimension by the kernel.

    Returns:
        One descriptor per norm.
    """
    descriptors = []
    num_found = 0
    for norm in find_moment_norms(graph_module.graph):
        if len(norm.dims) != 1 or _belongs_elsewhere(norm):
            continue
        num_found += 1
        site = _site_of(norm)
        problem = site if isinstance(site, str) else _why_not(site)
        if isinstance(site, str) or problem:
            context.refuse(ACTION, str(problem))
            continue
        fake = fake_of(site.x)
        assert fake is not None
        kernel = context.kernel(ACTION, _counted(fake, site.dim), fake.dtype)
        if kernel is not None:
            descriptors.append(_replace(site, kernel, context))
    if not num_found:
        context.refuse(ACTION, "the graph has no norm over a middle dimension")
    return descriptors


def _belongs_elsewhere(norm: MomentNorm) -> bool:
    """Whether another action is for it: contiguous LayerNorm, and RMSNorm with a weight, over the last dimension."""
    fake = fake_of(norm.x)
    if not norm.is_last or fake is None:
        return False
    is_turned = op_name(norm.result) == "layer_norm" and not fake.is_contiguous()
    return not is_turned if norm.kind == "layer" else norm.weight is not None or norm.bias is not None


def _site_of(norm: MomentNorm) -> _Site | str:
    """Return where the kernel reads and writes, or why it cannot."""
    fake, result = fake_of(norm.x), fake_of(norm.result)
    if fake is None or result is None:
        return "shapes are not known"
    if norm.kind == "layer" and norm.is_last:
        source, dim = _unpermuted(norm.x, fake)
        if source is None or not (result.is_contiguous() or result.stride() == fake.stride()):
            return "x is no permutation of a contiguous tensor"
        return _Site(norm, source, dim, True, result.is_contiguous())
    dim = norm.dims[0]
    if fake.is_contiguous() and result.is_contiguous():
        return _Site(norm, norm.x, dim, False, False)
    if fake.movedim(dim, -1).is_contiguous() and result.movedim(dim, -1).is_contiguous():
        return _Site(norm, norm.x, dim, False, True)
    return "x is neither contiguous nor has its channels innermost"


def _unpermuted(node: fx.Node, fake: Tensor) -> tuple[fx.Node | None, int]:
    """Return the contiguous tensor of which a node only brings one dimension to the end, and that dimension."""
    if op_name(node) not in ("permute", "transpose", "swapaxes", "movedim"):
        return None, 0
    source = node.args[0]
    whole = fake_of(source)
    if not isinstance(source, fx.Node) or whole is None or not whole.is_contiguous():
        return None, 0
    for dim in range(whole.dim() - 1):
        turned = whole.movedim(dim, -1)
        if (turned.shape, turned.stride()) == (fake.shape, fake.stride()):
            return source, dim
    return None, 0


def _why_not(site: _Site) -> str | None:
    norm = site.norm
    fake = fake_of(norm.x)
    assert fake is not None
    channels = fake.shape[norm.dims[0]]
    if fake.numel() < 1 or channels >= 2**30:
        return "x has no values, or 2^30 channels or more"
    if norm.is_last and not site.is_permuted and (is_pointwise(norm.x) or is_read_by_pointwise_alone(norm.result)):
        return "it stands between pointwise ops, and the compiler fuses them with a norm over the last dimension"
    return why_not_affine(norm.weight, norm.bias, int(channels), fake.dtype) or why_not_written(norm)


def _counted(fake: Tensor, dim: int) -> tuple[int, int, int]:
    """Return (outer, channels, inner) as the template counts them."""
    return math.prod(fake.shape[:dim]), fake.shape[dim], math.prod(fake.shape[dim + 1 :])


def _replace(site: _Site, kernel: Kernel, context: RewriteContext) -> PatchDescriptor:
    norm, result = site.norm, site.norm.result
    fake = fake_of(site.x)
    assert fake is not None
    config: dict[str, JsonValue] = {
        "kernel": kernel.config.key(),
        "shape": [int(size) for size in fake.shape],
        "kind": norm.kind,
        "dim": site.dim,
        "eps": norm.eps,
        "is_channels_last": site.is_channels_last,
    }
    gone = [norm.x, *norm.nodes] if site.is_permuted else list(norm.nodes)
    descriptor = context.describe(ACTION, result, gone, f"kernel {kernel.name}", config, kernel.content_hash)
    affine = [shaped(node, (int(fake.shape[site.dim]),), result, context) for node in (norm.weight, norm.bias)]
    options = {"kind": norm.kind, "dim": site.dim, "is_channels_last": site.is_channels_last}
    normed = context.call(result, kernel.call, site.x, *affine, norm.eps, **options)
    if site.is_permuted:
        normed.meta["example_value"] = fake
        normed = context.call(result, torch.movedim, normed, site.dim, -1)
    normed.meta["example_value"] = fake_of(result)
    result.replace_all_uses_with(normed)
    erase_unused(gone)
    return descriptor
