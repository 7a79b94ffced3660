"""From a place in the graph to a measurable kernel: its search space, its first configs, its measure, its choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from agnitra_lab.contracts.search import KernelConfig, SearchResult, SearchSpace
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.graph.sites import Site

Timer = Callable[..., float]


def supported(found: Sequence[Site]) -> list[Site]:
    """Keep the sites whose shape and dtype their template has a config for."""
    kept = []
    for site in found:
        try:
            default_config(site.template, site.shape, site.dtype)
        except TemplateError:
            continue
        kept.append(site)
    return kept


def space_of(site: Site) -> SearchSpace:
    """List the valid configs of the site's template at its shape."""
    return registry.load(site.template).space(site.shape, site.dtype)


def seed_configs(site: Site, suggestions: Sequence[Suggestion]) -> list[KernelConfig]:
    """Configs to measure first: what suggestions of this template ask for, then the rule of thumb.

    A suggestion chooses the nearest valid config; it can never introduce one of its own.
    """
    space = space_of(site)
    seeds = []
    for suggestion in suggestions:
        if suggestion.action == site.template and suggestion.block_size is not None and space.configs:
            wanted = {
                "BLOCK_N": suggestion.block_size,
                "num_warps": suggestion.num_warps,
                "num_stages": suggestion.num_stages,
            }
            seeds.append(min(space.configs, key=lambda config: _distance(config, wanted)))
    seeds.append(default_config(site.template, site.shape, site.dtype))
    return list({config.key(): config for config in seeds}.values())


def measure_on(device: torch.device, site: Site, timer: Timer) -> Callable[[KernelConfig], float]:
    """Return `config -> latency_ms` of the site's kernel on random tensors.

    Args:
        device: where to run.
        site: template, shape (rows, columns) and dtype.
        timer: `timer(call, device=...)` gives milliseconds.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, site.dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    if site.template == "rms_norm":
        x, residual, weight = draw(*site.shape), draw(*site.shape), draw(site.shape[-1])
        arguments: tuple[object, ...] = (x, weight, 1e-5)
        options: dict[str, object] = {"residual": residual}
    else:
        arguments, options = (draw(*site.shape), draw(*site.shape)), {}

    def measure(config: KernelConfig) -> float:
        kernel = render(config)
        with torch.no_grad():
            return timer(lambda: kernel.call(*arguments, **options), device=device)

    return measure


def chosen_configs(searches: Sequence[SearchResult], found: Sequence[Site]) -> list[KernelConfig]:
    """The best config of each search, and the rule of thumb where a template was not searched."""
    chosen = {search.space_template: search.best.config for search in searches if search.best is not None}
    for site in found:
        if site.template not in chosen:
            chosen[site.template] = default_config(site.template, site.shape, site.dtype)
    return [chosen[template] for template in sorted(chosen)]


def _distance(config: KernelConfig, wanted: dict[str, int | None]) -> float:
    return sum(
        abs(config.params[name].bit_length() - value.bit_length())
        for name, value in wanted.items()
        if value is not None and name in config.params
    )
