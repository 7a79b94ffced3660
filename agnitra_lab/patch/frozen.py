"""The guard of frozen weights: constants in a compiled graph are right only while their sources stay as they were."""

from __future__ import annotations

from collections.abc import Collection
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from agnitra_lab.patch.stamps import same_addresses, same_versions


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
        self._is_unwritten = same_versions(self._tensors, [tensor._version for tensor in self._tensors])
        self._is_in_place = same_addresses(self._tensors, list(map(Tensor.data_ptr, self._tensors)))

    def _read(self) -> list[Tensor]:
        return [itemgetter(name)(table) for table, name in self._slots]

    def difference(self) -> str | None:
        """Return "weights changed" when any frozen weight is no longer what was compiled in."""
        try:
            given = [table[name] for table, name in self._slots]
        except KeyError:
            return "weights changed"
        if all(map(is_, given, self._tensors)) and self._is_unwritten() and self._is_in_place():
            return None
        return "weights changed"
