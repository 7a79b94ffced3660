"""The compiled graph without Dynamo in front of it: inputs and weights go straight to where the graph takes them.

Dynamo's guards and its frame cost 20 to 1,000 us a call, depending on the number of weights; for a single layer that is
more than the layer. One traced call shows which argument of the graph is which input or weight and where its outputs
go; after that the drop-in's own checks stand in for the guards (`liveness`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from agnitra_lab.errors import PatchError
from agnitra_lab.patch.ends import Result, changes, flat, held
from agnitra_lab.patch.liveness import Liveness
from agnitra_lab.patch.side_effects import Reached
from agnitra_lab.patch.signature import PLAIN


class DirectCall:
    """A callable that runs the one compiled graph of a model. The arguments must match those of the traced call.

    Args:
        compiled: the function that Dynamo compiled.
        record: runs its argument and returns the result, and (run, arguments, outputs) of every graph call inside.
        model: what was compiled.
        liveness: the model's tensors.
        args: positional arguments of the traced call.
        kwargs: its keyword arguments.
        given: the same, as `Arguments` reads them.

    Attributes:
        result: how a result is put together from the tensors that a call returns.

    Raises:
        PatchError: when the call is more than one graph of inputs and weights, with the reason.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        record: Callable[[Callable[[], Any]], tuple[Any, list[tuple[Any, Sequence[Any], Any]]]],
        model: Callable[..., Any],
        liveness: Liveness,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Sequence[Any],
    ) -> None:
        before = held(given)
        with unchanged_attributes(model, liveness):
            result, calls = record(lambda: compiled(*args, **kwargs))
        if len(calls) != 1:
            raise PatchError(f"the call runs {len(calls)} compiled graphs, with Python between them")
        self._graph, graph_args, graph_outputs = calls[0]
        self._arguments, self._slots = _argument_map(graph_args, given, liveness)
        outputs = list(graph_outputs) if isinstance(graph_outputs, (tuple, list)) else [graph_outputs]
        changed = changes(before, given)
        self.result = Result(result, given, changed)
        self._sources = [_source_of(tensor, outputs, given, liveness) for tensor in flat(result, changed)]

    def __call__(self, given: Sequence[Any]) -> list[Tensor]:
        """Run the graph.

        Args:
            given: what the call is given, as `Arguments` reads it.

        Returns:
            The tensors of the result and of what else the call changes, in the order of `flat`.
        """
        arguments = self._arguments.copy()
        for slot, index in self._slots:
            arguments[slot] = given[index]
        outputs = self._graph(*arguments)
        kinds: dict[str, Any] = {"output": outputs, "input": given}
        return [kinds[kind][value] if kind in kinds else value for kind, value in self._sources]


@contextmanager
def unchanged_attributes(model: Callable[..., Any], liveness: Liveness) -> Iterator[None]:
    """Refuse a model that changes its own attributes in a call, or what its hooks reach: nothing would do that again.

    Raises:
        PatchError: when a number, a flag or a tensor attribute is another one after the call, or something is kept.
    """
    reached = Reached(model)
    yield
    if reached.has_changed():
        raise PatchError("a hook or function of the model keeps something of each call")
    if not liveness.has_the_same_attributes():
        raise PatchError("the model changes a Python value at each call")
    if not liveness.has_the_same_tensors():
        raise PatchError("the model replaces a tensor attribute at each call")


def _argument_map(
    graph_args: Sequence[Any], given: Sequence[Any], liveness: Liveness
) -> tuple[list[Any], list[tuple[int, int]]]:
    """Return the arguments with the weights in place, and (argument, place in `given`) for each of the others."""
    of_input = {id(value): index for index, value in reversed(list(enumerate(given))) if isinstance(value, Tensor)}
    is_weight = set(map(id, liveness.tensors))
    arguments: list[Any] = []
    slots: list[tuple[int, int]] = []
    for position, argument in enumerate(graph_args):
        if isinstance(argument, Tensor) and id(argument) in of_input:
            slots.append((position, of_input[id(argument)]))
            arguments.append(None)
        elif (isinstance(argument, Tensor) and id(argument) in is_weight) or isinstance(argument, PLAIN):
            arguments.append(argument)
        else:
            raise PatchError(f"the graph takes a {type(argument).__name__} that is no input, parameter or attribute")
    return arguments, slots


def _source_of(tensor: Tensor, outputs: Sequence[Any], given: Sequence[Any], liveness: Liveness) -> tuple[str, Any]:
    for kind, values in (("output", outputs), ("input", given)):
        for index, value in enumerate(values):
            if value is tensor:
                return kind, index
    if any(each is tensor for each in liveness.tensors):
        return "constant", tensor
    raise PatchError(f"the result holds a {type(tensor).__name__} that the graph does not return")


def _is_on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def untracked_memory(call: Callable[[], Any], given: Sequence[Any], liveness: Liveness) -> str | None:
    """Run a call and return which op reads memory that is no input, weight or result of the call; None for none.

    A CUDA graph would go on reading that memory after the model has replaced it, and nothing would notice.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    # Memory that was there before is no op's to be given, so an address that an op was given stays the call's.
    known = {leaf.untyped_storage().data_ptr() for leaf in [*given, *liveness.tensors] if isinstance(leaf, Tensor)}
    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            read = [value for value in _pytree.tree_leaves((args, kwargs or {})) if _is_on_cuda(value)]
            # What `torch.tensor` makes of numbers arrives by this op, and is new memory.
            is_new = func is torch.ops.aten.lift_fresh.default
            if not is_new and any(value.numel() and value.untyped_storage().data_ptr() not in known for value in read):
                found.append(str(func))
            result = func(*args, **(kwargs or {}))
            for value in _pytree.tree_leaves(result):
                if _is_on_cuda(value):
                    known.add(value.untyped_storage().data_ptr())
            return result

    with torch.no_grad(), Watch():
        call()
    return found[0] if found else None
