"""The config to start from, by rule: a good kernel before anything was measured, and the first seed of a search."""

from __future__ import annotations

import math
from functools import lru_cache

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate import registry


# A decoder asks for the same few sites at each layer, by each rewrite, for each candidate.
@lru_cache(maxsize=1024)
def default_config(template: str, shape: tuple[int, ...], dtype: str) -> KernelConfig:
    """Choose the valid config that is nearest to the template's rule of thumb for this shape.

    Near in steps of powers of two; what stands first in the template's parameters is kept first.

    Args:
        template: name of a template.
        shape: the site's shape, as the template counts it.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        TemplateError: for an unknown template, or a shape or dtype without a valid config.
    """
    module = registry.load(template)
    space = module.space(shape, dtype)
    if not space.configs:
        raise TemplateError(f"{template} has no valid config for the shape {tuple(shape)} and {dtype}.")
    target = module.default(shape, dtype)

    def distance(config: KernelConfig) -> tuple[float, ...]:
        return tuple(abs(math.log2(config.params[name] / target[name])) for name in module.PARAMS)

    return min(space.configs, key=distance)
