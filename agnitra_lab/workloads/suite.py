"""The suite: the workloads that the optimiser is judged on, as `suite:NAME` or `suite:NAME@SCALE`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import TargetError

if TYPE_CHECKING:
    import torch

    from agnitra_lab.workloads.demos import Builder

Family = Literal["language", "vision", "audio", "video", "diffusion", "recommender", "recurrent", "layer"]
SCALES = ("tiny", "small", "full")


@dataclass(frozen=True)
class SuiteEntry:
    """One line of the table.

    Attributes:
        builder: "module:function" of a `(scale, device, dtype) -> Workload`, below `agnitra_lab.workloads`.
        family: what kind of model it is.
        is_fp32: stays in fp32 on CUDA too, where the others are bf16.
        is_algebra: most of its work can be derived away, so means over the suite cap its ratio.
    """

    builder: str
    family: Family
    is_fp32: bool = False
    is_algebra: bool = False


SUITE: dict[str, SuiteEntry] = {
    "llama-1b-decode": SuiteEntry("decoders:llama_1b_decode", "language"),
    "llama-1b-prefill": SuiteEntry("llama:prefill", "language"),
    "llama-8b-decode": SuiteEntry("decoders:llama_8b_decode", "language"),
    "llama-8b-prefill": SuiteEntry("decoders:llama_8b_prefill", "language"),
    "qwen-qk-norm-prefill": SuiteEntry("decoders:qk_norm_prefill", "language"),
    "sliding-window-prefill": SuiteEntry("decoders:sliding_window_prefill", "language"),
    "moe-prefill": SuiteEntry("moe:prefill", "language"),
    "gpt2-prefill": SuiteEntry("gpt2:prefill", "language"),
    "bert": SuiteEntry("suite_sizes:bert", "language"),
    "bert-padded": SuiteEntry("padded_bert:bert_padded", "language"),
    "t5-encoder": SuiteEntry("t5:encoder", "language"),
    "mamba-scan": SuiteEntry("mamba:scan", "language"),
    "vit": SuiteEntry("suite_sizes:vit", "vision"),
    "convnext": SuiteEntry("convnext:classify", "vision"),
    "resnet50": SuiteEntry("suite_sizes:resnet50", "vision"),
    "whisper-encoder": SuiteEntry("whisper:encoder", "audio"),
    "video-conv3d": SuiteEntry("video:classify", "video"),
    "dit": SuiteEntry("dit:denoise", "diffusion"),
    "dlrm": SuiteEntry("suite_sizes:dlrm", "recommender"),
    "lstm": SuiteEntry("recurrent:lstm", "recurrent"),
    "gru": SuiteEntry("recurrent:gru", "recurrent"),
    "attention-by-hand": SuiteEntry("attention_by_hand:attention", "layer"),
    "gemm-fp32": SuiteEntry("layers:gemm_fp32", "layer", is_fp32=True),
    "gemm-bias-activation": SuiteEntry("layers:gemm_bias_activation", "layer"),
    "layer-norm-large": SuiteEntry("layers:layer_norm_large", "layer", is_fp32=True),
    "rms-norm-middle-dim": SuiteEntry("layers:rms_norm_middle_dim", "layer", is_fp32=True),
    "softmax-long-rows": SuiteEntry("layers:softmax_long_rows", "layer"),
    "cross-entropy": SuiteEntry("layers:cross_entropy", "layer"),
    "cumsum": SuiteEntry("layers:cumsum", "layer", is_fp32=True),
    "depthwise-conv": SuiteEntry("conv_layers:depthwise_conv", "layer"),
    "transposed-conv": SuiteEntry("conv_layers:transposed_conv", "layer", is_fp32=True),
    "pooling": SuiteEntry("conv_layers:pooling", "layer"),
}


@dataclass(frozen=True)
class SuiteRow:
    """What `agnitra suite list` says of one workload at scale full.

    Attributes:
        name: a key of `SUITE`.
        family: what kind of model it is.
        phase: "prefill" or "decode", None outside generative language models.
        item_unit: what its throughput counts.
        items_per_call: how many of them one call processes.
        num_parameters: weights, a tied one once.
    """

    name: str
    family: str
    phase: str | None
    item_unit: str
    items_per_call: int
    num_parameters: int


def suite_workload(name: str, *, scale: str | None = None, device: str | None = None) -> Workload:
    """Build a workload of the suite with random weights from a fixed seed.

    Args:
        name: a key of `SUITE`.
        scale: "tiny" (tests), "small" (two CPU cores) or "full" (the model's real widths); by default "full" on CUDA
            and "small" on a CPU.
        device: "cuda" or "cpu"; by default CUDA where there is one. Weights are fp32 on a CPU and bf16 on CUDA,
            except in the fp32 layers.

    Raises:
        TargetError: for an unknown name or scale.
    """
    if name not in SUITE:
        raise TargetError(f"Unknown suite workload {name!r}.", hint=f"Known: {', '.join(SUITE)}.")
    if scale is not None and scale not in SCALES:
        raise TargetError(f"Unknown scale {scale!r} of suite:{name}.", hint=f"Known scales: {', '.join(SCALES)}.")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if is_cuda and not SUITE[name].is_fp32 else torch.float32
    return _build(name, scale or default_scale(device), device, dtype)


def default_scale(device: str) -> str:
    """Return the scale of a workload for which none was named: what fits the device."""
    return "full" if device.startswith("cuda") else "small"


def suite_rows(names: Sequence[str] = tuple(SUITE)) -> list[SuiteRow]:
    """Describe workloads at scale full, on the meta device: no weight is allocated.

    Args:
        names: keys of `SUITE`.
    """
    import torch

    rows = []
    for name in names:
        # The context also redirects the random draws of weights and inputs, which would take minutes on a CPU.
        with torch.device("meta"):
            workload = _build(name, "full", "meta", torch.float32)
        parameters = workload.model.parameters() if isinstance(workload.model, torch.nn.Module) else ()
        rows.append(
            SuiteRow(
                name, SUITE[name].family, workload.phase, workload.item_unit, workload.items_per_call,
                sum(parameter.numel() for parameter in parameters),
            )
        )  # fmt: skip
    return rows


def _build(name: str, scale: str, device: str, dtype: torch.dtype) -> Workload:
    module, _, function = SUITE[name].builder.partition(":")
    build: Builder = getattr(importlib.import_module(f"agnitra_lab.workloads.{module}"), function)
    return replace(build(scale, device, dtype), name=name)
