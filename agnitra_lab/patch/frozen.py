"""The guard of frozen weights: constants in a compiled graph are right only while their sources stay as they were."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_versions = attrgetter("_version")


class FrozenWeights:
    """Identity, version and address of every weight that was frozen; a change sends calls to the original path.

    Buffers that the graph writes are no constants and are left out.
    """

    def __init__(self, module: nn.Module, written: Collection[int] = ()) -> None:
        self._slots: list[tuple[dict[str, Any], str]] = []
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                self._slots += [
                    (table, name) for name, tensor in table.items() if tensor is not None and id(tensor) not in written
                ]
        self._tensors = self._read()
        self._versions = list(map(_versions, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _read(self) -> list[Tensor]:
        return [itemgetter(name)(table) for table, name in self._slots]

    def difference(self) -> str | None:
        """Return "weights changed" when any frozen weight is no longer what was compiled in."""
        try:
            given = [table[name] for table, name in self._slots]
        except KeyError:
            return "weights changed"
        if (
            all(map(is_, given, self._tensors))
            and list(map(_versions, given)) == self._versions
            and list(map(Tensor.data_ptr, given)) == self._addresses
        ):
            return None
        return "weights changed"
