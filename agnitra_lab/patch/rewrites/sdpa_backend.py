"""Attention runs on the SDPA backend that measures fastest for its shape on this device.

Trigger: `scaled_dot_product_attention` without dropout. A constant mask that is causal becomes `is_causal`, one that
hides nothing goes away, and a band (sliding window) competes as kernels that skip what it hides. A mask whose keys do
not lie side by side competes as its copy in which they do.
Algebra: all of them compute softmax(q k^T * scale + mask) v; they differ in tiling, so in the last bits.
Guard: a backend that refuses the shape, dtype, mask or head grouping, or whose result on random tensors is not the
default's, drops out; the default stays unless another is more than 3% faster. AOTAutograd picks the backend when it
traces the call, so a call traced inside `sdpa_kernel` is fixed in the compiled graph. Where layouts differ the result
is put into the default's layout, and the measurement includes that copy. A buffer behind a constant mask that changes
sends calls to the original graph.
Source: `torch.nn.attention.sdpa_kernel`; sliding windows as in Longformer (Beltagy et al., arXiv 2004.05150) and
FlashAttention-2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.call_time import time_ms
from agnitra_lab.patch.constants import Constants
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.masks import Band, allowed_keys, band_of, has_dense_keys
from agnitra_lab.patch.ops import argument, fake_of, op_name
from agnitra_lab.patch.windows import Attention, repeated, windowed_attentions

ACTION = "sdpa_backend"
_LEAST_GAIN = 1.03
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = (None, None, None, None, 0.0, False, None, False)


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Simplify constant masks, and fix the backend of each attention for which another than the default is faster.

    Returns:
        One descriptor per changed call; calls of one shape share one measurement.
    """
    calls = [node for node in graph_module.graph.nodes if op_name(node) == "sdpa"]
    if not calls:
        context.refuse(ACTION, "the graph has no scaled_dot_product_attention")
    constants = Constants(context)
    measured: dict[Any, _Choice] = {}
    descriptors = []
    for node in calls:
        arguments = {name: argument(node, index, name, _DEFAULTS[index]) for index, name in enumerate(_NAMES)}
        problem = _why_not(arguments)
        if problem:
            context.refuse(ACTION, problem)
            continue
        mask = _Mask(arguments, constants)
        arguments = mask.simplified
        key = (_key(arguments), mask.band)
        if key not in measured:
            measured[key] = _choose(arguments, mask)
        choice = measured[key]
        if choice.attention is None:
            context.refuse(ACTION, choice.reason)
            if not mask.is_simplified:
                continue
        if choice.is_windowed or mask.is_simplified:
            context.assume(mask.sources)
        replacement = f"SDPA backend {choice.name or 'default'}"
        if mask.is_simplified:
            replacement += ", is_causal for its mask" if arguments["is_causal"] else ", no mask"
        descriptors.append(context.describe(ACTION, node, [node], replacement, choice.config))
        attention = choice.attention or functional.scaled_dot_product_attention
        call = context.call(node, attention, **arguments)
        call.meta["example_value"] = fake_of(node)
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
    return descriptors


class _Mask:
    """What is known of a call's mask.

    Attributes:
        simplified: the call's arguments, without the mask where `is_causal` or nothing says the same.
        band: the band that the mask still is, None for other masks and none.
        value: the constant mask itself.
        sources: the buffers that this rests on.
    """

    def __init__(self, arguments: dict[str, Any], constants: Constants) -> None:
        self.simplified = arguments
        self.band: Band | None = None
        self.value: Tensor | None = None
        self.is_simplified = False
        self.sources: Collection[fx.Node] = ()
        known = constants.of(arguments["attn_mask"])
        if known is None or not isinstance(known.value, Tensor) or arguments["is_causal"]:
            return
        self.value, self.sources = known.value, known.sources
        queries, keys = _shape(arguments["query"])[-2], _shape(arguments["key"])[-2]
        seen = known.value if known.value.dtype is torch.bool else allowed_keys(known.value)
        band = None if seen is None else band_of(seen, queries, keys)
        self.is_simplified = band is not None and (band.is_everything or band.is_causal(queries, keys))
        if band is not None and self.is_simplified:
            self.simplified = {**arguments, "attn_mask": None, "is_causal": not band.is_everything}
        else:
            self.band = band


class _Choice:
    def __init__(
        self,
        name: str | None,
        attention: Attention | None,
        reason: str,
        times_ms: dict[str, float],
        is_windowed: bool = False,
    ) -> None:
        self.name = name
        self.attention = attention
        self.reason = reason
        self.is_windowed = is_windowed
        self.config: dict[str, Any] = {f"{backend}_ms": round(time, 6) for backend, time in times_ms.items()}


def _why_not(arguments: dict[str, Any]) -> str | None:
    tensors = [fake_of(arguments[name]) for name in ("query", "key", "value")]
    if any(tensor is None for tensor in tensors):
        return "query, key or value is not a tensor of known shape"
    if arguments["dropout_p"] != 0.0:
        return "attention with dropout draws random numbers, which differ between backends"
    if arguments["attn_mask"] is not None and fake_of(arguments["attn_mask"]) is None:
        return "the attention mask is not a tensor of known shape"
    if any(isinstance(arguments[name], fx.Node) for name in ("is_causal", "scale", "enable_gqa")):
        return "is_causal, scale or enable_gqa is computed in the graph"
    return None


