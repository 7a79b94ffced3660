"""Does a candidate compute the same function as the baseline? DESIGN section 4, as one gate for every candidate.

Order per seed: poison freed memory -> candidate on its own copy of fresh inputs -> baseline on another copy -> fp64
oracle -> compare values, layout, aliases, mutated inputs and module state. torch.compile passes the same gate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from agnitra_lab.benchmark.effects import (
    Written,
    is_untouched,
    put_back_functions,
    state_problem,
    stray_mask,
    written_elements,
    written_part,
)
from agnitra_lab.benchmark.elements import RTOL, LeafMatch, match, rtol_of
from agnitra_lab.benchmark.inputs import fixed_tensors, redraw, shifted_copy
from agnitra_lab.benchmark.outputs import (
    Call,
    fingerprint,
    fingerprints_match,
    layout_problems,
    overwritten_outputs,
    run_call,
)
from agnitra_lab.benchmark.reference import Answer, PrecisionTrack, Reference, first_line
from agnitra_lab.benchmark.state import ModuleState, module_of
from agnitra_lab.contracts.measurement import MAX_ERROR_RATIO, Equivalence
from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.device.exclusive import exclusive
from agnitra_lab.device.info import synchronize
from agnitra_lab.errors import UsageError
from agnitra_lab.graph.tree import tensors, untouched

# A ratio of errors over few effective elements scatters; a near miss is judged again on more seeds.
_NEAR_MISS_RATIO, _NUM_EXTRA_SEEDS = 2.0, 5
# Of two errors of one number each, one is often several times the other: few numbers a seed take many seeds.
_NEAR_MISS_RATIO_OF_FEW, _NUM_EXTRA_SEEDS_OF_FEW = 8.0, 29
# Rounding of the oracle itself, relative to the output's size.
_ORACLE_SLACK = 1e-8
_MIN_LOGITS = 16
_PRINTS_MARGIN = 0.5


@dataclass
class Verified:
    """The verdict on equality, and what the timed loop needs to hold its outputs against.

    Attributes:
        equivalence: the contract.
        is_runnable: False when the candidate raised; its message is then in the problems.
        candidate_prints, baseline_prints: seed -> fingerprints of the verified outputs.
        rtols: relative tolerance of each tensor leaf.
        candidate_state, baseline_state: for restoring before each timed call.
    """

    equivalence: Equivalence
    is_runnable: bool
    candidate_prints: dict[int, list[torch.Tensor]]
    baseline_prints: dict[int, list[torch.Tensor]]
    rtols: list[float]
    candidate_state: ModuleState
    baseline_state: ModuleState

    @property
    def agrees_by_prints(self) -> bool:
        """Whether its outputs' fingerprints are the baseline's, so that they show a wrong answer on other inputs too.

        A model that turns roundings into other choices (a router's ties) has none to compare, nor has one whose few
        verified outputs only just agree: in TF32 those of a convolutional transformer did, and a third of those that
        were timed did not.
        """
        return bool(self.candidate_prints) and all(
            fingerprints_match(found, self.baseline_prints[seed], self.rtols, within=_PRINTS_MARGIN)
            for seed, found in self.candidate_prints.items()
        )


def check(
    workload: Workload,
    candidate: Callable[..., Any],
    *,
    baseline: Callable[..., Any] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    required_share: float = 0.999,
    precision_track: PrecisionTrack = "exact",
) -> Equivalence:
    """Check that a candidate computes what the baseline computes.

    Args:
        workload: gives the model, the inputs and their redraws.
        candidate: takes the workload's inputs.
        baseline: what it is compared with; the workload's model by default.
        seeds: of the fresh inputs, at least one.
        required_share: share of elements that must match, in [0, 1].
        precision_track: "relaxed" (TF32, low precision) takes the bf16 tolerance and drops the fp64 error rule.

    Returns:
        The equivalence, with each failed rule in words; a candidate that raises is not equivalent.

    Raises:
        UsageError: when the baseline itself cannot run on the workload's inputs.
    """
    return verify(
        workload, candidate, baseline=baseline, seeds=seeds, required_share=required_share,
        precision_track=precision_track,
    ).equivalence  # fmt: skip


def verify(
    workload: Workload,
    candidate: Callable[..., Any],
    *,
    baseline: Callable[..., Any] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    required_share: float = 0.999,
    precision_track: PrecisionTrack = "exact",
    reference: Reference | None = None,
) -> Verified:
    """Run `check` and keep the fingerprints of the verified outputs.

    Args:
        reference: the answers of earlier checks of the same workload, baseline and track; it gains those of this one.
        workload, candidate, baseline, seeds, required_share, precision_track: as in `check`; a reference has its own
            workload, baseline and track.
    """
    if not seeds:
        raise UsageError("No seeds were given.", hint="Give at least one, e.g. seeds=(0, 1, 2).")
    known = reference or Reference(workload, baseline, precision_track=precision_track)
    gate = _Gate(known, candidate, required_share)
    devices = [known.device] if known.device.type == "cuda" else []
    # The oracle in fp64 keeps the device busy, and another process may be timing.
    with exclusive(), torch.random.fork_rng(devices), untouched(gate.places):
        gate.probe()
        for seed in seeds:
            if not gate.run(seed):
                break
        if gate.is_near_miss():
            for extra in range(_NUM_EXTRA_SEEDS_OF_FEW if gate.has_few_numbers() else _NUM_EXTRA_SEEDS):
                if not gate.run(max(seeds) + 1 + extra):
                    break
    gate.restore()
    return gate.verified()


@dataclass(frozen=True)
class _Errors:
    """Errors of one output against fp64: the candidate's, the baseline's, and what counts as none (`LeafMatch`)."""

    error: float
    baseline_error: float
    rounding: float

    @property
    def limit(self) -> float:
        return max(self.usual_limit, self.rounding)

    @property
    def usual_limit(self) -> float:
        return MAX_ERROR_RATIO * self.baseline_error + _ORACLE_SLACK

    @property
    def is_too_large(self) -> bool:
        return self.error > self.limit

    @property
    def is_within_rounding_only(self) -> bool:
        return self.usual_limit < self.error <= self.rounding

    @property
    def ratio(self) -> float | None:
        if self.baseline_error == 0.0:
            return None if self.error > _ORACLE_SLACK else 1.0
        return self.error / self.baseline_error

    @classmethod
    def of_seeds(cls, errors: Sequence[_Errors]) -> _Errors:
        """Return what the errors on several seeds come to, candidate and baseline each for itself.

        That is the largest, and of outputs of few numbers, whose largest is chance, the mean square's root.
        """

        def together(sizes: Sequence[float]) -> float:
            return math.sqrt(sum(size**2 for size in sizes) / len(sizes)) if rounding else max(sizes)

        rounding = max(each.rounding for each in errors)
        own, baselines = [each.error for each in errors], [each.baseline_error for each in errors]
        return cls(together(own), together(baselines), rounding)

    def problem(self) -> str:
        """Say what is too large, and what it may be."""
        most = f"{MAX_ERROR_RATIO:g} times that"
        if self.rounding:
            most += f", or one rounding, {self.rounding:.3g}"
        return f"the error against fp64 is {self.error:.3g}, the baseline's {self.baseline_error:.3g} (at most {most})"


@dataclass
class _Gate:
    reference: Reference
    candidate: Callable[..., Any]
    required_share: float
    problems: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    matches: list[list[tuple[str, LeafMatch]]] = field(default_factory=list)
    candidate_prints: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    baseline_prints: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    top1_agreement: float | None = None
    are_inputs_unchanged: bool = True
    is_runnable: bool = True
    is_input_sensitive: bool = False

    def __post_init__(self) -> None:
        known = self.reference
        self.workload, self.device, self.baseline_state = known.workload, known.device, known.state
        candidate_module = module_of(self.candidate) or module_of(self.workload.model)
        is_shared = candidate_module is known.module
        self.candidate_state = self.baseline_state if is_shared else ModuleState(candidate_module)
        # An earlier check may have limited it to what its candidate wrote.
        self.baseline_state.limit_to(None)
        self.least_rtol = known.least_rtol
        self.places = fixed_tensors(known.workload)
        self.written_names: set[str] = set()
        self.last_found: Call | None = None

    def probe(self) -> None:
        """Make sure that the baseline runs, and that nobody has replaced what the check stands on."""
        for name in put_back_functions():
            self.problems[f"{name} was replaced before the check"] = None
        self.probe_call = self.reference.probe()
        if self.candidate_state is not self.baseline_state:
            # A module of its own has run as often as the baseline's before the first comparison.
            with suppress(Exception):
                run_call(self.candidate, shifted_copy(self.reference.probe_inputs, self.places), self.candidate_state)
            self.candidate_state.begin_here()

    def run(self, seed: int) -> bool:
        """Compare both on the inputs of one seed; False when there is no point in going on."""
        inputs = redraw(self.reference.drawn_from, seed)
        versions = self.candidate_state.parameter_versions()
        num_threads = torch.get_num_threads()
        _poison(self.probe_call)
        torch.manual_seed(seed)
        try:
            found = run_call(self.candidate, shifted_copy(inputs, self.places), self.candidate_state)
            synchronize(self.device)
        except Exception as error:
            self.problems[f"the candidate raised {first_line(error)}"] = None
            self.is_runnable = False
            return False
        finally:
            for name in put_back_functions():
                self.problems[f"the candidate replaces {name}"] = None
        if self.candidate_state.parameter_versions() != versions:
            self.problems["the candidate writes to the model's parameters"] = None
        if torch.get_num_threads() != num_threads:
            self.problems["the candidate changed torch's number of threads"] = None
            torch.set_num_threads(num_threads)
        self._hold_last_output(found)
        answer = self.reference.answer(seed, inputs)
        self.written_names |= set(found.state_after) | set(answer.wanted.state_after)
        self._compare(seed, inputs, found, answer)
        return True

    def _hold_last_output(self, found: Call) -> None:
        """Look at what the call before returned: a caller that kept it must still hold it."""
        if self.last_found is not None:
            for name in overwritten_outputs(self.last_found):
                if name not in self.reference.may_overwrite:
                    self.problems[f"{name} of one call is overwritten by the next"] = None
        self.last_found = found

    def _compare(self, seed: int, inputs: Inputs, found: Call, answer: Answer) -> None:
        wanted = answer.wanted
        self.candidate_prints[seed] = fingerprint(found.values)
        self.baseline_prints[seed] = answer.prints
        self.is_input_sensitive |= self.reference.depends_on_inputs(inputs, wanted)
        differences = layout_problems(found, wanted)
        self.problems.update(dict.fromkeys(differences))
        if not _are_comparable(found, wanted):
            self._compare_effects(inputs, found, answer)
            self.matches.append([("", LeafMatch(0.0, self.required_share, 0, 0.0))])
            return
        self._compare_effects(inputs, found, answer)
        matches = []
        for index, (layout, out, ref) in enumerate(zip(found.layouts, found.values, wanted.values, strict=True)):
            if isinstance(ref, torch.Tensor):
                truth = answer.truths[index] if answer.truths is not None else None
                rtol = max(rtol_of(ref.dtype), self.least_rtol)
                leaf = match(out, ref, truth, rtol=rtol, required_share=self.required_share)
                matches.append((f"output{layout.path}", leaf))
        self.matches.append(matches)
        self._compare_top1(found, wanted)

    def _compare_effects(self, inputs: Inputs, found: Call, answer: Answer) -> None:
        wanted = answer.wanted
        given, have, want = (dict(tensors(value)) for value in (inputs, found.inputs_after, wanted.inputs_after))
        written: list[Written] = []
        for path in dict.fromkeys([*given, *have, *want]):
            after, after_baseline = have.get(path), want.get(path)
            if after is None or after_baseline is None:
                self._add_effect_problem(f"input{path}")
                continue
            # What an empty cache holds after the call was nowhere before.
            before = given[path] if path in given else after.new_empty(0)
            if is_untouched(before, after_baseline):
                if not is_untouched(before, after):
                    self._add_effect_problem(f"input{path}")
                continue
            truth = answer.true_inputs.get(path)
            entry = written_part(f"input{path}", before, after, after_baseline, truth)
            if entry is None:
                self._add_effect_problem(f"input{path}")
            else:
                written.append(entry)
        strays: dict[str, torch.Tensor] = {}
        for name in sorted(set(found.state_after) | set(wanted.state_after)):
            before, after_baseline = wanted.state_after.get(name) or (found.state_after[name][0],) * 2
            _, after = found.state_after.get(name) or (before, before)
            entry = written_part(f"state {name}", before, after, after_baseline, answer.true_state.get(name))
            if entry is None:
                self._add_effect_problem(f"state {name}")
                continue
            written.append(entry)
            is_stray = stray_mask(before, after, after_baseline)
            if bool(is_stray.any()):
                strays[name] = is_stray
        self._judge_strays(inputs, strays)
        problem = state_problem(written, least_rtol=self.least_rtol, required_share=self.required_share)
        if problem:
            self.are_inputs_unchanged = False
            self.problems[problem] = None

    def _add_effect_problem(self, what: str, reason: str = "") -> None:
        self.are_inputs_unchanged = False
        self.problems[f"{what} is left different from what the baseline leaves{reason}"] = None

    def _judge_strays(self, inputs: Inputs, strays: dict[str, torch.Tensor]) -> None:
        """Refuse changes to elements that the baseline does not write; the others are judged by their values."""
        if not strays:
            return
        try:
            masks = written_elements(self.reference.baseline, shifted_copy(inputs), self.baseline_state, strays)
        except Exception as error:
            self.notes[f"the baseline does not run on nudged state: {first_line(error)}"] = None
            masks = {}
        for name, is_stray in strays.items():
            num_strays = int((is_stray & ~masks[name] if name in masks else is_stray).sum())
            if num_strays:
                self._add_effect_problem(f"state {name}", f": {num_strays} elements that it does not write")

    def _compare_top1(self, found: Call, wanted: Call) -> None:
        if self.workload.phase is None:
            return
        for out, ref in zip(found.values, wanted.values, strict=True):
            is_logits = isinstance(ref, torch.Tensor) and ref.is_floating_point() and ref.dim() in (2, 3)
            if is_logits and ref.shape[-1] >= _MIN_LOGITS and ref.numel():
                share = float((out.argmax(-1) == ref.argmax(-1)).double().mean())
                self.top1_agreement = min(share, 1.0 if self.top1_agreement is None else self.top1_agreement)
                return

    def is_near_miss(self) -> bool:
        """Say whether the error alone stands between the candidate and equivalence, and not by much."""
        worst = self._worst_errors()
        if worst is None or not worst.is_too_large or not self.is_runnable or self.problems or self._value_problems():
            return False
        most = _NEAR_MISS_RATIO_OF_FEW if worst.rounding else _NEAR_MISS_RATIO
        return worst.error <= most * worst.baseline_error

    def has_few_numbers(self) -> bool:
        """Say whether the output that is furthest over its limit has few numbers."""
        worst = self._worst_errors()
        return worst is not None and worst.rounding > 0.0

    def _worst_errors(self) -> _Errors | None:
        """Errors of all seeds of each output; of these the output that is furthest over its limit."""
        found: dict[str, list[_Errors]] = {}
        for matches in self.matches:
            for name, leaf in matches:
                if leaf.error is not None and leaf.baseline_error is not None:
                    found.setdefault(name, []).append(_Errors(leaf.error, leaf.baseline_error, leaf.rounding))
        return max(map(_Errors.of_seeds, found.values()), key=lambda errors: errors.error / errors.limit, default=None)

    def _value_problems(self) -> list[str]:
        problems: Counter[str] = Counter()
        for matches in self.matches:
            for name, leaf in matches:
                if leaf.problem:
                    problems[f"{name}: {leaf.problem}"] += 1
                elif leaf.share < leaf.required_share:
                    problems[f"{name}: {leaf.share:.4%} of elements match, {leaf.required_share:.4%} must"] += 1
        return list(problems)

    def restore(self) -> None:
        """Leave both modules as they were, and restore from now on only what a call writes."""
        for state in (self.baseline_state, self.candidate_state):
            state.put_back()
            state.limit_to(self.written_names)

    def verified(self) -> Verified:
        """Assemble the contract."""
        worst = min(
            (leaf for matches in self.matches for _, leaf in matches),
            key=lambda leaf: leaf.share - leaf.required_share,
            default=None,
        )
        errors = self._worst_errors()
        problems = list(self.problems) + self._value_problems()
        if self.reference.precision_track == "exact" and errors is not None:
            if errors.is_too_large:
                problems.append(errors.problem())
            elif errors.is_within_rounding_only:
                self.notes[f"an error of {errors.rounding:.3g} is one rounding, and counts as none"] = None
        if self.matches and not self.is_input_sensitive:
            problems.append(
                "the output does not depend on the input (a last layer of zeros, as some models begin with?): "
                "equivalence would prove nothing"
            )
        if any(leaf.is_judged_by_oracle for matches in self.matches for _, leaf in matches):
            self.notes["eager itself misses the share against fp64: the candidate's share against fp64 decided"] = None
        elif errors is not None:
            self.notes["elements were held against the baseline and against fp64"] = None
        equivalence = Equivalence(
            is_equivalent=not problems,
            match_share=worst.share if worst else 0.0 if not self.is_runnable else 1.0,
            required_share=worst.required_share if worst else self.required_share,
            rtol=max([*self.reference.rtols, self.least_rtol]) or RTOL[torch.float64],
            num_seeds=len(self.matches),
            num_elements=sum(leaf.num_elements for matches in self.matches for _, leaf in matches),
            max_abs_error=max((leaf.max_abs_error for m in self.matches for _, leaf in m), default=None),
            error_vs_fp64=errors.error if errors else None,
            baseline_error_vs_fp64=errors.baseline_error if errors else None,
            error_ratio=errors.ratio if errors else None,
            top1_agreement=self.top1_agreement,
            are_inputs_unchanged=self.are_inputs_unchanged,
            problems=tuple(problems),
            oracle_note="; ".join({**self.reference.notes, **self.notes}) or None,
        )
        return Verified(
            equivalence, self.is_runnable, self.candidate_prints, self.baseline_prints, self.reference.rtols,
            self.candidate_state, self.baseline_state,
        )  # fmt: skip


def _are_comparable(found: Call, wanted: Call) -> bool:
    """Values can be compared when the structure, the shapes and the dtypes agree; strides and aliases do not matter."""
    have = [(layout.path, layout.type_name, layout.shape, layout.dtype) for layout in found.layouts]
    return have == [(layout.path, layout.type_name, layout.shape, layout.dtype) for layout in wanted.layouts]


def _poison(call: Call) -> None:
    """Fill and free blocks of the outputs' sizes: a candidate that reads what it never wrote then reads NaN."""
    blocks = []
    for value in call.values:
        if isinstance(value, torch.Tensor) and value.numel():
            poison = float("nan") if value.is_floating_point() else True if value.dtype == torch.bool else 113
            blocks += [torch.full_like(value, poison) for _ in range(2)]
    blocks.clear()
