"""Where a kernel would go: its search space and the facts around it, handed in by whoever knows templates.

Nothing here knows a template: a proposal is a rank among the configs of a `SearchSpace`, and nothing else is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, SearchSpace, Trial

MAX_SITES = 6
"""Sites in one question; further ones keep their presets."""


@dataclass(frozen=True)
class Sibling:
    """What was measured of the same template elsewhere: another shape, dtype or device.

    Attributes:
        label: where, such as "4096x2048 bfloat16, NVIDIA H200".
        trials: its measurements.
    """

    label: str
    trials: Sequence[Trial]


@dataclass(frozen=True)
class KernelSite:
    """One place where a config is to be chosen.

    Attributes:
        space: the valid configs; template, shape and dtype.
        bytes_moved: least bytes of one call, None where nobody counted.
        flops: of one call.
        num_nodes: how many nodes of the graph it stands for.
        siblings: landscapes of the template from elsewhere.
        device: where it is measured, when that is not the profile's device: a recording answers for another one.
    """

    space: SearchSpace
    bytes_moved: int | None = None
    flops: int | None = None
    num_nodes: int = 1
    siblings: tuple[Sibling, ...] = field(default=())
    device: DeviceInfo | None = None

    @property
    def key(self) -> str:
        """Its name, "template/shape/dtype"."""
        return Site(self.space.template, self.space.shape, self.space.dtype).key()

    @cached_property
    def valid(self) -> dict[str, KernelConfig]:
        """The valid configs by their keys."""
        return {config.key(): config for config in self.space.configs}