def _shape(node: Any) -> tuple[int, ...]:
    fake = fake_of(node)
    return () if fake is None else tuple(int(size) for size in fake.shape)


def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
    parts: list[Any] = []
    for value in arguments.values():
        fake = fake_of(value)
        parts.append(value if fake is None else (tuple(fake.shape), fake.stride(), fake.dtype, fake.device))
    return tuple(parts)


def _choose(arguments: dict[str, Any], mask: _Mask) -> _Choice:
    """Measure every backend on random tensors of the call's shapes and strides, and its very mask where that is one."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    fake = fake_of(arguments["query"])
    assert fake is not None
    if fake.device.type != "cuda" and mask.band is None:
        return _Choice(None, None, "attention does not run on a CUDA device, and no window bounds its mask", {})
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        real = {name: _random_like(value) for name, value in arguments.items()}
        if arguments["attn_mask"] is not None and mask.value is not None:
            real["attn_mask"] = mask.value
        expected = functional.scaled_dot_product_attention(**real)
        attentions: dict[str, Attention] = {"default": functional.scaled_dot_product_attention}
        if fake.device.type == "cuda":
            backends = {name: _on_backend(backend) for name, backend in _backends().items()}
            attentions |= backends
            given = fake_of(arguments["attn_mask"])
            if given is not None and not has_dense_keys(given):
                attentions |= {f"{name}_dense_mask": _with_dense_mask(call) for name, call in backends.items()}
            if arguments["enable_gqa"] and given is not None and fake.dim() == 4:
                # With a mask the efficient backend does not group heads: without copies of them math is left.
                attentions |= {f"{name}_repeated": repeated(call) for name, call in backends.items()}
        windows: dict[str, Attention] = {}
        if mask.band is not None and fake.dim() == 4:
            windows = windowed_attentions(mask.band, fake.shape[-2], real["key"].shape[-2])
        attentions |= windows
        attentions = {name: _laid_out(call, expected.stride()) for name, call in attentions.items()}
        times_ms: dict[str, float] = {}
        for name, attention in attentions.items():
            time = _time_if_right(attention, real, expected)
            if time is not None:
                times_ms[name] = time
    _drop_untraceable(times_ms, attentions, arguments)
    return _fastest(times_ms, attentions, windows, tuple(expected.shape))


def _drop_untraceable(times_ms: dict[str, float], attentions: dict[str, Attention], arguments: dict[str, Any]) -> None:
    """Leave out what refuses the graph's own tensors: a backend may take a random mask and not one that is a weight."""
    fakes = {name: value if (fake := fake_of(value)) is None else fake for name, value in arguments.items()}
    mode = getattr(fakes["query"], "fake_mode", None)
    if mode is None:
        return
    for name in [name for name in times_ms if name != "default"]:
        try:
            with mode, torch.no_grad():
                attentions[name](**fakes)
        except (RuntimeError, NotImplementedError):
            del times_ms[name]


def _fastest(
    times_ms: dict[str, float], attentions: dict[str, Attention], windows: Collection[str], shape: tuple[int, ...]
) -> _Choice:
    others = {name: time for name, time in times_ms.items() if name != "default"}
    if "default" not in times_ms or not others:
        return _Choice(None, None, "no SDPA backend could be measured on this shape", times_ms)
    best = min(others, key=others.__getitem__)
    if times_ms["default"] / others[best] <= _LEAST_GAIN:
        reason = f"the default SDPA backend is within 3% of the fastest ({best}) on shape {shape}"
        return _Choice(None, None, reason, times_ms)
    return _Choice(best, attentions[best], "", times_ms, is_windowed=best in windows)


def _time_if_right(attention: Attention, real: dict[str, Any], expected: Tensor) -> float | None:
    try:
        result = attention(**real)
    except (RuntimeError, NotImplementedError):
        return None
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(expected.float().pow(2).mean().sqrt())
    if not torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=5 * tolerance * scale, equal_nan=True):
        return None
    return time_ms(lambda: attention(**real), expected.device)


def _backends() -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return {name: getattr(SDPBackend, member) for name, member in names.items() if hasattr(SDPBackend, member)}


def _on_backend(backend: Any) -> Attention:
    def attention(**arguments: Any) -> Tensor:
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel([backend]):
            return functional.scaled_dot_product_attention(**arguments)

    return attention


def _with_dense_mask(attention: Attention) -> Attention:
    def dense(**arguments: Any) -> Tensor:
        return attention(**{**arguments, "attn_mask": arguments["attn_mask"].contiguous()})

    return dense


def _laid_out(attention: Attention, stride: tuple[int, ...]) -> Attention:
    def in_layout(**arguments: Any) -> Tensor:
        result = attention(**arguments)
        if result.stride() == stride:
            return result
        return torch.empty_strided(result.shape, stride, dtype=result.dtype, device=result.device).copy_(result)

    return in_layout


def _random_like(value: Any) -> Any:
    fake = fake_of(value)
    if fake is None:
        return value
    shape = tuple(int(size) for size in fake.shape)
    real = torch.empty_strided(shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return real.fill_(True) if fake.dtype is torch.bool else real.normal_()
