"""What runs in the worker process for one kernel config: compile it, hold it against its reference, time it.

A config that hangs, crashes or reads past its tensors does so there, and the loop goes on with the next.
"""

from __future__ import annotations

import gc
from statistics import median
from typing import Any

import torch

from agnitra_lab.benchmark.elements import match, rtol_of
from agnitra_lab.benchmark.timing import sample_kernel
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, Measurement
from agnitra_lab.errors import SearchError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.graph.tree import tensors
from agnitra_lab.refine.bound import NO_BOUND, Bound
from agnitra_lab.refine.landscape_task import Target

_REQUIRED_SHARE = 0.999
# One site's tensors at a time: those of a prefill are hundreds of megabytes.
_examples: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}


def warm(device: str) -> Target | None:
    """Load torch and Triton and start the device; return what to compile for, None where nothing is compiled."""
    torch.zeros(1, device=device)
    target = _started_triton(device) if device.startswith("cuda") else None
    # Each timing collects garbage first, and going through all that torch and Triton hold takes 0.27 s (two cores of a
    # Xeon), far longer than the timing. From here on only what comes later is gone through.
    gc.collect()
    gc.freeze()
    return target


def _started_triton(device: str) -> Target:
    for name in registry.TEMPLATES:
        registry.load(name)
    torch.mm(*torch.zeros(2, 8, 8, device=device))  # starts cuBLAS, which references multiply with
    # The first kernel pays for Triton's own start, some 4 s.
    first = Site("rms_norm", (1, 16), "float32")
    measure(first, default_config(first.template, first.shape, first.dtype), device)
    import triton

    found = triton.runtime.driver.active.get_current_target()
    return found.backend, found.arch, found.warp_size


def measure(site: Site, config: KernelConfig, device: str, bound: Bound = NO_BOUND) -> Measurement:
    """Time a config at its site, once it has given the right answer; one slower than the bound beyond doubt, briefly.

    Args:
        site: template, shape and dtype.
        config: what to try.
        device: where.
        bound: what is known of the best config.

    Raises:
        SearchError: when its output differs from the template's reference, or a sample is no time.
    """
    arguments, options, expected = _example(site, device)
    kernel = render(config)
    with torch.no_grad():
        output = kernel.call(*arguments, **options)
        for (_, out), (_, ref) in zip(tensors(output), tensors(expected), strict=True):
            found = match(out, ref, None, rtol=rtol_of(ref.dtype), required_share=_REQUIRED_SHARE)
            if found.problem is not None or found.share < _REQUIRED_SHARE:
                reason = found.problem or f"only {found.share:.2%} of the elements match"
                raise SearchError(f"{config.key()} gives another result than the reference: {reason}.")
        samples_ms, is_cut = sample_kernel(
            lambda: kernel.call(*arguments, **options), device=device, is_hopeless=bound.is_hopeless
        )
    if not min(samples_ms) > 0:
        raise SearchError(f"{config.key()} measured {min(samples_ms)} ms, which is no latency.")
    detail = f"slower than the best beyond doubt after {len(samples_ms)} samples" if is_cut else None
    return Measurement(latency_ms=median(samples_ms), samples_ms=samples_ms, is_aborted=is_cut, detail=detail)


def measure_library(site: Site, device: str) -> Measurement:
    """Time the library call that the site's kernel stands in for, as `measure` times a config."""
    arguments, options, _ = _example(site, device)
    library = vars(registry.load(site.template))["library"]
    with torch.no_grad():
        samples_ms, _ = sample_kernel(lambda: library(*arguments, **options), device=device)
    return Measurement(latency_ms=median(samples_ms), samples_ms=samples_ms)


def _example(site: Site, device: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    key = f"{site.key()}/{device}"
    if key not in _examples:
        _examples.clear()
        template = registry.load(site.template)
        arguments, options = template.example(site.shape, site.dtype, device)
        with torch.no_grad():
            _examples[key] = (arguments, options, template.reference(*arguments, **options))
    return _examples[key]
