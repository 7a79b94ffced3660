"""Proof that the original stands as it stood: a fingerprint before install, and the same comparison after rollback."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.graph.tree import Containers, leaves, map_tensors, put_back, writable_tensors

_CHUNK = 1 << 24
# Sums in another order at each call: over many elements two distances of that kind are nearly the same, over a few they
# are chance.
_MOST_SPREADS = 8.0
_HOOK_TABLES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set",
    "_is_full_backward_hook",
)  # fmt: skip
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Fingerprint:
    """What a model is: its attributes, hooks and state. Two are equal when nothing in the model changed.

    Attributes:
        attributes: module name -> class, `__dict__` keys in order, and the value (plain types) or identity of each.
        hooks: module name -> hook tables with the identity of each hook.
        state_sha256: sha256 over every parameter and buffer: name, identity, shape, dtype, stride and content. The
            content of a CPU tensor is hashed byte by byte; that of a device tensor is a 64-bit sum on the device in
            which element i has the odd weight 2i+1, so that no single change and no swap of unequal elements leaves
            it as it was.
    """

    attributes: Mapping[str, Any]
    hooks: Mapping[str, Any]
    state_sha256: str
    num_parameters: int


def fingerprint(model: Callable[..., Any]) -> Fingerprint:
    """Describe a model completely. A callable that is no module has its `__dict__` and no state."""
    attributes: dict[str, Any]
    if not isinstance(model, nn.Module):
        attributes = {"": (id(type(model)), _attributes(getattr(model, "__dict__", {})))}
        return Fingerprint(attributes, {}, hashlib.sha256().hexdigest(), 0)
    attributes, hooks = {}, {}
    for name, module in model.named_modules():
        attributes[name] = (id(type(module)), _attributes(module.__dict__), id(type(module).forward))
        hooks[name] = [
            (table, [(key, id(hook)) for key, hook in value.items()] if isinstance(value, dict) else repr(value))
            for table, value in ((table, module.__dict__.get(table)) for table in _HOOK_TABLES)
        ]
    return Fingerprint(attributes, hooks, _state_sha256(model), sum(1 for _ in model.parameters()))


def _attributes(table: Mapping[str, Any]) -> list[Any]:
    described: list[Any] = []
    for name, value in table.items():
        if name in _HOOK_TABLES:
            continue
        if isinstance(value, _PLAIN):
            described.append((name, value))
        elif isinstance(value, dict):
            described.append((name, [(key, id(item)) for key, item in value.items()]))
        else:
            described.append((name, id(value)))
    return described


def _state_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    sums: list[Tensor] = []
    for name, tensor in _named_tensors(module):
        facts = (name, id(tensor), tuple(tensor.shape), str(tensor.dtype), str(tensor.device), tensor.requires_grad)
        digest.update(repr(facts).encode())
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
            continue
        digest.update(repr(tensor.stride()).encode())
        flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.is_contiguous() else _packed_bytes(tensor)
        if tensor.device.type == "cpu":
            digest.update(flat.numpy().data)
        else:
            sums.extend(_weighted_sums(flat))
    for device in sorted({str(value.device) for value in sums}):
        together = torch.stack([value for value in sums if str(value.device) == device])
        digest.update(repr(together.tolist()).encode())
    return digest.hexdigest()


def _packed_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _weighted_sums(flat: Tensor) -> Iterator[Tensor]:
    """Yield one int64 a chunk: the sum of (2i+1) * word[i], wrapping, and of the last bytes that fill no word."""
    aligned = flat.data_ptr() % 8 == 0
    num_words = flat.numel() // 8 if aligned else 0
    words = flat[: num_words * 8].view(torch.int64) if num_words else flat[:0]
    for part in (words, flat[num_words * 8 :]):
        for start in range(0, part.numel(), _CHUNK):
            chunk = part[start : start + _CHUNK]
            weights = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=chunk.device)
            yield (chunk.to(torch.int64) * weights).sum()


@dataclass(frozen=True)
class MutableState:
    """Buffers and arguments that a call may write, so that each run starts from the same values.

    Parameters are taken as read-only: a copy of them all would double the memory of a large model.
    """

    tensors: list[Tensor] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    containers: Containers = field(default_factory=lambda: Containers(()))

    @classmethod
    def of(cls, workload: Workload) -> MutableState:
        """Copy every buffer of the model and every tensor argument, those that caches hold among them."""
        model = workload.model
        given = (workload.args, dict(workload.kwargs))
        buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
        unique = writable_tensors([given, buffers])
        saved = [tensor.detach().clone() for tensor in unique]
        return cls(unique, saved, list(map(_version, unique)), Containers(given))

    def only_written(self) -> MutableState:
        """Return the part that was written since the copy; what no call writes needs no copy kept.

        A write is seen by its version counter too: a cache slot that is filled again with what it holds is written.
        """
        rows = [
            row
            for row in zip(self.tensors, self.saved, self.versions, strict=True)
            if row[2] != _version(row[0]) or not same_bits(row[0], row[1])
        ]
        return MutableState(
            [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], self.containers
        )

    def restore(self) -> None:
        """Put the saved values back in place, and back into the caches that held them."""
        self.containers.restore()
        for tensor, saved in zip(self.tensors, self.saved, strict=True):
            put_back(tensor, saved)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def run_original(workload: Workload, model: Callable[..., Any] | None = None) -> Any:
    """Run the workload once under no_grad with a fixed seed, and leave the generators as they were.

    Args:
        model: run this in place of the workload's model, on the workload's inputs.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        return (workload.model if model is None else model)(*workload.args, **workload.kwargs)


