"""The seven stages, in order, over the state that they share. Each stage files its result in one run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from agnitra_lab.benchmark import compare as comparing
from agnitra_lab.benchmark import winner as contest
from agnitra_lab.benchmark.reference import Reference
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.events import Event, EventName
from agnitra_lab.contracts.graph import WorkloadProfile, WorkloadType
from agnitra_lab.contracts.kernel import Kernel, KernelSource, Site
from agnitra_lab.contracts.measurement import CandidateResult, Comparison
from agnitra_lab.contracts.report import Checkpoint, Region, StageName
from agnitra_lab.contracts.run import Kind, Meta
from agnitra_lab.contracts.search import KernelConfig, SearchResult, Trial
from agnitra_lab.contracts.suggestion import Proposal, Suggestion
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device import info
from agnitra_lab.device.peaks import measure_peaks
from agnitra_lab.errors import AgnitraError
from agnitra_lab.generate import kernels as templates
from agnitra_lab.generate.registry import is_available as why_no_kernels
from agnitra_lab.graph import semantics
from agnitra_lab.graph.cost import read_once_bytes
from agnitra_lab.loop import filing, preflight, undisturbed
from agnitra_lab.loop.advice import Advice
from agnitra_lab.loop.adviser import Adviser
from agnitra_lab.loop.chooser import Chooser
from agnitra_lab.loop.earlier import Earlier, StaleRecordError
from agnitra_lab.loop.kernel_lab import KernelLab
from agnitra_lab.loop.refinement import Refinement
from agnitra_lab.loop.regions import explain
from agnitra_lab.loop.rehearsal import Rehearsal
from agnitra_lab.loop.result import Result
from agnitra_lab.loop.settings import Settings
from agnitra_lab.loop.site_survey import SiteSurvey, find_sites
from agnitra_lab.patch import candidates, toolchain
from agnitra_lab.patch.install import Patch
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.report import assemble, page
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import Run, RunStore

Progress = Callable[[Checkpoint], None]
Tell = Callable[[str], None]
"""Gets what is being done within a stage, in a few words."""
# The FLOPs of the original graph are no floor for a candidate that provably needs fewer.
_DOES_LESS_WORK = frozenset({"linear_algebra", "last_token_head", "attention_by_hand", "sdpa_backend"})
_PRODUCTS_OF_A_SPLIT = 3
_LEAST_REHEARSAL_S = 120.0


class Optimization:
    """One pass of the loop over one workload. Call the stages in order, or `run_all`; `redo.redo` begins again midway.

    Attributes:
        on_checkpoint: called after each stage.
        on_progress: called with what a stage is doing; None asks for silence.
        on_trial: called with each kernel config that a search has measured, and its place.
    """

    def __init__(self, workload: Workload, settings: Settings, on_checkpoint: Progress | None = None) -> None:
        store = RunStore(settings.artifacts)
        preflight.check_machine(store)
        preflight.check_comparable(workload)
        self.workload = workload
        self.settings = settings
        # A recording that cannot be read, or a budget without a price, is known before anything runs.
        self._adviser = Adviser(settings)
        self.checkpoints: list[Checkpoint] = []
        self.on_checkpoint = on_checkpoint
        self.on_progress: Tell | None = None
        self.on_trial: Callable[[Site, Trial], None] | None = None
        self.device = info.device_of(workload.model, workload.args, workload.kwargs)
        candidates.check_name(settings.only, self.device.type)
        self.device_info: DeviceInfo = info.describe(self.device)
        self.run: Run = store.create("optimize", workload.name)
        self.reference = Reference(workload)
        self.telemetry: Telemetry
        self.profile_of_workload = WorkloadProfile(workload_type=WorkloadType.UNKNOWN, patterns=(), confidence=0.0)
        self.proposal: Proposal
        self.advice: Advice | None = None
        self.searches: list[SearchResult] = []
        self.kernels = templates.KernelBook()
        self.tuned: Mapping[Site, KernelConfig] = {}
        self.refused: Mapping[Site, str] = {}
        self.ledgers: Mapping[Site, bytes] = {}
        self.lab = KernelLab(self.device) if self.device.type == "cuda" and settings.sampler is not None else None
        self.surveyed = SiteSurvey()
        self.patches: dict[str, Patch] = {}
        self.results: list[CandidateResult] = []
        self.winner: CandidateResult | None = None
        self.comparison: Comparison
        self.against_best: Comparison | None = None
        self.peaks: DevicePeaks | None = None
        self.tried: dict[str, tuple[candidates.Candidate, float]] = {}
        self.earlier = Earlier(workload, settings, self.device_info)
        self.earlier.remind()
        self.emit("run.started", workload=workload.name, device=self.device_info.name)

    def run_all(self) -> Result:
        """Run the seven stages."""
        try:
            self.profile()
            self.suggest()
            self.refine()
            self.generate()
            self.patch()
            self.benchmark()
            return self.report()
        finally:
            self.close()

    # --- the stages, in order ---

    def profile(self) -> Telemetry:
        """Find out where the time goes, and tie it to the graph."""
        started = time.monotonic()
        self._tell("running the model with the profiler on")
        self.telemetry = undisturbed.profile(self.workload, name=self.workload.name)
        if self.telemetry.graph is not None:
            self.profile_of_workload = semantics.analyse(self.telemetry.graph, self.workload.phase)
        filing.file_profile(self.run, self.telemetry)
        record = self.telemetry.record
        top = record.bottleneck
        where = (
            f"{top.op} at {top.node or top.module_path or 'no graph node'} takes {top.share or 0:.0%}" if top else "-"
        )
        wall = f"{record.wall_ms:.3f} ms a call" if record.wall_ms else "not timed"
        self._checkpoint("profile", f"{wall}; {where}", started)
        return self.telemetry

    def suggest(self) -> Proposal:
        """Ask for things to try: the language model where there is one, presets otherwise."""
        started = time.monotonic()
        self._tell("asking the rewrites what they find, and for advice")
        toolchain.warm_up(self.device.type)
        self.surveyed = self.earlier.surveyed() or find_sites(self.workload, self.device)
        is_measured = self.lab is not None and why_no_kernels() is None
        self.advice = self._adviser.ask(
            self.telemetry.record, self.profile_of_workload, self.device_info, self.surveyed.findable,
            self.surveyed.sites, is_measured=is_measured, peaks=lambda: measure_peaks(self.device, self._dtype()),
        )  # fmt: skip
        self.proposal = self.advice.rounds.proposal
        filing.file_proposal(self.run, self.proposal)
        fallback = self.proposal.fallback
        if fallback is not None:
            self.emit("optimization.fallback", reason=fallback.reason, detail=fallback.detail)
        names = ", ".join(suggestion.action for suggestion in self.proposal.suggestions) or "nothing to try"
        line = f"{names} (from {self.proposal.model or self.proposal.source})"
        line += f"; the graph as in run {self.earlier.run_id}" if self.earlier.run_id else ""
        status: Literal["done", "fallback"] = "fallback" if fallback else "done"
        self._checkpoint("suggest", fallback.banner + "; " + line if fallback else line, started, status)
        return self.proposal

    def refine(self) -> list[SearchResult]:
        """Search the kernel configs: on the GPU by measuring, on a CPU by replaying recorded measurements."""
        started = time.monotonic()
        found = self._sites()
        if self.settings.sampler is None or not found:
            reason = "kernel search is off" if found else "no kernel template fits this graph"
            self._checkpoint("refine", reason, started, "skipped")
            return self.searches
        refining = self._new_refinement()
        self.searches, notes = refining.run(found, self._apart())
        if self.advice is not None and self.advice.num_measured:
            self.proposal = self.advice.rounds.proposal
            filing.file_proposal(self.run, self.proposal)
            notes = [*filter(None, [self.advice.note]), *notes]
        self.tuned, self.refused = refining.tuned, refining.refused
        self.ledgers = refining.ledgers
        if self.lab is not None:
            self.lab.prepare_launches(self.surveyed.launches, self.tuned)
        filing.file_searches(self.run, self.searches, self.ledgers)
        self._checkpoint("refine", "; ".join(notes), started, "done" if notes else "skipped")
        return self.searches

    def generate(self) -> list[Kernel]:
        """Render the best config of each site as a Triton kernel; the sources are filed by content hash."""
        started = time.monotonic()
        self.kernels = templates.KernelBook(self.tuned, refused=self.refused)
        apart = self._apart()
        sites = (
            [Site(result.space_template, result.shape, result.dtype) for result in self.searches]
            if why_no_kernels()
            else [site for site in self._sites() if site in self.tuned or site not in apart]
        )
        for site in sites:
            self.kernels(site.template, site.shape, site.dtype)
        made = self.kernels.kernels
        filing.file_kernels(self.run, made)
        refusal = why_no_kernels()
        line = ", ".join(kernel.name for kernel in made) or "no kernel to render"
        self._checkpoint(
            "generate",
            f"{line}; not installed: {refusal}" if refusal and made else line,
            started,
            "done" if made else "skipped",
        )
        return made

    def patch(self) -> dict[str, Patch]:
        """Compile the candidates within the budget, each judged as it comes; the best so far is usable throughout."""
        started = time.monotonic()
        actions = [suggestion.action for suggestion in self.accepted]
        kernels = None if why_no_kernels() else self.kernels
        late = self._new_refinement()
        self._tell("measuring the device's ceilings")
        self.peaks = measure_peaks(self.device, self._dtype())
        with self._rehearsing(kernels) as rehearse:
            chooser = Chooser(
                candidates.Plan(actions, self.device.type, only=self.settings.only),
                lambda candidate: self._build(candidate, kernels, late),
                lambda name, patch: self._judge(name, patch, self.settings.timing_s / 2, is_brief=True),
                budget_s=self.settings.budget_s,
                limit_ms=self._limit_ms(),
                rehearse=rehearse,
                earlier=self.earlier,
            )
            self.patches, self.results, self.tried = chooser.patches, chooser.results, chooser.tried
            try:
                chooser.run()
            except StaleRecordError:
                return self._patch_anew()
        if late.found_late:
            self.searches = [*self.searches, *late.found_late]
            filing.file_searches(self.run, late.found_late, late.ledgers)
            filing.file_kernels(self.run, self.kernels.kernels)
        filing.file_patches(self.run, self.patches)
        counts = [len(patch.log().descriptors) for name, patch in self.patches.items() if name.startswith("agnitra")]
        changes = f"{max(counts, default=0)} graph changes"
        num_built = sum(result.status in ("kept", "rejected") for result in self.results)
        self._checkpoint("patch", f"{num_built} candidate{'s' * (num_built != 1)} compiled, {changes}", started)
        return self.patches

    def benchmark(self) -> list[CandidateResult]:
        """Hold the finalists against each other, then the winner against eager once more, for longer."""
        started = time.monotonic()
        final = self._choose_winner()
        confirmed = self.winner.comparison if self.winner else None
        self.comparison = confirmed or contest.best_attempt(self.results)
        self.against_best = self._against_best_mode(final)
        self.results = contest.pass_over(self.results, self.winner, final)
        filing.file_comparisons(self.run, self.results)
        self._checkpoint("benchmark", assemble.headline(self.comparison, self.winner_name), started)
        return self.results

    def report(self) -> Result:
        """Write the report card, the JSON artifacts and the usage event, and finish the run."""
        started = time.monotonic()
        explained = self._explain()
        filing.file_certificate(self.run, self.comparison, self.patches.get(self.winner_name))
        self.close()
        self._checkpoint("report", f"run {self.run.run_id}", started)
        winner = self.patches.get(self.winner_name)
        finished = filing.build_report(
            run_id=self.run.run_id,
            workload=self.workload,
            settings=self.settings,
            device=self.device_info,
            peaks=self.peaks,
            winner=self.winner_name,
            comparison=self.comparison,
            results=self.results,
            # What the profile's own card draws is in its telemetry.json, and would double the report's.
            telemetry=self.telemetry.record.model_copy(update={"nodes": (), "hotspots": (), "timeline": None}),
            proposal=self.proposal,
            searches=self.searches,
            log=winner.log() if winner else None,
            refusals=filing.refusals_of(self.patches, self.winner_name),
            checkpoints=self.checkpoints,
            against_best=self.against_best,
            regions=explained,
        )
        self.run.write_json("reports", "usage_event.json", finished.usage)
        self.run.write_json("reports", "report.json", finished)
        self.run.write_text("reports", "report.html", page.page_html(finished))
        self.emit("usage.attach", **finished.usage.model_dump(mode="json"))
        self.emit("optimization.completed", winner=finished.winner, verdict=finished.comparison.verdict)
        intended = filing.budget(self.workload, self.settings, self.profile_of_workload)
        self.run.finish_all(summary.optimization_summaries(finished, self._meta, budget=intended))
        kept = self.winner.name if self.winner else None
        self.earlier.keep(self.run.run_id, self.surveyed, self.tried, self.results, kept)
        self.patches.clear()
        return Result(finished, self.run, self.telemetry, self.workload, winner)

    def close(self) -> None:
        """End what runs beside the loop."""
        if self.lab is not None:
            self.lab.close()

    def finish_early(self) -> None:
        """File the profile and the suggestions of a run that stops before the patch stage."""
        results = summary.profile_results(self.telemetry.record)
        filed = summary.summarise(self._meta("profile"), results), summary.summarise(self._meta("report"), results)
        self.run.finish_all(
            {
                "profiles": (filed[0], run_markdown(filed[0], f"Profile of {self.workload.name}.")),
                "reports": (filed[1], run_markdown(filed[1], f"What to try on {self.workload.name}.")),
            }
        )

    # --- what the stages share ---

    @property
    def winner_name(self) -> str:
        """Name of the kept candidate, "eager" when there is none."""
        return self.winner.name if self.winner else "eager"

    @property
    def accepted(self) -> tuple[Suggestion, ...]:
        """The suggestions that the later stages take up: all of them unless the settings name some."""
        chosen = self.settings.accept
        return tuple(each for each in self.proposal.suggestions if chosen is None or each.action in chosen)

    def emit(self, event: EventName, **payload: Any) -> None:
        """Append one structured event to the run."""
        stamp = provenance.utc_now()
        self.run.append_event(Event(event=event, timestamp=stamp, run_id=self.run.run_id, payload=payload))

    def _checkpoint(
        self, stage: StageName, headline: str, started: float, status: Literal["done", "skipped", "fallback"] = "done"
    ) -> None:
        point = Checkpoint(stage=stage, status=status, headline=headline, wall_s=time.monotonic() - started)
        self.checkpoints.append(point)
        self.emit("stage.completed", stage=stage, status=status, headline=headline)
        if self.on_checkpoint:
            self.on_checkpoint(point)

    def _sites(self) -> list[Site]:
        """Every place where a suggested template would go, most frequent first."""
        asked = {suggestion.action for suggestion in self.accepted}
        is_replayed = why_no_kernels() is not None
        return [site for site in self.surveyed.sites if is_replayed or site.template in asked]

    def _apart(self) -> Collection[Site]:
        """Sites that candidates with all changes do without; where no kernel is measured there are none."""
        return self.surveyed.apart({suggestion.action for suggestion in self.accepted}) if self.lab is not None else ()

    def _new_refinement(self) -> Refinement:
        return Refinement(
            self.settings, self.device_info, self.lab, self.accepted, self.advice, on_trial=self._note_trial
        )

    def _tell(self, what: str) -> None:
        if self.on_progress:
            self.on_progress(what)

    def _note_trial(self, site: Site, trial: Trial) -> None:
        if self.on_trial:
            self.on_trial(site, trial)

    def _build(self, candidate: candidates.Candidate, kernels: KernelSource | None, late: Refinement) -> Patch:
        self._tell(f"compiling {candidate.name}")
        # Only while a candidate is built: a drop-in that meets new shapes later asks nobody.
        self.kernels.find = late.find if self.lab is not None else None
        try:
            patch = candidates.build(self.workload, candidate, kernels)
        finally:
            self.kernels.find = None
        try:
            self.earlier.check(patch)
        except StaleRecordError:
            patch.discard()
            raise
        return patch

    @contextmanager
    def _rehearsing(self, kernels: templates.KernelBook | None) -> Iterator[Rehearsal | None]:
        """Give the process in which candidates are tried first, where that was asked for."""
        if not self.settings.is_isolated:
            yield None
            return
        given = self.settings
        rehearsal = Rehearsal(
            self.workload, None if kernels is None else kernels.tuned, self.refused, timing_s=given.timing_s / 2,
            peaks=self.peaks, deadline_s=max(given.budget_s, _LEAST_REHEARSAL_S),
        )  # fmt: skip
        try:
            yield rehearsal
        finally:
            rehearsal.close()

    def _patch_anew(self) -> dict[str, Patch]:
        """Run everything again up to here: the model is not the one that an earlier run knew."""
        self.earlier.forget()
        self.checkpoints.clear()
        for patch in self.patches.values():
            patch.discard()
        for stage in (self.profile, self.suggest, self.refine, self.generate):
            stage()
        return self.patch()

    def _compare(self, name: str, patch: Patch, budget_s: float, *, is_brief: bool) -> Comparison:
        self._tell(f"checking and timing {name}")
        does_less = any(change.action in _DOES_LESS_WORK for change in patch.log().descriptors)
        return comparing.compare(
            self.workload, patch.model, candidate_name=name, budget_s=budget_s, peaks=self.peaks,
            floor_ms=None if does_less else self._floor_ms(), reference=self.reference, is_brief=is_brief,
        )  # fmt: skip

    def _judge(self, name: str, patch: Patch, budget_s: float, *, is_brief: bool = False) -> CandidateResult:
        try:
            compared = self._compare(name, patch, budget_s, is_brief=is_brief)
            return contest.judge(name, compared, patch.log().compile_s)
        except AgnitraError as error:
            return CandidateResult(name=name, status="failed", reason=str(error)[:500], compile_s=patch.compile_s)

    def _choose_winner(self) -> Comparison | None:
        """Hold the two fastest candidates against each other, then measure the better one again, for longer.

        The best of several first measurements flatters itself, and two first measurements share no moment in time. One
        that is not confirmed makes way for the next.

        Returns:
            The finalists head to head; None when fewer than two candidates are, or may be, faster than eager.
        """
        ranked = contest.contenders(self.results)
        final = None
        if len(ranked) > 1 and not contest.is_clear(ranked[0], ranked[1]):
            final = self._head_to_head(ranked[0].name, ranked[1].name)
            ranked = contest.after(final, ranked)
        names = [result.name for result in ranked if result.name in self.patches]
        self.results, self.winner = contest.confirm(
            self.results,
            names,
            lambda name, times: self._judge(name, self.patches[name], times * self.settings.timing_s),
        )
        return final

    def _against_best_mode(self, final: Comparison | None) -> Comparison | None:
        """Hold the winner against the fastest plain torch.compile mode, where the winner is not one itself."""
        modes = [result for result in self.results if result.name.startswith("torch.compile")]
        rival = next(iter(contest.ranking(modes)), None)
        if self.winner is None or rival is None or rival.name == self.winner.name or rival.name not in self.patches:
            return None
        if final is not None and (final.candidate, final.baseline) == (self.winner.name, rival.name):
            return final
        return self._head_to_head(self.winner.name, rival.name)

    def _head_to_head(self, candidate: str, baseline: str) -> Comparison:
        verified = next(result.comparison for result in self.results if result.name == candidate)
        assert verified is not None
        self._tell(f"timing {candidate} against {baseline}")
        return comparing.head_to_head(
            self.workload, self.patches[candidate].model, self.patches[baseline].model, candidate_name=candidate,
            baseline_name=baseline, equivalence=verified.equivalence, budget_s=self.settings.timing_s,
        )  # fmt: skip

    def _limit_ms(self) -> float | None:
        """Least time of one call: FLOPs at the matrix peak, or one read of the weights that every call reads."""
        bandwidth = self.peaks.copy_bandwidth_gb_per_s if self.peaks else None
        weights_ms = read_once_bytes(self.workload.model) / (bandwidth * 1e6) if bandwidth else 0.0
        return self._believed_ms(max(self._floor_ms() or 0.0, weights_ms))

    def _believed_ms(self, least_ms: float) -> float | None:
        """Return a least time that eager itself does not undercut: on a busy machine ceilings are measured too low."""
        eager_ms = self.telemetry.record.wall_ms
        return least_ms if least_ms and (eager_ms is None or eager_ms >= least_ms) else None

    def _floor_ms(self) -> float | None:
        flops, rate = self.profile_of_workload.total_flops, self.peaks.gemm_tflop_per_s if self.peaks else None
        if rate and self.peaks and self.peaks.gemm_dtype == "float32" and self.device.type == "cuda":
            # fp32's own peak is of the CUDA cores; three half-precision products with fp32's error go past it.
            halves = measure_peaks(self.device, torch.float16).gemm_tflop_per_s or 0.0
            rate = max(rate, halves / _PRODUCTS_OF_A_SPLIT)
        return self._believed_ms(flops / (rate * 1e12) * 1e3) if flops and rate else None

    def _explain(self) -> tuple[Region, ...]:
        winner = self.patches.get(self.winner_name)
        if winner is None or not self.settings.is_explained:
            return ()
        try:
            return explain(
                self.workload, self.telemetry, winner.model, winner.log().descriptors, peaks=self.peaks,
                device=self.device_info, folder=self.run.directory("profiles") / "after",
            )  # fmt: skip
        except Exception as error:
            # The answer stands without it: whatever a profiler does to a replay must not cost a finished run.
            warnings.warn(f"The report has no times by part of the model: {error}", stacklevel=2)
            return ()
        finally:
            self.reference.state.put_back()

    def _meta(self, kind: Kind) -> Meta:
        return filing.meta(self.run.run_id, kind, self.workload, self.settings, self.device_info)

    def _dtype(self) -> torch.dtype:
        parameters = getattr(self.workload.model, "parameters", None)
        return next((t.dtype for t in (parameters() if parameters else ()) if t.is_floating_point()), torch.float32)
