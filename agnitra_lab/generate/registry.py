"""The table of kernel templates, imported one by one when asked for, and whether this machine can run them."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from agnitra_lab.contracts.search import SearchSpace
from agnitra_lab.errors import TemplateError
from agnitra_lab.optional import require

TEMPLATES: dict[str, str] = {
    "cached_attention": "agnitra_lab.generate.templates.cached_attention",
    "decode_attention": "agnitra_lab.generate.templates.decode_attention",
    "channel_norm": "agnitra_lab.generate.templates.channel_norm",
    "depthwise_conv": "agnitra_lab.generate.templates.depthwise_conv",
    "group_norm": "agnitra_lab.generate.templates.group_norm",
    "layer_norm": "agnitra_lab.generate.templates.layer_norm",
    "rms_norm": "agnitra_lab.generate.templates.rms_norm",
    "skinny_gemm": "agnitra_lab.generate.templates.skinny_gemm",
    "swiglu": "agnitra_lab.generate.templates.swiglu",
    "softmax": "agnitra_lab.generate.templates.softmax",
    "cross_entropy": "agnitra_lab.generate.templates.cross_entropy",
    "linear_cross_entropy": "agnitra_lab.generate.templates.linear_cross_entropy",
    "cumsum": "agnitra_lab.generate.templates.cumsum",
    "split_gemm": "agnitra_lab.generate.templates.split_gemm",
}


class Template(Protocol):
    """The public names of a template module.

    It may have two more: `is_ruled(shape)`, for `generate.kernels.is_ruled`; and `library`, which takes what `example`
    gives and makes the library call that the kernel stands in for, where there is one.
    """

    PARAMS: tuple[str, ...]
    """What a config chooses: names of block sizes and splits, then num_warps and num_stages."""
    kernel: Any
    """The Triton function, or a tuple of them in the order in which they run."""

    def launch(self, params: dict[str, int], *tensors: Any, **options: Any) -> Any: ...

    def space(self, shape: tuple[int, ...], dtype: str) -> SearchSpace: ...

    def reference(self, *tensors: Any, **options: Any) -> Any: ...

    def supports(self, *tensors: Any) -> str | None: ...

    def default(self, shape: tuple[int, ...], dtype: str) -> dict[str, int]:
        """The rule of thumb: what each parameter should be near to, valid or not."""
        ...

    def example(self, shape: tuple[int, ...], dtype: str, device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Random arguments and options of `launch` at a site of this shape, from a fixed seed."""
        ...

    def cost(self, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
        """The least bytes that must move and the FLOPs of one call: what the roofline is counted from."""
        ...


def load(name: str) -> Template:
    """Import a template by its name.

    Raises:
        TemplateError: for a name that is not in the table, with the names that are.
        MissingError: when triton cannot be imported.
    """
    if name not in TEMPLATES:
        raise TemplateError(f"There is no kernel template {name!r}; known are {', '.join(sorted(TEMPLATES))}.")
    require("triton", purpose=f"for the kernel template {name} (it is built for Linux on x86-64)")
    return cast(Template, importlib.import_module(TEMPLATES[name]))


def is_available() -> str | None:
    """Say why generated kernels cannot run on this machine, or None when they can."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device: Triton kernels run in the interpreter here, for correctness only"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the templates need compute capability 8.0 or later, and this device has {major}.{minor}"
    return None
