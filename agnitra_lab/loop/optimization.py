"""The seven stages, in order, over the state that they share. Each stage files its result in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from agnitra_lab.benchmark import compare as comparing
from agnitra_lab.benchmark import winner as contest
from agnitra_lab.benchmark.timing import measure_kernel
from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.events import Event, EventName
from agnitra_lab.contracts.graph import WorkloadProfile, WorkloadType
from agnitra_lab.contracts.kernel import Kernel, Site
from agnitra_lab.contracts.measurement import CandidateResult, Comparison
from agnitra_lab.contracts.report import Checkpoint, StageName
from agnitra_lab.contracts.run import Kind, Meta
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.device import info
from agnitra_lab.device.peaks import measure_peaks
from agnitra_lab.errors import AgnitraError, RollbackError, SearchError
from agnitra_lab.generate import kernels as templates
from agnitra_lab.generate.registry import is_available as why_no_kernels
from agnitra_lab.graph import semantics
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import resolve as resolve_llm
from agnitra_lab.loop import filing, preflight
from agnitra_lab.loop.result import Result
from agnitra_lab.loop.settings import Settings
from agnitra_lab.patch import candidates
from agnitra_lab.patch.install import Patch
from agnitra_lab.patch.survey import survey
from agnitra_lab.profiler import capture
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.refine import replay, search
from agnitra_lab.report import assemble, page
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import Run, RunStore
from agnitra_lab.suggest.propose import propose

Progress = Callable[[Checkpoint], None]


class Optimization:
    """One pass of the loop over one workload. Call the stages in order, or `run_all`."""

    def __init__(self, workload: Workload, settings: Settings, on_checkpoint: Progress | None = None) -> None:
        store = RunStore(settings.artifacts)
        preflight.check_machine(store)
        preflight.check_runs(workload)
        self.workload = workload
        self.settings = settings
        self.checkpoints: list[Checkpoint] = []
        self.on_checkpoint = on_checkpoint
        self.device = info.device_of(workload.model, workload.args, workload.kwargs)
        candidates.check_name(settings.only, self.device.type)
        self.device_info: DeviceInfo = info.describe(self.device)
        self.run: Run = store.create("optimize", workload.name)
        self.telemetry: Telemetry
        self.profile_of_workload = WorkloadProfile(workload_type=WorkloadType.UNKNOWN, patterns=(), confidence=0.0)
        self.proposal: Proposal
        self.searches: list[SearchResult] = []
        self.kernels = templates.KernelBook()
        self._surveyed: list[Site] | None = None
        self.patches: dict[str, Patch] = {}
        self.results: list[CandidateResult] = []
        self.winner: CandidateResult | None = None
        self.comparison: Comparison
        self.against_best: Comparison | None = None
        self.peaks: DevicePeaks | None = None
        self.emit("run.started", workload=workload.name, device=self.device_info.name)

    def run_all(self) -> Result:
        """Run the seven stages."""
        self.profile()
        self.suggest()
        self.refine()
        self.generate()
        self.patch()
        self.benchmark()
        return self.report()

    # --- the stages, in order ---

    def profile(self) -> Telemetry:
        """Find out where the time goes, and tie it to the graph."""
        started = time.monotonic()
        self.telemetry = capture.profile(self.workload, name=self.workload.name)
        if self.telemetry.graph is not None:
            self.profile_of_workload = semantics.analyse(self.telemetry.graph, self.workload.phase)
        self.telemetry.save(self.run.directory("profiles"))
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
        client = self._llm_client()
        self.proposal = propose(
            self.telemetry.record,
            self.profile_of_workload,
            self.device_info,
            client=client,
            is_llm_requested=self.settings.suggest == "llm",
        )
        self.run.write_json("reports", "suggestions.json", self.proposal)
        fallback = self.proposal.fallback
        if fallback is not None:
            self.emit("optimization.fallback", reason=fallback.reason, detail=fallback.detail)
        names = ", ".join(suggestion.action for suggestion in self.proposal.suggestions) or "nothing to try"
        line = f"{names} (from {self.proposal.model or self.proposal.source})"
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
        notes = []
        for site in found:
            try:
                result = self._search(site)
            except SearchError as error:
                # Every config failed: the rule of thumb stands in, and the contest decides whether its kernel runs.
                notes.append(f"{site.template}: {error.message}")
                continue
            if result is None:
                notes.append(f"{site.template}: no measurements for this device")
                continue
            self.searches.append(result)
            best = result.best
            if best is not None and best.latency_ms is not None:
                found_at = Site(result.space_template, result.shape, result.dtype).key()
                notes.append(
                    f"{found_at}: {best.latency_ms * 1000:.1f} us after "
                    f"{len(result.trials)} of {result.num_configs} configs, {result.measured_on}"
                )
        self._checkpoint("refine", "; ".join(notes), started, "done" if self.searches else "skipped")
        return self.searches

    def generate(self) -> list[Kernel]:
        """Render the best config of each site as a Triton kernel; the sources are filed by content hash."""
        started = time.monotonic()
        self.kernels = templates.KernelBook(
            {
                Site(result.space_template, result.shape, result.dtype): result.best.config
                for result in self.searches
                if result.best is not None
            }
        )
        sites = (
            [Site(result.space_template, result.shape, result.dtype) for result in self.searches]
            if why_no_kernels()
            else self._sites()
        )
        for site in sites:
            self.kernels(site.template, site.shape, site.dtype)
        made = self.kernels.kernels
        for kernel in made:
            self.run.write_text("perf", f"kernels/{kernel.name}.py", kernel.source)
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
        """Compile the candidates, within the budget."""
        started = time.monotonic()
        actions = [suggestion.action for suggestion in self.proposal.suggestions]
        kernels = None if why_no_kernels() else self.kernels
        for candidate in candidates.plan(actions, self.device.type, only=self.settings.only):
            spent_s, budget_s = time.monotonic() - started, self.settings.budget_s
            if spent_s >= budget_s:
                reason = f"{spent_s:.0f} s of {budget_s:.0f} s for compiling are spent"
                self.results.append(CandidateResult(name=candidate.name, status="skipped", reason=reason))
                continue
            try:
                self.patches[candidate.name] = candidates.build(self.workload, candidate, kernels)
            except AgnitraError as error:
                self.results.append(CandidateResult(name=candidate.name, status="failed", reason=str(error)[:500]))
        for name, patch in self.patches.items():
            self.run.write_json("perf", f"patches/{_file_stem(name)}.json", patch.log())
        ours = [patch.log() for name, patch in self.patches.items() if name.startswith("agnitra")]
        changes = f"{max((len(log.descriptors) for log in ours), default=0)} graph changes"
        self._checkpoint("patch", f"{len(self.patches)} candidates compiled, {changes}", started)
        return self.patches

    def benchmark(self) -> list[CandidateResult]:
        """Check and time every candidate against eager, then the winner once more, for longer."""
        started = time.monotonic()
        self.peaks = measure_peaks(self.device, self._dtype())
        for name, patch in self.patches.items():
            self.results.append(self._judge(name, patch, self.settings.timing_s))
        final = self._choose_winner()
        self.comparison = self.winner.comparison if self.winner and self.winner.comparison else self._best_attempt()
        self.against_best = self._against_best_mode(final)
        self.results = contest.pass_over(self.results, self.winner, final)
        for result in self.results:
            if result.comparison is not None:
                self.run.write_json("bench", f"comparisons/{_file_stem(result.name)}.json", result.comparison)
        self._checkpoint("benchmark", assemble.headline(self.comparison, self.winner_name), started)
        return self.results

    def report(self) -> Result:
        """Write the report card, the JSON artifacts and the usage event, and finish the run."""
        started = time.monotonic()
        self._file_certificate()
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
            checkpoints=self.checkpoints,
            against_best=self.against_best,
        )
        self.run.write_json("reports", "usage_event.json", finished.usage)
        self.run.write_json("reports", "report.json", finished)
        self.run.write_text("reports", "report.html", page.page_html(finished))
        self.emit("usage.attach", **finished.usage.model_dump(mode="json"))
        self.emit("optimization.completed", winner=finished.winner, verdict=finished.comparison.verdict)
        intended = filing.budget(self.workload, self.settings, self.profile_of_workload)
        self.run.finish_all(summary.optimization_summaries(finished, self._meta, budget=intended))
        self.patches.clear()
        return Result(finished, self.run, self.telemetry, self.workload, winner)

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

    def _llm_client(self) -> ChatClient | None:
        given = self.settings
        if given.suggest == "preset":
            return None
        resolved = resolve_llm(given.llm_base_url, given.llm_api_key, given.llm_model, given.llm_deadline_s)
        return ChatClient(resolved) if resolved else None

    def _sites(self) -> list[Site]:
        """Every place where a suggested template would go, most frequent first."""
        if self._surveyed is None:
            book = templates.KernelBook(is_survey=True)
            asked = [suggestion.action for suggestion in self.proposal.suggestions]
            # What measures backends leaves the shapes of the other sites alone.
            survey(self.workload, [action for action in asked if action != "sdpa_backend"], book)
            ranked = [site for site, _ in book.sites.most_common()]
            # A replay answers for the nearest recorded shape: one site a template says all that it can.
            if why_no_kernels() is not None:
                ranked = list({site.template: site for site in reversed(ranked)}.values())
            self._surveyed = ranked
        return self._surveyed

    def _search(self, site: Site) -> SearchResult | None:
        given = self.settings
        if why_no_kernels() is None:
            measured_site, space = site, templates.space_of(site)
            measure = templates.measure_on(self.device, site, measure_kernel)
            measured_on = self.device_info.name
        else:
            landscape = replay.nearest(site.template, site.shape)  # type: ignore[arg-type]
            if landscape is None:
                return None
            recorded = replay.load(landscape)
            space, measure, measured_on = recorded.space, recorded.measure, f"recorded: {recorded.device_name}"
            measured_site = replace(site, shape=recorded.shape, dtype=recorded.dtype)
        seeds = templates.seed_configs(measured_site, self.proposal.suggestions)
        result = search.search(
            space, measure, sampler=given.sampler or "rl", max_trials=given.max_trials, seed=given.seed, seeds=seeds,
            measured_on=measured_on,
        )  # fmt: skip
        self.run.write_json("cmaes", f"trials/{site.key().replace('/', '__')}.json", result)
        return result

    def _compare(self, name: str, model: Callable[..., Any], budget_s: float) -> Comparison:
        return comparing.compare(
            self.workload, model, candidate_name=name, budget_s=budget_s, peaks=self.peaks, floor_ms=self._floor_ms(),
        )  # fmt: skip

    def _judge(self, name: str, patch: Patch, budget_s: float) -> CandidateResult:
        try:
            return contest.judge(name, self._compare(name, patch.model, budget_s), patch.log().compile_s)
        except AgnitraError as error:
            return CandidateResult(name=name, status="failed", reason=str(error)[:500], compile_s=patch.compile_s)

    def _choose_winner(self) -> Comparison | None:
        """Hold the two fastest candidates against each other, then measure the better one again, for longer.

        The best of several first measurements flatters itself, and two first measurements share no moment in time.

        Returns:
            The finalists head to head; None when fewer than two candidates are faster than eager.
        """
        ranked = contest.ranking(self.results)
        final = None
        if len(ranked) > 1:
            final = self._head_to_head(ranked[0].name, ranked[1].name)
            if final.verdict == "slower":
                ranked[0] = ranked[1]
        if ranked:
            name = ranked[0].name
            confirmed = self._judge(name, self.patches[name], 2 * self.settings.timing_s)
            self.results = [confirmed if result.name == name else result for result in self.results]
            self.winner = confirmed if confirmed.status == "kept" else None
        return final

    def _against_best_mode(self, final: Comparison | None) -> Comparison | None:
        """Hold the winner against the fastest plain torch.compile mode, where the winner is not one itself."""
        modes = [result for result in self.results if result.name.startswith("torch.compile")]
        rival = next(iter(contest.ranking(modes)), None)
        if self.winner is None or rival is None or rival.name == self.winner.name:
            return None
        if final is not None and (final.candidate, final.baseline) == (self.winner.name, rival.name):
            return final
        return self._head_to_head(self.winner.name, rival.name)

    def _head_to_head(self, candidate: str, baseline: str) -> Comparison:
        verified = next(result.comparison for result in self.results if result.name == candidate)
        assert verified is not None
        return comparing.head_to_head(
            self.workload, self.patches[candidate].model, self.patches[baseline].model, candidate_name=candidate,
            baseline_name=baseline, equivalence=verified.equivalence, budget_s=self.settings.timing_s,
        )  # fmt: skip

    def _floor_ms(self) -> float | None:
        flops, rate = self.profile_of_workload.total_flops, self.peaks.gemm_tflop_per_s if self.peaks else None
        return flops / (rate * 1e12) * 1e3 if flops and rate else None

    def _best_attempt(self) -> Comparison:
        compared = [result.comparison for result in self.results if result.comparison is not None]
        if not compared:
            reasons = "; ".join(f"{result.name}: {result.reason}" for result in self.results)
            raise AgnitraError(
                f"No candidate could be compared. {reasons}", hint="Raise --budget, or see the reasons above."
            )
        honest = [comparison for comparison in compared if comparison.verdict != "not_equivalent"]
        return max(honest or compared, key=lambda comparison: comparison.speedup.median)

    def _file_certificate(self) -> None:
        self.run.write_json("certs", "equivalence.json", self.comparison.equivalence)
        winner = self.patches.get(self.winner_name)
        if winner is None:
            return
        proof = winner.prove_rollback()
        self.run.write_json("certs", "rollback.json", proof)
        if not proof.is_restored:
            raise RollbackError(f"{self.winner_name} changed the original model: {proof.detail}.")

    def _meta(self, kind: Kind) -> Meta:
        return filing.meta(self.run.run_id, kind, self.workload, self.settings, self.device_info)

    def _dtype(self) -> torch.dtype:
        parameters = getattr(self.workload.model, "parameters", None)
        tensors = [t for t in (parameters() if parameters else ()) if t.is_floating_point()]
        return tensors[0].dtype if tensors else torch.float32


def _file_stem(candidate: str) -> str:
    return candidate.replace(":", "-")
