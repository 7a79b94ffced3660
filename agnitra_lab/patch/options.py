"""Actions of kind "options": how a graph is compiled, in Inductor's own options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.patch import PatchDescriptor, Refusal
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import PatchError

OPTION_ACTIONS: dict[str, dict[str, Any]] = {
    "freezing": {"freezing": True},
    # One graph around the whole call (patch/graphed.py) instead of Inductor's, with its wrapper in front of each.
    "cuda_graph": {"triton.cudagraphs": False},
    # Independent small kernels side by side in one launch: Inductor fuses along data alone by default.
    "combo_kernels": {"combo_kernels": True},
    # On a CPU Inductor turns all convolutions, whose sums then come in another order.
    "as_laid_out": {"layout_optimization": False},
    "max_autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}
"""What each action of kind "options" adds to the Inductor options."""

# With Triton among the choices a product of an odd width needs no padding, whose result had to be copied into rows of
# the original's width: 0.43 ms of 1.93 for GPT-2's logits (4 x 1024 x 50257, H200).
_OURS: dict[str, dict[str, Any]] = {"max-autotune": {"shape_padding": False}}


def merge_options(
    workload: Workload, actions: Sequence[str], options: Mapping[str, Any], base_mode: str | None
) -> tuple[dict[str, Any], list[str], list[Refusal]]:
    """Put together what Inductor is told, in the order mode, given options, option actions.

    Args:
        workload: decides whether an action can apply.
        actions: names of actions; those of another kind are left alone.
        options: as `torch.compile(options=...)` takes them.
        base_mode: a torch.compile mode whose options come first.

    Returns:
        The options, the option actions that are in them, and why the others are not.

    Raises:
        PatchError: an unknown mode.
    """
    merged = {**(mode_options(base_mode) if base_mode else {}), **_OURS.get(base_mode or "", {}), **options}
    taken: list[str] = []
    refusals: list[Refusal] = []
    for action in (action for action in OPTION_ACTIONS if action in actions):
        if ACTIONS[action].needs_cuda and not uses_cuda(workload):
            refusals.append(Refusal(action=action, reason="the workload has no tensor on a CUDA device"))
            continue
        if action == "freezing" and any(tensor.is_inference() for tensor in model_tensors(workload.model)):
            reason = "a weight was made in inference mode and has no version counter, so updates could not be noticed"
            refusals.append(Refusal(action=action, reason=reason))
            continue
        merged.update(OPTION_ACTIONS[action])
        taken.append(action)
    return merged, taken, refusals


def mode_options(mode: str) -> dict[str, Any]:
    """Return the Inductor options of a torch.compile mode.

    Raises:
        PatchError: an unknown mode, with the known ones.
    """
    from torch._inductor import list_mode_options

    try:
        return dict(list_mode_options(mode))
    except Exception as error:
        known = "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"
        raise PatchError(f"Unknown torch.compile mode {mode!r}; known: {known}.") from error


def describe_option(action: str, options: Mapping[str, Any]) -> PatchDescriptor:
    """Return the descriptor of an option action: it changes how the whole graph is compiled."""
    config = {key: options[key] for key in OPTION_ACTIONS[action]}
    return PatchDescriptor(
        name=f"{action}__root__0",
        action=action,
        kind="options",
        node="graph",
        module_path="",
        source=None,
        replaced=(),
        replacement=f"Inductor options {', '.join(config)}",
        config=config,
    )


def model_tensors(model: Callable[..., Any]) -> list[Tensor]:
    """Return parameters and buffers; a plain callable has none."""
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def uses_cuda(workload: Workload) -> bool:
    """Whether an input or a weight lies on a CUDA device."""
    leaves = _pytree.tree_leaves((workload.args, dict(workload.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return any(tensor.device.type == "cuda" for tensor in [*tensors, *model_tensors(workload.model)])
