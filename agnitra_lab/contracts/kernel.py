"""A generated kernel: source, callable, content hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agnitra_lab.contracts.search import KernelConfig


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
