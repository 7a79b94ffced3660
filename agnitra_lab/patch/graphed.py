"""One CUDA graph around a whole compiled call: inputs copied in, one replay, outputs cloned out.

Inductor's own CUDA graphs keep Dynamo's guards and its wrapper in front of every replay, about 1 ms a call for the 249
weights and caches of a 1.1B decoder on an H200 (torch 2.11), nearly as long as the replay itself. Here the drop-in's
own checks are all that stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from agnitra_lab.device.graphs import capture
from agnitra_lab.errors import PatchError
from agnitra_lab.patch.weights import WeightGuard

_NUM_WARM_CALLS = 3
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


class GraphedCall:
    """A callable that replays the captured call. The arguments must match those of the capture (the signature does).

    Args:
        compiled: what to capture; called a few times first, so state that it writes must be restored by the caller.
        model: the original, whose weights the graph reads and writes in place.
        args: positional arguments; tensors on one CUDA device and plain values.
        kwargs: keyword arguments, the same.
        guards: of the derived weights that the graph reads.

    Raises:
        PatchError: when the call cannot be captured, with the reason.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        guards: Sequence[WeightGuard] = (),
    ) -> None:
        leaves, self._structure = _pytree.tree_flatten((args, dict(kwargs)))
        _refuse_uncapturable(leaves)
        self._static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._weights = _LiveWeights(model)
        self._guards = list(guards)
        numbers = _plain_numbers(model)
        try:
            static_args, static_kwargs = _pytree.tree_unflatten(self._static, self._structure)
            self._graph, self._outputs = capture(
                lambda: compiled(*static_args, **static_kwargs), num_warm_calls=_NUM_WARM_CALLS
            )
        except RuntimeError as error:
            torch.cuda.synchronize()
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            raise PatchError(f"the call cannot be captured: {first_line}") from error
        if _plain_numbers(model) != numbers:
            raise PatchError("the model changes a Python number at each call, which a replay would not")
        self._leaves, self._out_structure = _pytree.tree_flatten(self._outputs)
        owned = {tensor.untyped_storage().data_ptr() for tensor in self._weights.tensors}
        self._is_cloned = [
            isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in owned for leaf in self._leaves
        ]

    def difference(self) -> str | None:
        """Return why a replay would read the wrong memory, None when it reads the model's own."""
        return self._weights.difference()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the call on new inputs."""
        for guard in self._guards:
            guard.refresh_stale()
        given = args if not kwargs and len(args) == len(self._static) else _pytree.tree_leaves((args, kwargs))
        for static, leaf, is_tensor in zip(self._static, given, self._is_tensor, strict=True):
            if is_tensor:
                static.copy_(leaf)
        self._graph.replay()
        copies = [
            leaf.clone() if is_cloned else leaf for leaf, is_cloned in zip(self._leaves, self._is_cloned, strict=True)
        ]
        return copies[0] if self._outputs is self._leaves[0] else _pytree.tree_unflatten(copies, self._out_structure)


class _LiveWeights:
    """Identity and address of every weight and buffer: the graph reads their memory, wherever the model points."""

    def __init__(self, model: Callable[..., Any]) -> None:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        tables = [table for owner in modules for table in (owner._parameters, owner._buffers)]
        self._slots: list[tuple[dict[str, Any], str]] = [
            (table, name) for table in tables for name, tensor in table.items() if tensor is not None
        ]
        self.tensors: list[Tensor] = [table[name] for table, name in self._slots]  # type: ignore[misc]
        self._addresses = list(map(Tensor.data_ptr, self.tensors))
        self._indices = list(range(len(self.tensors)))
        # One call into C++ for all addresses (what Inductor's own CUDA graphs use), 2 us instead of 20.
        self._compare = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)

    def difference(self) -> str | None:
        try:
            given = [table[name] for table, name in self._slots]
        except KeyError:
            return "weights changed"
        if not all(map(is_, given, self.tensors)):
            return "weights changed"
        if self._compare is not None:
            is_same = self._compare(given, self._addresses, self._indices)
        else:
            is_same = list(map(Tensor.data_ptr, given)) == self._addresses
        return None if is_same else "weights moved"


def _refuse_uncapturable(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.device.type != "cuda":
                raise PatchError(f"an input tensor is on {leaf.device}; a CUDA graph reads CUDA memory alone")
        elif type(leaf) not in _PLAIN:
            raise PatchError(f"an input is a {type(leaf).__name__}, whose value no guard compares")


def _plain_numbers(model: Callable[..., Any]) -> list[dict[str, Any]]:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [{k: v for k, v in vars(owner).items() if type(v) in (int, float, bool)} for owner in modules]
