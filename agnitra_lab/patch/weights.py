"""Derived weights: tensors computed from the model's parameters, kept equal to them for as long as they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from agnitra_lab.patch.stamps import same_versions

Build = Callable[..., Tensor]
_versions = attrgetter("_version")


def why_not_derivable(sources: Sequence[Any]) -> str | None:
    """Return why no guarded copy of these weights can be kept, None when it can."""
    for source in sources:
        if not isinstance(source, Tensor):
            return "a weight is not a tensor that the graph is given"
        if type(source) not in (Tensor, torch.nn.Parameter):
            return f"a weight is a {type(source).__name__}, a tensor subclass"
        if source.is_inference():
            return "a weight was made in inference mode and has no version counter, so updates could not be noticed"
    return None


def _own(value: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """Return a packed tensor in memory of its own, in the memory format that it was built in."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_packed = value.is_contiguous() or (
        value.dim() in formats and value.is_contiguous(memory_format=formats[value.dim()])
    )
    if not is_packed:
        value = value.contiguous()
    return value.clone() if any(value.data_ptr() == source.data_ptr() for source in sources) else value


class DerivedWeight:
    """A tensor built from source weights, rebuilt in place when they change.

    A change is seen by the version counter (in-place updates, `load_state_dict`), the address (`.data = ...`) and
    the identity (a new Parameter). Writes through an old `.data` alias move none of the three; PyTorch itself cannot
    see them, and `refresh` must be called after them.
    """

    is_broken = False

    def __init__(self, sources: Sequence[Tensor], build: Build) -> None:
        self.build = build
        # A tensor made in inference mode could never be refreshed outside it.
        with torch.inference_mode(False), torch.no_grad():
            self.value = _own(build(*[source.detach() for source in sources]), sources)
        self._stamp(sources)

    def _stamp(self, sources: Sequence[Tensor]) -> None:
        self.sources = list(sources)
        self.versions = [source._version for source in sources]
        self.addresses = [source.data_ptr() for source in sources]

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """Whether the value was built from these very tensors as they are now."""
        return (
            self.versions == [source._version for source in sources]
            and self.addresses == [source.data_ptr() for source in sources]
            and all(kept is given for kept, given in zip(self.sources, sources, strict=True))
        )

    def refresh(self, sources: Sequence[Tensor]) -> None:
        """Rebuild the value in place, so that its address (and a CUDA graph over it) stays good."""
        with torch.inference_mode(False), torch.no_grad():
            self.value.copy_(self.build(*[source.detach() for source in sources]))
        self._stamp(sources)


class Assumption(DerivedWeight):
    """The value of a buffer that code was made for. A new value cannot be taken over, it breaks the assumption."""

    def __init__(self, source: Tensor) -> None:
        super().__init__([source], torch.clone)

    def refresh(self, sources: Sequence[Tensor]) -> None:
        """Compare the new value with the assumed one."""
        self.is_broken = not torch.equal(self.value, sources[0].detach())
        self._stamp(sources)


class WeightGuard:
    """The check before each call of one compiled graph: are its derived weights those of the weights passed in?

    Attributes:
        num_refreshes: derived weights that were rebuilt.
        is_broken: a buffer has another value than the graph was made for; the graph must not run.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self._entries: list[tuple[DerivedWeight, tuple[int, ...]]] = []
        self._indices: list[int] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._sources: list[Tensor] = []
        self._is_unwritten = same_versions((), ())
        self.num_refreshes = 0

    @property
    def is_needed(self) -> bool:
        """Whether anything is watched."""
        return bool(self._entries)

    @property
    def has_assumptions(self) -> bool:
        """Whether the graph can become wrong, not only out of date."""
        return any(isinstance(weight, Assumption) for weight, _ in self._entries)

    def watch(self, weight: DerivedWeight, indices: tuple[int, ...]) -> None:
        """Check `weight` against the graph inputs at `indices` from now on."""
        self._entries.append((weight, indices))
        self._indices.extend(indices)
        self._remember()

    def _remember(self) -> None:
        self.is_broken = any(weight.is_broken for weight, _ in self._entries)
        self._sources = [source for weight, _ in self._entries for source in weight.sources]
        self._versions = [version for weight, _ in self._entries for version in weight.versions]
        self._addresses = [address for weight, _ in self._entries for address in weight.addresses]
        self._is_unwritten = same_versions(self._sources, self._versions)

    def __call__(self, args: Sequence[Any]) -> None:
        """Refresh what is out of date; when nothing is, that costs three attribute reads a source weight."""
        if not self._indices:
            return
        given = [args[index] for index in self._indices]
        if (
            list(map(_versions, given)) == self._versions
            and list(map(Tensor.data_ptr, given)) == self._addresses
            and all(map(is_, given, self._sources))
        ):
            return
        for weight, indices in self._entries:
            sources = [args[index] for index in indices]
            if not weight.is_current(sources):
                weight.refresh(sources)
                self.num_refreshes += 1
        self._remember()

    def refresh_stale(self) -> bool:
        """Refresh what in-place updates left behind; the caller has seen that the sources are the same tensors.

        Returns:
            Whether anything was out of date.
        """
        if self._is_unwritten():
            return False
        for weight, _ in self._entries:
            if not weight.is_current(weight.sources):
                weight.refresh(weight.sources)
                self.num_refreshes += 1
        self._remember()
        return True

    def refresh(self) -> None:
        """Rebuild every derived weight, whatever the counters say."""
        for weight, _ in self._entries:
            weight.refresh(weight.sources)
        self._remember()
