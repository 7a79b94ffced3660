"""Attention runs on the SDPA backend that measures fastest for its shape on this device.

Trigger: `scaled_dot_product_attention` on CUDA, without dropout.
Algebra: all backends compute softmax(q k^T * scale + mask) v; they differ in tiling, so in the last bits.
Guard: a backend that refuses the shape, dtype, mask or head grouping drops out of the measurement; the default stays
unless another is more than 3% faster. AOTAutograd picks the backend when it traces the call, so a call traced inside
`sdpa_kernel` is fixed in the compiled graph. Where layouts differ the result is put into the default's layout, and
the measurement includes that copy.
Source: `torch.nn.attention.sdpa_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from agnitra_lab.contracts.patch import PatchDescriptor
from agnitra_lab.device.graphs import capture
from agnitra_lab.patch.context import RewriteContext
from agnitra_lab.patch.ops import argument, fake_of, op_name

ACTION = "sdpa_backend"
_LEAST_GAIN = 1.03
_CALLS_PER_SAMPLE = 10
_NUM_SAMPLES = 9
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = (None, None, None, None, 0.0, False, None, False)

Attention = Callable[..., Tensor]


def apply(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], context: RewriteContext
) -> list[PatchDescriptor]:
    """Fix the backend of each attention for which another than the default measures faster.

    Returns:
        One descriptor per changed call; calls of one shape share one measurement.
    """
    calls = [node for node in graph_module.graph.nodes if op_name(node) == "sdpa"]
    if not calls:
        context.refuse(ACTION, "the graph has no scaled_dot_product_attention")
    measured: dict[Any, _Choice] = {}
    descriptors = []
    for node in calls:
        arguments = {name: argument(node, index, name, _DEFAULTS[index]) for index, name in enumerate(_NAMES)}
        problem = _why_not(arguments)
        if problem:
            context.refuse(ACTION, problem)
            continue
        key = _key(arguments)
        if key not in measured:
            measured[key] = _choose(arguments)
        choice = measured[key]
        if choice.name is None or choice.attention is None:
            context.refuse(ACTION, choice.reason)
            continue
        descriptors.append(context.describe(ACTION, node, [node], f"SDPA backend {choice.name}", choice.config))
        call = context.call(node, choice.attention, **arguments)
        call.meta["example_value"] = fake_of(node)
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
    return descriptors


class _Choice:
    def __init__(self, name: str | None, attention: Attention | None, reason: str, times_ms: dict[str, float]) -> None:
        self.name = name
        self.attention = attention
        self.reason = reason
        self.config: dict[str, Any] = {f"{backend}_ms": round(time, 6) for backend, time in times_ms.items()}


def _why_not(arguments: dict[str, Any]) -> str | None:
    tensors = [fake_of(arguments[name]) for name in ("query", "key", "value")]
    if any(tensor is None for tensor in tensors):
        return "query, key or value is not a tensor of known shape"
    if any(tensor is not None and tensor.device.type != "cuda" for tensor in tensors):
        return "attention does not run on a CUDA device"
    if arguments["dropout_p"] != 0.0:
        return "attention with dropout draws random numbers, which differ between backends"
    if arguments["attn_mask"] is not None and fake_of(arguments["attn_mask"]) is None:
        return "the attention mask is not a tensor of known shape"
    if any(isinstance(arguments[name], fx.Node) for name in ("is_causal", "scale", "enable_gqa")):
        return "is_causal, scale or enable_gqa is computed in the graph"
    return None


def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
    parts: list[Any] = []
    for value in arguments.values():
        fake = fake_of(value)
        parts.append(value if fake is None else (tuple(fake.shape), fake.stride(), fake.dtype, fake.device))
    return tuple(parts)


def _choose(arguments: dict[str, Any]) -> _Choice:
    """Measure every backend on random tensors of the call's shapes and strides."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():
        real = {name: _random_like(value) for name, value in arguments.items()}
        expected = functional.scaled_dot_product_attention(**real)
        times_ms: dict[str, float] = {}
        attentions: dict[str, Attention] = {"default": functional.scaled_dot_product_attention}
        for name, backend in _backends().items():
            attentions[name] = _on_backend(backend, expected.stride())
        for name, attention in attentions.items():
            time_ms = _time_ms(attention, real)
            if time_ms is not None:
                times_ms[name] = time_ms
    others = {name: time for name, time in times_ms.items() if name != "default"}
    if "default" not in times_ms or not others:
        return _Choice(None, None, "no SDPA backend could be measured on this shape", times_ms)
    best = min(others, key=others.__getitem__)
    if times_ms["default"] / others[best] <= _LEAST_GAIN:
        reason = f"the default SDPA backend is within 3% of the fastest ({best}) on shape {tuple(expected.shape)}"
        return _Choice(None, None, reason, times_ms)
    return _Choice(best, attentions[best], "", times_ms)


def _backends() -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    names = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return {name: getattr(SDPBackend, member) for name, member in names.items() if hasattr(SDPBackend, member)}


def _on_backend(backend: Any, stride: tuple[int, ...]) -> Attention:
    def attention(**arguments: Any) -> Tensor:
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel([backend]):
            result = functional.scaled_dot_product_attention(**arguments)
        if result.stride() == stride:
            return result
        return torch.empty_strided(result.shape, stride, dtype=result.dtype, device=result.device).copy_(result)

    return attention


def _random_like(value: Any) -> Any:
    fake = fake_of(value)
    if fake is None:
        return value
    shape = tuple(int(size) for size in fake.shape)
    real = torch.empty_strided(shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return real.fill_(True) if fake.dtype is torch.bool else real.normal_()


def _time_ms(attention: Attention, arguments: dict[str, Any]) -> float | None:
    """Return the median device time of one call in ms, None when the backend refuses it.

    Calls are replayed from a CUDA graph, because for short ones the launch from Python would be all that is seen.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph, _ = capture(lambda: [attention(**arguments) for _ in range(_CALLS_PER_SAMPLE)], num_warm_calls=1)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    samples = []
    for _ in range(_NUM_SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / _CALLS_PER_SAMPLE)
    return sorted(samples)[len(samples) // 2]
