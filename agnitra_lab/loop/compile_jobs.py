"""What the processes that compile ahead do: without a GPU, for the GPU, into Triton's disk cache.

The template's own launch runs on empty CPU tensors, with a driver that names the target and a `run` that stops before
the launch; so the kernels, their constants and their specialisations are those that the measuring process asks for,
and it finds them all in the cache. A process compiles about three configs a second (2 cores of a Xeon, triton 3.6).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from agnitra_lab.contracts.kernel import Launch, Site, TensorLayout
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.refine.landscape_task import Compiled, CompiledKernel, Target

_MESSAGE_LENGTH = 300
_FIRST, _ANY_TARGET = Site("rms_norm", (1, 16), "float32"), ("cuda", 80, 32)


_examples: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
_launched: list[Any] = []
_seconds: dict[str, float] = {}
_target: Target | None = None


def load() -> None:
    """Do what a first config would wait for, some 4 s: load every template, and start Triton's compiler."""
    import triton.backends.compiler
    import triton.compiler  # noqa: F401

    for name in registry.TEMPLATES:
        registry.load(name)
    # What to compile for is not known yet; the compiler starts for any.
    compile_config(_FIRST, default_config(_FIRST.template, _FIRST.shape, _FIRST.dtype).params, _ANY_TARGET)


def compile_config(site: Site, params: dict[str, int], target: Target, called: Launch | None = None) -> Compiled:
    """Compile the kernels of one config.

    Args:
        site: template, shape and dtype.
        params: the config.
        target: what to compile for.
        called: how, where not as the lab does that measures it.
    """
    _prepare(target)
    template: Any = registry.load(site.template)
    # Its check that a compiled kernel's tensors lie on a GPU is right everywhere but here.
    template.check_call = lambda *args: None
    arguments, options = _example(site, template) if called is None else _of_launch(called)
    _launched.clear()
    _seconds.clear()
    try:
        with torch.no_grad():
            template.launch(params, *arguments, **options)
    except Exception as error:  # whatever a compiler raises is this config's result
        return Compiled((), short(error))
    return Compiled(
        tuple(
            CompiledKernel(kernel.name, kernel.hash, _seconds.get(kernel.hash), int(kernel.metadata.shared))
            for kernel in _launched
        )
    )


def short(error: BaseException) -> str:
    """Return an error in one line, without addresses and paths that differ from run to run."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"/tmp/\S+", "<file>", text)[:_MESSAGE_LENGTH]


def _prepare(target: Target) -> None:
    global _target
    if _target == target:
        return
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver(GPUTarget(*target)))
    triton.knobs.compilation.listener = _listen
    if _target is None:
        whole_run = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = whole_run(self, *args, grid=grid, warmup=True, **kwargs)
            _launched.append(kernel)
            return kernel

        JITFunction.run = run
    _target = target


def _listen(*, src: Any, metadata: dict[str, Any], metadata_group: Any, times: Any, cache_hit: bool) -> None:
    if not cache_hit:
        _seconds[metadata["hash"]] = times.total / 1e6


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _example(site: Site, template: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with no values: their pages are never touched, however large they are."""
    from torch._subclasses import FakeTensorMode

    if site.key() not in _examples:
        with FakeTensorMode():
            arguments, options = template.example(site.shape, site.dtype, "cpu")
        _examples[site.key()] = (
            tuple(_empty(value) for value in arguments),
            {name: _empty(value) for name, value in options.items()},
        )
    return _examples[site.key()]


def _of_launch(called: Launch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_laid_out, called.args)), {name: _laid_out(value) for name, value in called.options}


def _laid_out(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_laid_out, value))
    if not isinstance(value, TensorLayout):
        return value
    span = 1 + sum((extent - 1) * step for extent, step in zip(value.shape, value.stride, strict=True))
    memory = torch.empty(value.offset + max(span, 0), dtype=getattr(torch, value.dtype))
    return memory.as_strided(value.shape, value.stride, value.offset)


def _empty(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