def keep_outputs(outputs: Any) -> Any:
    """Copy the tensors of a call's result, so that later calls cannot change them."""
    return map_tensors(outputs, lambda tensor: tensor.detach().clone())


def same_bits(left: Any, right: Any) -> bool:
    """Whether two results have the same structure and every tensor the same bytes (NaN equals the same NaN)."""
    return _same_paths(left, right) and all(map(_same_leaf, _values(left), _values(right)))


def _same_paths(left: Any, right: Any) -> bool:
    return type(left) is type(right) and [path for path, _ in leaves(left)] == [path for path, _ in leaves(right)]


def _values(result: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(result)]


def _same_leaf(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and (not isinstance(left, _PLAIN) or left == right or left != left)
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    return bool(torch.equal(_packed_bytes(left), _packed_bytes(right)))


def _as_near_as_itself(workload: Workload, now: Any, before: Any, state: MutableState) -> bool:
    """Whether the original gives another result at each call, and these two are no further apart than its calls are."""
    calls = []
    for _ in range(2):
        state.restore()
        calls.append(keep_outputs(run_original(workload)))
    results = (now, before, *calls)
    is_alike = all(_same_paths(result, now) for result in results)
    return is_alike and all(map(_is_within_spread, *map(_values, results)))


def _is_within_spread(now: Any, before: Any, one: Any, other: Any) -> bool:
    if _same_leaf(now, before):
        return True
    given = (now, before, one, other)
    if not all(isinstance(leaf, Tensor) and leaf.shape == now.shape and leaf.dtype == now.dtype for leaf in given):
        return False
    spread, distance = _distance(one, other), _distance(now, before)
    return spread > 0 and distance <= _MOST_SPREADS * spread


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).norm())


def prove(
    workload: Workload, before: Fingerprint, outputs: Any, state: MutableState, drop_in: Callable[..., Any]
) -> RollbackProof:
    """Compare the model after rollback with what it was before install.

    Args:
        workload: holds the original model and its inputs.
        before: the model's fingerprint before install.
        outputs: what the original returned before install, on the workload's inputs.
        state: what a call writes; put back before and after the run.
        drop_in: the rolled-back drop-in, which must now run the original.

    Returns:
        The proof, with the first difference in words where there is one.
    """
    state.restore()
    now = run_original(workload, drop_in)
    outputs_equal = same_bits(now, outputs) or _as_near_as_itself(workload, keep_outputs(now), outputs, state)
    state.restore()
    after = fingerprint(workload.model)
    attributes_equal = before.attributes == after.attributes
    hooks_equal = before.hooks == after.hooks
    parameters_equal = before.state_sha256 == after.state_sha256
    problems = []
    if not attributes_equal:
        problems.append(f"attributes of {_first_difference(before.attributes, after.attributes)}")
    if not hooks_equal:
        problems.append(f"hooks of {_first_difference(before.hooks, after.hooks)}")
    if not parameters_equal:
        problems.append("parameters or buffers")
    if not outputs_equal:
        problems.append("outputs on the workload's inputs")
    return RollbackProof(
        is_restored=not problems,
        attributes_equal=attributes_equal,
        hooks_equal=hooks_equal,
        parameters_equal=parameters_equal,
        outputs_equal=outputs_equal,
        num_parameters=after.num_parameters,
        state_sha256=after.state_sha256,
        detail=f"differs from before install: {'; '.join(problems)}" if problems else None,
    )


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [*before, *(name for name in after if name not in before)]
    found = next((name for name in names if before.get(name) != after.get(name)), "")
    return f"module {found!r}" if found else "the root module"
