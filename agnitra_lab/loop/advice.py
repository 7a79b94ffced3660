"""The conversation with a language model in the loop: sites as search spaces, its configs measured between questions.

Everything that is measured here is handed to the sampler, not the best alone: a model that has seen all of an adviser's
timings needs far fewer of its own (Helion pull request 2113: 5.7 times faster than without, 1.8 times than the best).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig, Measurement, SearchSpace, Trial
from agnitra_lab.errors import AgnitraError, SearchError
from agnitra_lab.generate import kernels as templates
from agnitra_lab.generate import registry
from agnitra_lab.loop.chooser import clock_s
from agnitra_lab.refine import replay
from agnitra_lab.refine.bound import NO_BOUND, Bound
from agnitra_lab.refine.measuring import Measure, takes_bound
from agnitra_lab.refine.search import Ahead
from agnitra_lab.refine.study import as_measurement
from agnitra_lab.suggest.rounds import Rounds
from agnitra_lab.suggest.sites import KernelSite, Sibling

MAX_SITES = 12
_MAX_DETAIL = 300


@dataclass(frozen=True)
class Place:
    """Where a site's configs are measured.

    Attributes:
        site: as measured: a recording has its own shape.
        space: its valid configs.
        measure: gives a config's latency in ms, or a `Measurement`, or raises.
        device: the recorded device; None for the one of the loop.
        ahead: what compiles configs before their turn; None where nothing does.
    """

    site: Site
    space: SearchSpace
    measure: Measure
    device: DeviceInfo | None = None
    ahead: Ahead | None = None


def replayed(site: Site) -> Place | None:
    """Return the recorded landscape nearest to a site, None when its template was never recorded."""
    path = replay.nearest(site.template, site.shape)
    if path is None:
        return None
    recorded = replay.load(path)
    found = Site(site.template, tuple(recorded.shape), recorded.dtype)
    return Place(found, recorded.space, recorded.measure, recorded.recorded.device)


def kernel_sites(sites: Sequence[Site], *, is_measured: bool, has_adviser: bool) -> tuple[KernelSite, ...]:
    """Describe the sites of a graph for the suggest stage, most frequent first, each search space once.

    Args:
        sites: as the graph has them.
        is_measured: they run on this device; otherwise recordings answer for them.
        has_adviser: a language model will read what was measured elsewhere.
    """
    found: dict[str, KernelSite] = {}
    counts: Counter[str] = Counter()
    for site in sites:
        try:
            described = _described(site, is_measured=is_measured, has_adviser=has_adviser)
        except AgnitraError:
            continue
        if described is not None:
            counts[described.key] += 1
            found.setdefault(described.key, described)
        if len(found) >= MAX_SITES:
            break
    return tuple(found.values())


def _described(site: Site, *, is_measured: bool, has_adviser: bool) -> KernelSite | None:
    if not is_measured:
        place = replayed(site)
        return None if place is None else KernelSite(place.space, device=place.device)
    num_bytes, flops = registry.load(site.template).cost(site.shape, site.dtype)
    siblings = _siblings(site) if has_adviser else ()
    return KernelSite(templates.space_of(site), bytes_moved=num_bytes, flops=flops, siblings=siblings)


def _siblings(site: Site) -> tuple[Sibling, ...]:
    """Return the recorded landscape nearest to a site as what was measured elsewhere."""
    place = replayed(site)
    if place is None:
        return ()
    name = place.device.name if place.device is not None else "another device"
    shape = "x".join(map(str, place.site.shape))
    label = f"{shape} {place.site.dtype}, recorded on {name}"
    return (Sibling(label, [tried(place, config, index) for index, config in enumerate(place.space.configs)]),)


def tried(place: Place, config: KernelConfig, index: int = 0) -> Trial:
    """Measure one config; whatever a compiler or a device raises is a failed trial."""
    try:
        measured = as_measurement(place.measure(config))
    except Exception as error:
        text = error.message if isinstance(error, AgnitraError) else f"{type(error).__name__}: {error}"
        return Trial(index=index, config=config, latency_ms=None, status="failed", detail=text[:_MAX_DETAIL])
    return Trial(
        index=index, config=config, latency_ms=measured.latency_ms, samples_ms=measured.samples_ms,
        status="failed" if measured.latency_ms is None else "ok", failure=measured.failure, detail=measured.detail,
    )  # fmt: skip


class Advice:
    """What the suggest stage says about kernels, measured.

    Attributes:
        rounds: the conversation; its proposal is the stage's.
        num_measured: configs that were measured for it.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.num_measured = 0
        self._trials: dict[str, dict[str, Trial]] = {}

    def converse(self, places: Mapping[str, Place], *, until_s: float, max_trials: int) -> None:
        """Measure what was proposed, tell it, and ask again, until nothing more is proposed or the time is over.

        Without a language model there is nothing to ask again: presets are left to the search.

        Args:
            places: by the key of the site.
            until_s: `clock_s` after which no further config is begun.
            max_trials: configs a site at most.
        """
        made = self.rounds.rounds[-1] if self.rounds.rounds else None
        while made is not None and self.rounds.proposal.usage is not None and clock_s() < until_s:
            for suggestion in made.suggestions:
                place = places.get(suggestion.site or "")
                if place is None or suggestion.config is None or clock_s() >= until_s:
                    continue
                self._measure(place, suggestion.config, max_trials)
            made = self.rounds.ask()

    def _measure(self, place: Place, config: KernelConfig, max_trials: int) -> None:
        known = self._trials.setdefault(place.site.key(), {})
        if config.key() in known or len(known) >= max_trials:
            return
        known[config.key()] = tried(place, config, len(known))
        self.num_measured += 1
        self.rounds.tell(place.site.key(), [known[config.key()]])

    @property
    def note(self) -> str | None:
        """What the conversation was, in a line; None where no language model was asked."""
        proposal = self.rounds.proposal
        if proposal.usage is None:
            return None
        taken = sum(s.source.startswith("llm:") for made in proposal.rounds for s in made.suggestions)
        dropped = sum(len(made.rejected) for made in proposal.rounds)
        return (
            f"language model: {proposal.usage.num_questions} questions, {taken} suggestions taken and {dropped} not, "
            f"{self.num_measured} configs measured"
        )

    def seeds(self, site: Site) -> list[KernelConfig]:
        """Return the configs for a search to begin with: those measured, fastest first, then those only proposed."""
        measured = sorted(self.trials(site), key=lambda trial: trial.latency_ms or float("inf"))
        proposed = self.rounds.proposal.configs_for(site.key())
        return list({config.key(): config for config in (*(trial.config for trial in measured), *proposed)}.values())

    def trials(self, site: Site) -> tuple[Trial, ...]:
        """Return what was measured at a site, in its order, failures too."""
        return tuple(self._trials.get(site.key(), {}).values())

    def remembering(self, site: Site, measure: Measure) -> Measure:
        """Return a measure that answers once from what was measured here, so that no config is paid for twice.

        Each answer is given out a single time: a finalist is measured again on the device. A measure that takes a
        bound is handed it, so that a hopeless config still ends early.
        """
        kept = dict(self._trials.get(site.key(), {}))
        if not kept:
            return measure
        has_bound = takes_bound(measure)

        def measured(config: KernelConfig, *, bound: Bound = NO_BOUND) -> float | Measurement:
            trial = kept.pop(config.key(), None)
            if trial is None:
                return measure(config, bound=bound) if has_bound else measure(config)
            if trial.latency_ms is None:
                raise SearchError(trial.detail or "failed when it was measured for the language model")
            return Measurement(latency_ms=trial.latency_ms, samples_ms=trial.samples_ms)

        return measured
