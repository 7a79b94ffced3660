"""One call and all that it left behind: values, layout, aliases, mutated inputs and state, and a cheap fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from agnitra_lab.benchmark.elements import rtol_of
from agnitra_lab.benchmark.state import ModuleState, same_values
from agnitra_lab.contracts.workload import Inputs
from agnitra_lab.graph.tree import leaves, span_of, tensors

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_NUM_FINGERPRINT_SAMPLES = 64
# The verified output and a timed one come from the same code and inputs: only atomics may reorder sums.
_FINGERPRINT_TOLERANCES = 10.0


@dataclass(frozen=True)
class Layout:
    """What is visible of one output leaf besides its values."""

    path: str
    type_name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    strides: tuple[int, ...] = ()
    aliases: frozenset[str] = frozenset()
    """Names of inputs, state tensors and earlier outputs whose memory it overlaps."""


@dataclass(frozen=True)
class Call:
    """One call's outcome, detached from every buffer that a later call may overwrite."""

    layouts: list[Layout]
    values: list[Any]
    """Leaves in order: copies of tensors, other leaves as they are."""
    inputs_after: Inputs
    state_after: dict[str, tuple[torch.Tensor, torch.Tensor]]
    live: list[Any]
    """The leaves themselves: a later call that overwrites them is seen by holding them against `values`."""


