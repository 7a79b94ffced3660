"""The named workloads: `demo:NAME` or `demo:NAME@SCALE`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import TargetError

if TYPE_CHECKING:
    import torch

Builder = Callable[[str, str, "torch.dtype"], Workload]

DEMOS: dict[str, str] = {
    "llama-decode": "agnitra_lab.workloads.llama:decode",
    "llama-prefill": "agnitra_lab.workloads.llama:prefill",
    "bert": "agnitra_lab.workloads.encoder:bert",
    "vit": "agnitra_lab.workloads.encoder:vit",
    "resnet": "agnitra_lab.workloads.resnet:resnet",
    "dlrm": "agnitra_lab.workloads.dlrm:dlrm",
}
SCALES = ("tiny", "small", "full")


def demo(name: str, *, scale: str | None = None, device: str | None = None) -> Workload:
    """Build a named workload with random weights from a fixed seed.

    Args:
        name: a key of `DEMOS`.
        scale: "tiny" (tests), "small" (two CPU cores) or "full" (a real GPU load); by default "full" on CUDA and
            "small" on a CPU.
        device: "cuda" or "cpu"; by default CUDA where there is one. Weights are bf16 on CUDA, fp32 on a CPU.

    Raises:
        TargetError: for an unknown name or scale.
    """
    if name not in DEMOS:
        raise TargetError(f"Unknown demo {name!r}.", hint=f"Known demos: {', '.join(DEMOS)}.")
    if scale is not None and scale not in SCALES:
        raise TargetError(f"Unknown scale {scale!r} of demo:{name}.", hint=f"Known scales: {', '.join(SCALES)}.")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.startswith("cuda")
    module, _, function = DEMOS[name].partition(":")
    build: Builder = getattr(importlib.import_module(module), function)
    return build(scale or ("full" if is_cuda else "small"), device, torch.bfloat16 if is_cuda else torch.float32)
