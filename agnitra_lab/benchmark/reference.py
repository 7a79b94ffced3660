"""What a workload's baseline and its fp64 oracle answer, once a seed: all candidates are held against the same answers.

With six candidates of a 1.1B decoder most of the gate's time on an H200 went into asking the same questions again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from agnitra_lab.benchmark.effects import is_untouched
from agnitra_lab.benchmark.elements import RELAXED_RTOL, match, rtol_of
from agnitra_lab.benchmark.inputs import num_bytes, redraw, shifted_copy, with_own_inputs
from agnitra_lab.benchmark.oracle import Oracle, build_oracle, oracle_failure
from agnitra_lab.benchmark.outputs import Call, fingerprint, leaf_rtols, overwritten_outputs, run_call
from agnitra_lab.benchmark.state import ModuleState, module_of, same_values
from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.device.info import device_of
from agnitra_lab.errors import UsageError
from agnitra_lab.graph.tree import leaves, tensors

PrecisionTrack = Literal["exact", "relaxed"]

_PROBE_SEED = 104_729
# A double-precision copy this far from eager computes something else.
_ORACLE_NONSENSE = 0.5
# Answers are kept for the next candidate up to this many bytes: a share of a device's memory, a fixed size on a CPU.
_KEPT_SHARE, _KEPT_BYTES = 1 / 16, 2**31


@dataclass(frozen=True)
class Answer:
    """What the baseline made of the inputs of one seed, and what is true.

    Attributes:
        wanted: the baseline's call; its live outputs are dropped.
        prints: fingerprints of its outputs.
        truths: the oracle's output leaves, None where there is no oracle.
        true_state: what the oracle left in the state tensors that the baseline wrote.
        true_inputs: path -> what it left in the inputs that the baseline wrote.
    """

    wanted: Call
    prints: list[torch.Tensor]
    truths: list[Any] | None
    true_state: dict[str, torch.Tensor | None]
    true_inputs: dict[str, torch.Tensor]


class Reference:
    """The baseline of a workload and its double-precision copy.

    Args:
        workload: gives the model, the inputs and their redraws.
        baseline: takes the workload's inputs; its model by default.
        precision_track: "relaxed" has no oracle.

    Attributes:
        drawn_from: what fresh inputs look like: the workload, with inputs that no call writes to.
        state: the baseline's module state, restored before each call to what the probe left.
        notes: what is to be said of every check made with it.
        least_rtol: relative tolerance of the dtype that the model mostly has.
        rtols: of each tensor leaf of the output; known after the probe.
        may_overwrite: outputs that the baseline itself overwrites by its next call.
    """

    def __init__(
        self,
        workload: Workload,
        baseline: Callable[..., Any] | None = None,
        *,
        precision_track: PrecisionTrack = "exact",
    ) -> None:
        self.workload = workload
        self.drawn_from = with_own_inputs(workload)
        self.baseline = baseline or workload.model
        self.precision_track = precision_track
        module = module_of(workload.model)
        self.module = module_of(self.baseline) or module
        self.device = device_of(module, workload.args, workload.kwargs)
        self.state = ModuleState(self.module)
        self.notes: dict[str, None] = {}
        self.least_rtol = _least_rtol(module, workload, precision_track)
        self.rtols: list[float] = []
        self.may_overwrite: set[str] = set()
        self.probe_inputs: Inputs
        self.probe_call: Call | None = None
        # Four times the weights of a bf16 model: made by the first check, since profiles and searches come before it.
        self._oracle: Oracle | None = None
        self._answers: dict[int, Answer] = {}
        self._left_bytes = 0
        self._last: Call

    def probe(self) -> Call:
        """Run the baseline on inputs that are in no comparison: sizes to poison, and whether inputs matter at all.

        What this call leaves is where every compared call starts: a model that has just run on the inputs of a seed
        holds the answer in its state already, and of such a call only what a candidate rounds otherwise would show.

        Raises:
            UsageError: when it does not run on the workload's inputs.
        """
        if self.probe_call is not None:
            return self.probe_call
        if self.precision_track == "exact":
            self._oracle, note = build_oracle(module_of(self.workload.model) or self.workload.model, self.device)
            if note:
                self.notes[note] = None
        self._left_bytes = _memory_to_keep(self.device)
        self.probe_inputs = redraw(self.drawn_from, _PROBE_SEED)
        try:
            first = run_call(self.baseline, shifted_copy(self.probe_inputs), self.state)
            again = run_call(self.baseline, shifted_copy(self.probe_inputs), self.state)
        except Exception as error:
            raise UsageError(
                f"The baseline raised on the inputs of workload {self.workload.name!r}: {first_line(error)}.",
                hint="Run the model once on these inputs and mend that first.",
            ) from error
        self.rtols = leaf_rtols(first.values, self.least_rtol)
        pairs = zip(tensors(first.values), tensors(again.values), strict=True)
        if not all(a.shape == b.shape and same_values(a, b) for (_, a), (_, b) in pairs):
            self.notes["the baseline differs from itself on equal inputs"] = None
        self.state.begin_here()
        if self._oracle is not None:
            self._oracle.begin_as(self.state)
        self.probe_call = self._last = first
        return first

    def answer(self, seed: int, inputs: Inputs) -> Answer:
        """Return what the baseline and the oracle make of the inputs of a seed.

        Args:
            seed: also of torch's random numbers during the call.
            inputs: drawn with this seed.
        """
        known = self._answers.get(seed)
        if known is not None:
            return known
        torch.manual_seed(seed)
        wanted = run_call(self.baseline, shifted_copy(inputs), self.state)
        self.may_overwrite |= set(overwritten_outputs(self._last))
        self._last = wanted
        truths = self._truths(inputs, wanted)
        true_state = {name: self._oracle.state(name) if self._oracle else None for name in wanted.state_after}
        found = Answer(
            replace(wanted, live=[]), fingerprint(wanted.values), truths,
            {name: tensor.clone() if tensor is not None else None for name, tensor in true_state.items()},
            self._true_inputs(inputs, wanted),
        )  # fmt: skip
        self._keep(seed, found)
        return found

    def depends_on_inputs(self, inputs: Inputs, wanted: Call) -> bool:
        """True unless the inputs differ from the probe's and every floating output is bit for bit the same."""
        assert self.probe_call is not None
        given = list(zip(tensors(inputs), tensors(self.probe_inputs), strict=True))
        if all(a.shape == b.shape and same_values(a, b) for (_, a), (_, b) in given):
            return True
        floats = [
            (a, b)
            for a, b in zip(wanted.values, self.probe_call.values, strict=False)
            if isinstance(a, torch.Tensor) and a.is_floating_point() and isinstance(b, torch.Tensor)
        ]
        return not floats or any(a.shape != b.shape or not same_values(a, b) for a, b in floats)

    def _truths(self, inputs: Inputs, wanted: Call) -> list[Any] | None:
        if self._oracle is None:
            return None
        try:
            found = [leaf for _, leaf in leaves(self._oracle(shifted_copy(inputs)))]
        except Exception as error:
            return self._without_oracle(oracle_failure(error))
        if [getattr(leaf, "shape", None) for leaf in found] != [getattr(v, "shape", None) for v in wanted.values]:
            return self._without_oracle("no fp64 oracle: the double-precision copy gives another structure")
        for truth, ref in zip(found, wanted.values, strict=True):
            if isinstance(ref, torch.Tensor) and ref.is_floating_point():
                leaf = match(ref, ref, truth, rtol=1.0, required_share=0.0)
                if leaf.baseline_error is not None and not leaf.baseline_error <= _ORACLE_NONSENSE:
                    return self._without_oracle("no fp64 oracle: the double-precision copy computes something else")
        # The model may return a tensor of its own, which the next call overwrites.
        return [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in found]

    def _true_inputs(self, inputs: Inputs, wanted: Call) -> dict[str, torch.Tensor]:
        if self._oracle is None:
            return {}
        before, found = dict(tensors(inputs)), self._oracle.inputs_after
        # A cache in fp64 is four times the caller's.
        self._oracle.inputs_after = {}
        written = [
            path
            for path, tensor in tensors(wanted.inputs_after)
            if path not in before or not is_untouched(before[path], tensor)
        ]
        return {path: found[path].detach().clone() for path in written if path in found}

    def _without_oracle(self, note: str) -> list[Any] | None:
        self._oracle = None
        self.notes[note] = None
        return None

    def _keep(self, seed: int, answer: Answer) -> None:
        held = (answer.wanted.values, answer.wanted.inputs_after, answer.wanted.state_after, answer.truths,
                answer.true_state, answer.true_inputs)  # fmt: skip
        size = num_bytes(((held,), {}))
        if size <= self._left_bytes:
            self._left_bytes -= size
            self._answers[seed] = answer


def first_line(error: Exception) -> str:
    """Describe an error in one line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _least_rtol(module: torch.nn.Module | None, workload: Workload, track: PrecisionTrack) -> float:
    """Tolerance of the dtype that most weights (or inputs) have: fp32 logits of a bf16 model are bf16 results."""
    if track == "relaxed":
        return RELAXED_RTOL
    counts: Counter[torch.dtype] = Counter()
    weights: list[torch.Tensor] = list(module.parameters()) if module is not None else []
    for tensor in weights or [leaf for _, leaf in tensors((workload.args, dict(workload.kwargs)))]:
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return rtol_of(counts.most_common(1)[0][0]) if counts else 0.0


def _memory_to_keep(device: torch.device) -> int:
    if device.type != "cuda":
        return _KEPT_BYTES
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return int(min(free_bytes / 2, total_bytes * _KEPT_SHARE))