def run_call(function: Callable[..., Any], inputs: Inputs, state: ModuleState) -> Call:
    """Call `function` once on inputs that it may overwrite, with its state restored, and record the outcome."""
    state.restore()
    args, kwargs = inputs
    # A wrapper that stores its argument tuple must not see later changes of ours, so it gets its own dict.
    before = [(f"input{path}", tensor) for path, tensor in tensors((args, kwargs))]
    with torch.no_grad():
        output = function(*args, **kwargs)
    found = list(leaves(output))
    known = before + [(f"state {name}", tensor) for name, tensor in state.live()]
    layouts, values = [], []
    for path, leaf in found:
        layouts.append(_layout(path, leaf, known))
        if isinstance(leaf, torch.Tensor):
            known.append((f"output{path}", leaf))
        values.append(leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
    return Call(layouts, values, inputs, state.changed(), [leaf for _, leaf in found])


def overwritten_outputs(call: Call) -> list[str]:
    """Name the outputs of an earlier call that no longer hold what that call returned.

    Views of inputs and of state may change with these, and `layout_problems` judges them.
    """
    names = []
    for layout, value, leaf in zip(call.layouts, call.values, call.live, strict=True):
        if not isinstance(leaf, torch.Tensor) or any(not name.startswith("output") for name in layout.aliases):
            continue
        try:
            is_same = leaf.shape == value.shape and same_values(leaf, value)
        except RuntimeError:
            # torch's own CUDA graphs refuse to let an overwritten output be read, so nobody reads it unawares.
            continue
        if not is_same:
            names.append(f"output{layout.path}")
    return names


def layout_problems(candidate: Call, baseline: Call) -> list[str]:
    """List in words how the structure and layout of a candidate's outputs differ from the baseline's."""
    found, wanted = candidate.layouts, baseline.layouts
    if [layout.path for layout in found] != [layout.path for layout in wanted]:
        return [f"the output's structure differs: {_paths(found)} instead of {_paths(wanted)}"]
    problems = []
    for have, want in zip(found, wanted, strict=True):
        name = f"output{have.path}"
        for what in ("type_name", "shape", "dtype", "device"):
            if getattr(have, what) != getattr(want, what):
                word = what.removesuffix("_name")
                problems.append(f"{name} has {word} {getattr(have, what)}, the baseline's {getattr(want, what)}")
                break
        else:
            if have.strides != want.strides:
                problems.append(f"{name} has strides {have.strides}, the baseline's {want.strides}")
            if have.aliases != want.aliases:
                problems.append(
                    f"{name} shares memory with {_names(have.aliases)}, the baseline's with {_names(want.aliases)}"
                )
    return problems


def fingerprint(output: Any) -> list[torch.Tensor]:
    """Reduce an output to a few numbers a leaf (sum, sum of magnitudes, evenly spaced elements), on its device.

    Nothing is transferred or waited for, so that it can run beside a timed call. Takes an output or a list of leaves.
    """
    with torch.no_grad():
        return [_fingerprint(leaf) for _, leaf in tensors(output)]


def fingerprints_match(
    timed: list[torch.Tensor], verified: list[torch.Tensor], rtols: list[float], within: float = 1.0
) -> bool:
    """Say whether a timed output is the verified one, up to the order of floating sums.

    Args:
        timed, verified: fingerprints of both.
        rtols: relative tolerance of each leaf.
        within: share of the usual tolerance that the difference may be.
    """
    if len(timed) != len(verified):
        return False
    for have, want, rtol in zip(timed, verified, rtols, strict=True):
        if have.shape != want.shape:
            return False
        have, want = have.to("cpu"), want.to("cpu")
        size = float(want[2])
        # Sums over n elements may move by rtol of the sum of magnitudes; single elements as in the check.
        scale = torch.cat([want[1:2].abs().expand(3), want[3:].abs() + want[1].abs() / max(size, 1.0)])
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        is_near = (have - want).abs() <= within * _FINGERPRINT_TOLERANCES * rtol * scale
        is_same = (have == want) | (have.isnan() & want.isnan())
        if not bool((is_near | is_same).all()):
            return False
    return True


def leaf_rtols(values: list[Any], least: float = 0.0) -> list[float]:
    """Return the relative tolerance of each tensor leaf: 0 for integers, at least `least` for floats."""
    return [
        max(rtol_of(leaf.dtype), least) if leaf.is_floating_point() or leaf.is_complex() else 0.0
        for leaf in values
        if isinstance(leaf, torch.Tensor)
    ]


def _fingerprint(leaf: torch.Tensor) -> torch.Tensor:
    flat = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).detach().reshape(-1)
    size = flat.numel()
    step = max(size // _NUM_FINGERPRINT_SAMPLES, 1)
    samples = flat[::step].double()
    if flat.dtype.itemsize == 1 and flat.is_floating_point():
        flat = flat.float()
    total = flat.sum(dtype=torch.float64)
    magnitude = torch.linalg.vector_norm(flat, 1, dtype=torch.float64) if flat.is_floating_point() else total
    num_elements = torch.full((), float(size), dtype=torch.float64, device=flat.device)
    return torch.cat([torch.stack([total, magnitude, num_elements]), samples])


def _layout(path: str, leaf: Any, known: list[tuple[str, torch.Tensor]]) -> Layout:
    if not isinstance(leaf, torch.Tensor):
        return Layout(path, f"{type(leaf).__name__} {leaf!r}" if _is_plain(leaf) else type(leaf).__name__)
    # A subclass can answer for its values lazily, after the clock has stopped.
    type_name = "Tensor" if type(leaf) in _PLAIN_TYPES else type(leaf).__name__
    strides = leaf.stride() if leaf.layout is torch.strided else ()
    return Layout(
        path,
        type_name,
        tuple(leaf.shape),
        leaf.dtype,
        leaf.device,
        # The stride of a dimension of size 1 is never used, and torch leaves it free.
        tuple(stride if size > 1 else 0 for size, stride in zip(leaf.shape, strides, strict=False)),
        frozenset(name for name, tensor in known if _overlaps(leaf, tensor)),
    )


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, (str, int, bool))


def _overlaps(left: torch.Tensor, right: torch.Tensor) -> bool:
    try:
        if left.device != right.device or not left.numel() or not right.numel():
            return False
        (left_start, left_end, is_left_dense), (right_start, right_end, is_right_dense) = _range(left), _range(right)
    except (RuntimeError, NotImplementedError):
        return False
    if left_start == right_start:
        return left_start != 0
    # Interleaved views of one buffer (the halves of a fused projection) span the same range and share no element.
    return is_left_dense and is_right_dense and left_start < right_end and right_start < left_end


def _range(tensor: torch.Tensor) -> tuple[int, int, bool]:
    span, start = span_of(tensor), tensor.data_ptr()
    return start, start + span * tensor.element_size(), span <= tensor.numel()


def _paths(layouts: list[Layout]) -> str:
    return "(" + ", ".join(layout.path or "one value" for layout in layouts) + ")"


def _names(aliases: frozenset[str]) -> str:
    return ", ".join(sorted(aliases)) or "nothing"
