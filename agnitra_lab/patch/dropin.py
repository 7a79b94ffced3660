"""The drop-in: behaves as the original model, takes the compiled path where it applies, and the original elsewhere."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from agnitra_lab.patch.fast import FastPath
from agnitra_lab.patch.frozen import FrozenWeights
from agnitra_lab.patch.liveness import Surroundings
from agnitra_lab.patch.returned import Returned
from agnitra_lab.patch.signature import Signature

_GRAD_ADVICE = (
    "Gradients are enabled, so the original model runs. Call the optimised model inside torch.no_grad() or "
    "torch.inference_mode() to take the fast path."
)
_OWN = "_agnitra_"


class OptimizedModel(nn.Module):
    """A model that can be used wherever the original was.

    It registers no parameters or modules of its own: `state_dict()`, `parameters()`, `named_modules()`, attributes
    and their assignment are the original's. A call that the compiled path was not made for (another shape, gradients
    enabled, training mode, autocast, new hooks) runs the original and is counted in `guard_misses` by its reason.
    A deep copy or a pickle of it is one of the original.

    Attributes:
        num_guard_misses: calls that ran the original path.
        guard_misses: the same by reason.
        fast_path_misses: calls that went through Dynamo's guards because the model has changed since install (a new
            weight, another attribute), by reason.
    """

    guard_misses: Counter[str]
    fast_path_misses: Counter[str]

    def __init__(
        self,
        original: Callable[..., Any],
        compiled: Callable[..., Any],
        signature: Signature,
        *,
        returned: Returned | None = None,
        is_graphed: bool = False,
        frozen: FrozenWeights | None = None,
    ) -> None:
        # nn.Module.__init__ would give it parameters, modules and a training flag of its own.
        module = original if isinstance(original, nn.Module) else nn.Module().eval()
        own: dict[str, Any] = {
            "_agnitra_original": original,
            "_agnitra_module": module,
            "_agnitra_compiled": compiled,
            "_agnitra_signature": signature,
            "_agnitra_context": Surroundings(module),
            "_agnitra_returned": returned if returned else None,
            "_agnitra_is_graphed": is_graphed,
            "_agnitra_frozen": frozen,
            "_agnitra_fast": None,
            "_agnitra_has_warned": False,
            "guard_misses": Counter(),
            "fast_path_misses": Counter(),
        }
        self.__dict__.update(own)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # Hooks belong to the original: they run inside both paths, not around them.
        return self.forward(*args, **kwargs)

    @property
    def _orig_mod(self) -> Any:
        """The original, under the name that torch.compile's wrapper gives it."""
        return self.__dict__["_agnitra_original"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled path when the call fits, else the original."""
        own = self.__dict__
        compiled = own["_agnitra_compiled"]
        if compiled is None:
            return own["_agnitra_original"](*args, **kwargs)
        if torch.is_grad_enabled():
            return self._miss("gradients enabled", args, kwargs)
        if not own["_agnitra_signature"].matches(args, kwargs):
            return self._miss(own["_agnitra_signature"].explain(args, kwargs), args, kwargs)
        fast_reason = None
        if own["_agnitra_fast"] is not None:
            outputs, fast_reason = own["_agnitra_fast"](args, kwargs)
            if fast_reason is None:
                return outputs
        reason = own["_agnitra_context"].difference()
        if reason is None and own["_agnitra_frozen"] is not None:
            reason = own["_agnitra_frozen"].difference()
        if reason is not None:
            return self._miss(reason, args, kwargs)
        if fast_reason is not None:
            own["fast_path_misses"][fast_reason] += 1
        if torch.is_inference_mode_enabled() and not _has_inference_tensor(args, kwargs):
            # Dynamo guards on inference mode; leaving it saves a second compilation of the same graph.
            with torch.inference_mode(False), torch.no_grad():
                return self._run_compiled(args, kwargs)
        return self._run_compiled(args, kwargs)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        own = self.__dict__
        if own["_agnitra_is_graphed"]:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = own["_agnitra_compiled"](*args, **kwargs)
        returned = own["_agnitra_returned"]
        return outputs if returned is None else returned(outputs)

    def _miss(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.guard_misses[reason] += 1
        if reason == "gradients enabled" and not self.__dict__["_agnitra_has_warned"]:
            self.__dict__["_agnitra_has_warned"] = True
            warnings.warn(_GRAD_ADVICE, stacklevel=4)
        return self.__dict__["_agnitra_original"](*args, **kwargs)

    @property
    def num_guard_misses(self) -> int:
        """Calls that ran the original path."""
        return sum(self.guard_misses.values())

    @property
    def is_optimized(self) -> bool:
        """Whether a compiled path is installed."""
        return self.__dict__["_agnitra_compiled"] is not None

    def take_fast_path(self, fast: FastPath | None) -> None:
        """From now on run matching calls through `fast`; None for the compiled function itself."""
        self.__dict__["_agnitra_fast"] = fast

    def unload(self) -> None:
        """Drop the compiled path for good: from now on every call is the original's."""
        self.__dict__.update(_agnitra_compiled=None, _agnitra_frozen=None, _agnitra_fast=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_OWN):
            raise AttributeError(name)
        try:
            return getattr(self.__dict__["_agnitra_original"], name)
        except AttributeError:
            return getattr(self.__dict__["_agnitra_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_agnitra_original"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_agnitra_original"], name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.__dict__["_agnitra_original"])})

    def __repr__(self) -> str:
        return f"OptimizedModel({self.__dict__['_agnitra_original']!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__dict__["_agnitra_original"], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.__dict__["_agnitra_original"],)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Iterate over the original's modules."""
        return self.__dict__["_agnitra_module"].named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original's state."""
        return self.__dict__["_agnitra_module"].state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original; derived weights follow at the next call."""
        return self.__dict__["_agnitra_module"].load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> OptimizedModel:
        """Set the original's training flag; a flag other than that at install runs the original path."""
        self.__dict__["_agnitra_module"].train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> OptimizedModel:
        self.__dict__["_agnitra_module"]._apply(fn, *args, **kwargs)
        return self


def _has_inference_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in _pytree.tree_leaves((args, kwargs)))


def _same(original: Any) -> Any:
    return original
