"""The suggest stage in one call: ask the language model where there is one, and let presets fill in, or stand in and
say why. `rounds` goes on from there, with measured feedback."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.suggestion import Proposal
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.llm.reply import LanguageModel
from agnitra_lab.suggest.budget import Limits
from agnitra_lab.suggest.rounds import MAX_SUGGESTIONS, Rounds
from agnitra_lab.suggest.sites import KernelSite


def propose(
    record: TelemetryRecord,
    profile: WorkloadProfile,
    device: DeviceInfo,
    *,
    findable: Collection[str] | None = None,
    sites: Sequence[KernelSite] = (),
    client: LanguageModel | None = None,
    limits: Limits | None = None,
    is_llm_requested: bool = False,
    max_suggestions: int = MAX_SUGGESTIONS,
) -> Proposal:
    """Propose what to try on a profiled workload, best first.

    What the model names goes in front, in order of its expected latency; presets for the actions that it did not
    name follow, with their own source, so that a lazy or wrong model costs nothing that the presets would have found.

    Args:
        record: the measured profile.
        profile: the workload's type, phase and patterns.
        device: where it ran.
        findable: actions that the rewrites found something for; None where nobody asked them.
        sites: search spaces of kernels; with them the first round holds ranked configs too.
        client: the language model to ask; None asks nobody.
        limits: what asking may take.
        is_llm_requested: the user asked for a language model, so its absence is a fallback and not the normal case.
        max_suggestions: most suggestions that are returned.

    Returns:
        The proposal; `fallback` says why presets stand in, when a model was asked or asked for and gave nothing.
        Never raises for what a server or a model does.
    """
    rounds = Rounds(
        record, profile, device, findable=findable, sites=sites, client=client, limits=limits,
        is_llm_requested=is_llm_requested,
    )  # fmt: skip
    rounds.ask()
    proposal = rounds.proposal
    return proposal.model_copy(update={"suggestions": proposal.suggestions[:max_suggestions]})
