"""The suggest stage of one run: who is asked, about which kernels, and what an earlier run taught."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from agnitra_lab.contracts.device import DeviceInfo, DevicePeaks
from agnitra_lab.contracts.graph import WorkloadProfile
from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.loop import outcomes
from agnitra_lab.loop.advice import Advice, kernel_sites
from agnitra_lab.loop.language_model import client_of, limits_of
from agnitra_lab.loop.settings import Settings
from agnitra_lab.suggest.rounds import Rounds


class Adviser:
    """Asks for things to try by the settings of a run."""

    def __init__(self, settings: Settings) -> None:
        """Read what the settings name.

        Raises:
            UsageError: a recording or report that cannot be read, a server that cannot be asked, a budget that cannot
                be kept.
        """
        self._settings = settings
        self._limits, self._client = limits_of(settings), client_of(settings)
        self._outcomes = outcomes.of_actions(outcomes.read_report(settings.llm_after)) if settings.llm_after else {}

    def ask(
        self,
        record: TelemetryRecord,
        profile: WorkloadProfile,
        device: DeviceInfo,
        findable: Collection[str] | None,
        surveyed: Sequence[Site],
        *,
        is_measured: bool,
        peaks: Callable[[], DevicePeaks],
    ) -> Advice:
        """Ask the first question, or give the presets where nobody is to be asked.

        Args:
            record: the measured profile.
            profile: the workload's type, phase and patterns.
            device: where it ran.
            findable: actions that the rewrites found something for.
            surveyed: where kernels would go, most frequent first.
            is_measured: kernels run on this device; otherwise recordings answer for them.
            peaks: measures the device's ceilings, for a question alone.
        """
        if self._client is not None and record.peaks is None:
            # Ceilings turn bytes and FLOPs into the times that a model can reason from.
            record = record.model_copy(update={"peaks": peaks()})
        has_adviser = self._client is not None
        is_searched = self._settings.sampler is not None
        rounds = Rounds(
            record,
            profile,
            device,
            findable=findable,
            sites=kernel_sites(surveyed, is_measured=is_measured, has_adviser=has_adviser) if is_searched else (),
            client=self._client,
            limits=self._limits,
            is_llm_requested=self._settings.suggest == "llm",
        )
        rounds.tell_actions(self._outcomes)
        rounds.ask()
        return Advice(rounds)
