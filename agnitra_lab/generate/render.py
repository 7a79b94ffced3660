"""KernelConfig -> Kernel: standalone source text, its hash, and a call bound to the config."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from agnitra_lab.contracts.kernel import Kernel
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry

_LAUNCH_OPTIONS = ("num_warps", "num_stages")
_LIMITS = {"num_warps": 32, "num_stages": 8, "ROWS_PER_PROGRAM": 64, "SPLIT": 4096, "GROUP_M": 64}
_LARGEST_BLOCK = 32768
_ANY_WHOLE_NUMBER = ("num_stages", "SPLIT", "GROUP_M")


def render(config: KernelConfig) -> Kernel:
    """Make a template concrete. The same config gives the same bytes, on every machine.

    Args:
        config: template name and one value for each of the template's PARAMS.

    Returns:
        The kernel; its `call` takes what the template's `launch` takes after the params, runs on CUDA tensors, and can
        be traced by torch.compile.

    Raises:
        TemplateError: for an unknown template, an unknown or missing parameter, or a value out of its domain.
        MissingError: when triton cannot be imported.
    """
    template = registry.load(config.template)
    _check_params(config, template.PARAMS)
    source = _source(template.kernel, config, template.PARAMS)
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


def _check_params(config: KernelConfig, expected: tuple[str, ...]) -> None:
    if set(config.params) != set(expected):
        raise TemplateError(
            f"{config.template} was given the parameters {', '.join(sorted(config.params)) or 'none'}; "
            f"it takes exactly {', '.join(expected)}."
        )
    for name, value in config.params.items():
        limit, is_power = _LIMITS.get(name, _LARGEST_BLOCK), name not in _ANY_WHOLE_NUMBER
        if not 1 <= value <= limit or (is_power and value & (value - 1)):
            kind = "a power of two" if is_power else "a whole number"
            raise TemplateError(f"{config.template}: {name}={value}, but it must be {kind} from 1 to {limit}.")


def _source(kernel: Any, config: KernelConfig, names: tuple[str, ...]) -> str:
    constants = {name: config.params[name] for name in names if name not in _LAUNCH_OPTIONS}
    options = {name: config.params[name] for name in _LAUNCH_OPTIONS}
    point = ", ".join(f"{name}={config.params[name]}" for name in names)
    functions = kernel if isinstance(kernel, tuple) else (kernel,)
    body = "\n\n\n".join(map(_text, functions))
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


@cache
def _text(function: Any) -> str:
    # Finding all of a template takes 5 to 30 ms, and a search renders tens of configs.
    return inspect.getsource(function.fn).strip("\n")


def _literal(values: dict[str, int]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"
