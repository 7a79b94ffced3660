"""From a place in the graph to a measurable kernel: its search space, its first configs, its measure, its choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from agnitra_lab.contracts.kernel import Kernel, Site
from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

Timer = Callable[..., float]


class KernelBook:
    """Which kernel stands at which site: the tuned one where there is one, else the rule of thumb.

    It is what `patch` asks while it rewrites a graph, so it also knows afterwards which sites there are.

    Attributes:
        tuned: site -> the config that a search (or an earlier run) found.
        sites: every site asked for, with the number of times.
        find: asked once for the config of a site that is neither tuned nor refused; None refuses it. Without it the
            rule of thumb stands there.
    """

    def __init__(
        self,
        tuned: Mapping[Site, KernelConfig] | None = None,
        *,
        refused: Mapping[Site, str] | None = None,
        is_survey: bool = False,
    ) -> None:
        """Make a book.

        Args:
            tuned: configs that were found.
            refused: sites that get no kernel, with why: what was tried there failed, or the library is faster.
            is_survey: only record what is asked for, and have no kernel to give.
        """
        self.tuned = dict(tuned or {})
        self.sites: Counter[Site] = Counter()
        self.find: Callable[[Site], KernelConfig | None] | None = None
        self._is_survey = is_survey
        self._refused = dict(refused or {})
        self._rendered: dict[str, Kernel] = {}

    def __call__(self, template: str, shape: tuple[int, ...], dtype: str) -> Kernel | None:
        """Return the kernel for one site, None where the template has no config for it."""
        site = Site(template, tuple(shape), dtype.removeprefix("torch."))
        try:
            config = self.tuned.get(site) or default_config(site.template, site.shape, site.dtype)
        except TemplateError:
            return None
        self.sites[site] += 1
        if self._is_survey or site in self._refused:
            return None
        if self.find is not None and site not in self.tuned:
            found = self.find(site)
            if found is None:
                self._refused[site] = "what was tried there failed, or the library is faster"
                return None
            config = self.tuned[site] = found
        key = config.key()
        if key not in self._rendered:
            self._rendered[key] = render(config)
        return self._rendered[key]

    def why_not(self, template: str, shape: tuple[int, ...], dtype: str) -> str | None:
        """Return why a site gets no kernel, None where that is not known."""
        return self._refused.get(Site(template, tuple(shape), dtype.removeprefix("torch.")))

    @property
    def kernels(self) -> list[Kernel]:
        """Every kernel that was given out, in the order of the first time."""
        return list(self._rendered.values())


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


def is_ruled(site: Site) -> bool:
    """Whether the rule of thumb decides a site's config, because what it costs shows only between other kernels.

    A dependent launch runs beside the kernels before and after it. On one H200 the attention config that was fastest
    alone (128 keys in 8 parts) made a 1.1B decoder's token 9% slower than the rule's (64 in 16): 0.807 ms, not 0.740.
    """
    decides = getattr(registry.load(site.template), "is_ruled", None)
    return decides is not None and decides(site.shape)


def has_library(site: Site) -> bool:
    """Whether a library has a call for what the site's kernel computes, which a kernel then has to match."""
    return hasattr(registry.load(site.template), "library")


def measure_on(device: torch.device, site: Site, timer: Timer) -> Callable[[KernelConfig], float]:
    """Return `config -> latency_ms` of the site's kernel on random tensors.

    Args:
        device: where to run.
        site: template, shape and dtype.
        timer: `timer(call, device=...)` gives milliseconds.
    """
    arguments, options = registry.load(site.template).example(site.shape, site.dtype, device)

    def measure(config: KernelConfig) -> float:
        kernel = render(config)
        with torch.no_grad():
            return timer(lambda: kernel.call(*arguments, **options), device=device)

    return measure


def _distance(config: KernelConfig, wanted: dict[str, int | None]) -> float:
    return sum(
        abs(config.params[name].bit_length() - value.bit_length())
        for name, value in wanted.items()
        if value is not None and name in config.params
    )
