"""KernelConfig -> Kernel: standalone source text, its hash, and a call bound to the config."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry

PARAMS = ("BLOCK_N", "ROWS_PER_PROGRAM", "num_warps", "num_stages")
_LAUNCH_OPTIONS = ("num_warps", "num_stages")
_LIMITS = {"BLOCK_N": 16384, "ROWS_PER_PROGRAM": 64, "num_warps": 32, "num_stages": 8}
_POWERS_OF_TWO = ("BLOCK_N", "ROWS_PER_PROGRAM", "num_warps")


def render(config: KernelConfig) -> Kernel:
    """Make a template concrete. The same config gives the same bytes, on every machine.

    Args:
        config: template name and one value for each of BLOCK_N, ROWS_PER_PROGRAM, num_warps, num_stages.

    Returns:
        The kernel; its `call` takes (x, weight, eps, residual=None, cast_before_weight=True) for rms_norm and
        (gate, up, round_silu=True) for swiglu, runs on CUDA tensors, and can be traced by torch.compile.

    Raises:
        TemplateError: for an unknown template, an unknown or missing parameter, or a value out of its domain.
        MissingError: when triton cannot be imported.
    """
    template = registry.load(config.template)
    _check_params(config)
    source = _source(template.kernel, config)
    return Kernel(
        config=config,
        source=source,
        content_hash=hashlib.sha256(source.encode()).hexdigest(),
        call=_bind(template.launch, dict(config.params)),
    )


def _bind(launch: Callable[..., Any], params: dict[str, int]) -> Callable[..., Any]:
    def call(*tensors: Any, **options: Any) -> Any:
        return launch(params, *tensors, **options)

    return call


def _check_params(config: KernelConfig) -> None:
    given, expected = set(config.params), set(PARAMS)
    if given != expected:
        raise TemplateError(
            f"{config.template} was given the parameters {', '.join(sorted(given)) or 'none'}; "
            f"it takes exactly {', '.join(PARAMS)}."
        )
    for name, value in config.params.items():
        is_in_domain = 1 <= value <= _LIMITS[name]
        if name in _POWERS_OF_TWO and value & (value - 1):
            is_in_domain = False
        if not is_in_domain:
            kind = "a power of two" if name in _POWERS_OF_TWO else "a whole number"
            raise TemplateError(f"{config.template}: {name}={value}, but it must be {kind} from 1 to {_LIMITS[name]}.")


def _source(kernel: Any, config: KernelConfig) -> str:
    constants = {name: config.params[name] for name in PARAMS if name not in _LAUNCH_OPTIONS}
    options = {name: config.params[name] for name in _LAUNCH_OPTIONS}
    point = ", ".join(f"{name}={config.params[name]}" for name in PARAMS)
    body = inspect.getsource(kernel.fn).strip("\n")
    if "NUM_STAGES: tl.constexpr" in body:
        constants["NUM_STAGES"] = config.params["num_stages"]
    lines = [
        f'"""Triton kernel of the template {config.template} at {point}.',
        "",
        "Launch it as kernel[grid](..., **CONSTANTS, **OPTIONS).",
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "CONSTANTS = " + _literal(constants),
        "OPTIONS = " + _literal(options),
        "",
        "",
        body,
        "",
    ]
    return "\n".join(lines)


def _literal(values: dict[str, int]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"
