"""A generated kernel (source, callable, content hash) and the place in a graph that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agnitra_lab.contracts.search import KernelConfig


@dataclass(frozen=True)
class Site:
    """One kernel family at one shape: what is searched once, and shared by every node of the graph that is like it.

    Attributes:
        template: template name.
        shape: as the template counts it, such as (rows, columns).
        dtype: such as "bfloat16".
    """

    template: str
    shape: tuple[int, ...]
    dtype: str

    def key(self) -> str:
        """A deterministic name, such as "rms_norm/4096x2048/bfloat16"."""
        return f"{self.template}/{'x'.join(map(str, self.shape))}/{self.dtype}"

    @classmethod
    def of_key(cls, key: str) -> Site:
        """Return the site that a key names.

        Raises:
            ValueError: for what is no key.
        """
        template, extents, dtype = key.split("/")
        return cls(template, tuple(map(int, extents.split("x"))), dtype)


@dataclass(frozen=True)
class TensorLayout:
    """A tensor without its values.

    Attributes:
        shape, stride: in elements.
        offset: of the first element in its memory, in elements.
        dtype: such as "bfloat16".
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One way in which a graph calls the kernel of a site: what Triton compiles depends on it.

    Attributes:
        site: where.
        args, options: of `Kernel.call`; a `TensorLayout` stands for each tensor.
    """

    site: Site
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


KernelSource = Callable[[str, tuple[int, ...], str], "Kernel | None"]
"""(template, shape, dtype) -> the kernel to put there, None to leave the original ops."""


@dataclass(frozen=True)
class Kernel:
    """A template made concrete by a config.

    Attributes:
        config: what it was rendered from.
        source: standalone Triton source text.
        content_hash: sha256 of the source, hex; two runs that render the same kernel agree on it.
        call: the op, taking the template's tensors; traceable by torch.compile.
    """

    config: KernelConfig
    source: str
    content_hash: str
    call: Callable[..., Any]

    @property
    def name(self) -> str:
        """File stem of the kernel's source: template and the hash's first 12 digits."""
        return f"{self.config.template}_{self.content_hash[:12]}"
