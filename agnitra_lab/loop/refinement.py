"""The refine stage over all sites of a graph: what is known is taken, what is not is searched, within the budget."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, SearchResult, Trial
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.errors import LedgerError, SearchError
from agnitra_lab.generate import kernels as templates
from agnitra_lab.generate.registry import is_available as why_no_kernels
from agnitra_lab.generate.tuned import TunedConfigs, kernel_sha256
from agnitra_lab.loop.advice import Advice, Place, replayed
from agnitra_lab.loop.chooser import clock_s
from agnitra_lab.loop.kernel_lab import KernelLab
from agnitra_lab.loop.settings import Settings
from agnitra_lab.refine import replay, search
from agnitra_lab.refine.foreign import knowledge_of
from agnitra_lab.refine.measuring import Measure
from agnitra_lab.refine.study import Knowledge, LedgerKey

# Share of the run's budget that may go into kernel searches, the sites in turn.
_SEARCH_SHARE = 0.2
_LEAST_SEARCH_S = 1.0
# A kernel that takes in a norm, an activation or a sum spares at least one launch, so it may take that much longer than
# the library alone. Products of 2 to 16 rows took up to three times as long where nobody had compared.
_LAUNCH_MS = 0.0015
_OUTDONE_EARLIER = "the library was faster in an earlier run"
# Share of that which the configs of a language model may take.
_ADVICE_SHARE = 0.5


class Refinement:
    """Searches the kernel configs of a graph's sites.

    Args:
        settings: sampler, trials, budget, seed and the folder of earlier findings.
        device_info: the device and its versions, which earlier findings must share.
        lab: where configs are measured; None where recordings answer.
        suggestions: whose configs are measured first.
        advice: the suggest stage's ranked configs; those of a language model are measured with it.
        on_trial: called with each trial and its place as it ends.

    Attributes:
        tuned: site -> the config to use there; sites that nobody searched are not in it.
        refused: sites whose ops stay, and why: every config that was tried failed, or the library is faster.
        ledgers: site -> the ledger of its search, for the run's files.
        found_late: the searches of `find`.
    """

    def __init__(
        self,
        settings: Settings,
        device_info: DeviceInfo,
        lab: KernelLab | None,
        suggestions: Sequence[Suggestion],
        advice: Advice | None = None,
        on_trial: Callable[[Site, Trial], None] | None = None,
    ) -> None:
        self._settings = settings
        self._device_name = device_info.name
        self._lab = lab
        self._suggestions = suggestions
        self._advice = advice
        self._on_trial = on_trial
        self._is_measured = lab is not None and why_no_kernels() is None
        self.tuned: dict[Site, KernelConfig] = {}
        self.refused: dict[Site, str] = {}
        self.ledgers: dict[Site, bytes] = {}
        self.found_late: list[SearchResult] = []
        self._once: set[Site] = set()
        self._versions = versions_of(device_info)
        self._known: TunedConfigs | None = None
        if self._is_measured:
            self._known = TunedConfigs(settings.memory, device_info.name, self._versions)

    def run(self, sites: Sequence[Site], apart: Collection[Site] = frozenset()) -> tuple[list[SearchResult], list[str]]:
        """Take or find the config of each site.

        Args:
            sites: most frequent first; the budget goes to them in this order.
            apart: those that no candidate with all changes has; what is not known of them waits for `find`.

        Returns:
            The searches made, and a line a site.
        """
        results, notes = [], []
        deadline_s = clock_s() + _SEARCH_SHARE * self._settings.budget_s
        self._once = {site for site in sites if site in apart or self._is_ruled(site)}
        waiting = [site for site in sites if site in apart and self._earlier(site) is None]
        sites = [site for site in sites if site not in waiting]
        unknown = [site for site in sites if self._earlier(site) is None]
        self._prepare_first(unknown)
        self._take_advice([site for site in unknown if site not in self._once], deadline_s)
        for site in sites:
            known = self._earlier(site)
            if self._is_outdone(site, known):
                self.refused[site] = _OUTDONE_EARLIER
                notes.append(f"{site.key()}: {_OUTDONE_EARLIER}")
                continue
            if known is not None:
                self.tuned[site] = known
                notes.append(f"{site.key()}: found by an earlier run")
                continue
            left_s = deadline_s - clock_s()
            is_spent = left_s < _LEAST_SEARCH_S
            if is_spent and not self._is_measured:
                notes.append(f"{site.key()}: the search budget is spent")
                continue
            # Later sites are not left with nothing: each may take half of what is left, and the rule of thumb is tried
            # in any case, because no kernel runs in this process that has not run in the lab.
            num_trials = 1 if is_spent or site in self._once else self._settings.max_trials
            result, note = self._searched(site, max(left_s / 2, _LEAST_SEARCH_S), num_trials)
            notes.append(note)
            results += [result] if result is not None else []
        if waiting:
            notes.append(f"{len(waiting)} of candidates with fewer changes: measured when one of these is tried")
        return results, notes

    def find(self, site: Site) -> KernelConfig | None:
        """Return the config of a site that `run` left out, now that a candidate is about to use it.

        In a decoder's search 1.3 s of 4.6 on one H200 went into sites of candidates that were never tried. Of such a
        site the rule of thumb is measured, and no more.

        Returns:
            The config; None where it failed or the library is faster, and where none can be measured.
        """
        self._once.add(site)
        known = self._earlier(site)
        if self._is_outdone(site, known):
            self.refused[site] = _OUTDONE_EARLIER
        elif known is not None:
            self.tuned[site] = known
        elif self._is_measured:
            result, _ = self._searched(site, _LEAST_SEARCH_S, 1)
            self.found_late += [result] if result is not None else []
        return self.tuned.get(site)

    def _earlier(self, site: Site) -> KernelConfig | None:
        if self._known is None or not self._settings.is_warm:
            return None
        return self._known.get(site) if site in self._once or self._known.is_searched(site) else None

    def _is_outdone(self, site: Site, known: KernelConfig | None) -> bool:
        return known is not None and self._known is not None and self._known.is_outdone(site)

    def _prepare_first(self, sites: Sequence[Site]) -> None:
        """Have what each site's search begins with compiled beside the searches before it."""
        if self._lab is not None and self._is_measured:
            for site in sites:
                self._lab.prepare(site, self._seeds(site)[:1])

    def _is_ruled(self, site: Site) -> bool:
        return self._is_measured and templates.is_ruled(site)

    def _seeds(self, site: Site) -> list[KernelConfig]:
        if self._is_ruled(site):
            return templates.seed_configs(site, ())
        advised = self._advice.seeds(site) if self._advice is not None else []
        return [*advised, *templates.seed_configs(site, self._suggestions)]

    def _take_advice(self, sites: Sequence[Site], deadline_s: float) -> None:
        if self._advice is None:
            return
        places = [place for place in map(self._place, sites) if place is not None]
        now_s = clock_s()
        self._advice.converse(
            {place.site.key(): place for place in places},
            until_s=now_s + _ADVICE_SHARE * max(deadline_s - now_s, 0.0),
            max_trials=self._settings.max_trials,
        )

    def _place(self, site: Site) -> Place | None:
        """Return where a site's configs are measured: on the device, else in the nearest recording."""
        if self._is_measured and self._lab is not None:
            return Place(site, templates.space_of(site), self._lab.measure(site), ahead=self._lab.ahead(site))
        return replayed(site)

    def _searched(self, site: Site, budget_s: float, num_trials: int) -> tuple[SearchResult | None, str]:
        try:
            result = self._search(site, budget_s, num_trials)
        except SearchError as error:
            self.refused[site] = error.message
            return None, f"{site.key()}: {error.message}"
        if result is None:
            return None, f"{site.template}: no measurements for this device"
        best = result.best
        if best is None or best.latency_ms is None:
            return result, f"{site.key()}: nothing measured"
        found_at = Site(result.space_template, result.shape, result.dtype)
        library_ms = self._library_ms(site)
        is_outdone = library_ms is not None and best.latency_ms > library_ms + _LAUNCH_MS
        if library_ms is not None and is_outdone:
            self.refused[site] = f"it takes {best.latency_ms * 1e3:.1f} us, the library {library_ms * 1e3:.1f}"
        else:
            self.tuned[found_at] = best.config
        if self._known is not None:
            is_searched = len(result.trials) > 1 or self._is_ruled(site)
            self._known.add(
                found_at, best.config, best.latency_ms, is_searched=is_searched, is_outdone=is_outdone
            )  # fmt: skip
        return result, (
            f"{found_at.key()}: {best.latency_ms * 1000:.1f} us after {len(result.trials)} of {result.num_configs} "
            f"configs, {result.measured_on}"
            + (f"; the library takes {library_ms * 1000:.1f} us" if library_ms is not None and is_outdone else "")
        )

    def _library_ms(self, site: Site) -> float | None:
        """Return what the library's own call takes, None where there is none, or no device to ask."""
        if self._lab is None or not self._is_measured or not templates.has_library(site):
            return None
        return self._lab.library_ms(site)

    def _search(self, site: Site, budget_s: float, num_trials: int) -> SearchResult | None:
        place = self._place(site)
        if place is None:
            return None
        measure: Measure = place.measure
        seeds = self._seeds(place.site)
        if self._advice is not None:
            measure = self._advice.remembering(place.site, measure)
        if place.device is None:
            # One config is its seed, whatever siblings say.
            known = Knowledge(seeds=seeds) if num_trials == 1 else knowledge_of(site.template, seeds=seeds)
            key = LedgerKey(self._device_name, kernel_sha256(site.template), self._versions)
            path = self._settings.memory / "ledgers" / f"{_file_stem(site, key)}.jsonl"
            return self._searched_with(place, measure, known, key, path, budget_s, num_trials)
        searched = replay.find(place.site.template, place.site.shape)
        known = knowledge_of(site.template, seeds=seeds, without=[searched] if searched is not None else [])
        key = LedgerKey(f"recorded: {place.device.name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.jsonl"
            return self._searched_with(place, measure, known, key, path, budget_s, num_trials)

    def _searched_with(
        self, place: Place, measure: Measure, known: Knowledge, key: LedgerKey, ledger: Path, budget_s: float,
        num_trials: int,
    ) -> SearchResult:  # fmt: skip
        """Search with a ledger that a killed run's search goes on from; one that is over belongs to the run's files."""
        given, on_trial = self._settings, self._on_trial
        run = partial(
            search.search, place.space, measure, sampler=given.sampler or "rl", max_trials=num_trials, seed=given.seed,
            knowledge=known, measured_on=key.device, budget_s=budget_s, ledger_key=key, ahead=place.ahead,
            on_trial=None if on_trial is None else lambda trial: on_trial(place.site, trial),
        )  # fmt: skip
        if not given.is_warm:
            with contextlib.suppress(OSError):
                ledger.unlink()
        try:
            return run(ledger=ledger)
        except LedgerError:
            # Another process searches here, other recordings are known by now, or the folder cannot be written.
            ledger = Path(os.devnull)
            return run()
        finally:
            # A search that ended, well or not, is no more gone on with; one that was interrupted or killed is.
            if ledger.is_file() and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                with contextlib.suppress(OSError):
                    self.ledgers[place.site] = ledger.read_bytes()
                    ledger.unlink()


def _file_stem(site: Site, key: LedgerKey) -> str:
    facts = hashlib.sha256(repr((key.device, key.kernel_sha256, sorted(key.versions.items()))).encode()).hexdigest()
    return f"{site.key().replace('/', '__')}__{facts[:12]}"


def versions_of(device: DeviceInfo) -> dict[str, str]:
    """What a device's timings depend on beside the device."""
    facts = {"torch": device.torch_version, "triton": device.triton_version, "driver": device.driver_version}
    return {name: value or "" for name, value in facts.items()}
