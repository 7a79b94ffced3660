"""What a workbench knows, as pandas frames with fixed columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.contracts.search import SearchResult, Trial
from agnitra_lab.contracts.suggestion import Suggestion

if TYPE_CHECKING:
    import pandas as pd

SUGGESTION_COLUMNS = (
    "action", "is_accepted", "source", "expected_latency_ms", "target_latency_ms", "rationale", "block_size",
    "tile_shape", "unroll_factor", "num_warps", "num_stages", "node",
)  # fmt: skip
TRIAL_COLUMNS = (
    "template", "shape", "dtype", "sampler", "measured_on", "index", "config", "latency_ms", "status", "detail",
    "elapsed_s",
)  # fmt: skip
CANDIDATE_COLUMNS = (
    "name", "status", "verdict", "latency_ms_p50", "speedup", "speedup_low", "speedup_high", "match_share",
    "compile_s", "reason",
)  # fmt: skip


def suggestion_frame(suggestions: Sequence[Suggestion], accepted: Collection[str] | None) -> pd.DataFrame:
    """One row per suggestion, best first; `accepted` names the actions that are taken up, None for all."""
    rows = [
        [
            accepted is None or each.action in accepted if name == "is_accepted" else getattr(each, name)
            for name in SUGGESTION_COLUMNS
        ]
        for each in suggestions
    ]
    return _frame(rows, SUGGESTION_COLUMNS)


def trial_frame(searches: Sequence[SearchResult], live: Sequence[tuple[Site, Trial]]) -> pd.DataFrame:
    """One row per trial: of the searches that have ended, else of the one that runs."""
    rows = [
        [found.space_template, found.shape, found.dtype, found.sampler, found.measured_on, *_trial(trial)]
        for found in searches
        for trial in found.trials
    ]
    if not searches:
        rows = [[site.template, site.shape, site.dtype, None, None, *_trial(trial)] for site, trial in live]
    return _frame(rows, TRIAL_COLUMNS)


def candidate_frame(results: Sequence[CandidateResult]) -> pd.DataFrame:
    """One row per candidate, in the order in which they were tried."""
    return _frame([_candidate(result) for result in results], CANDIDATE_COLUMNS)


def _trial(trial: Trial) -> list[Any]:
    return [trial.index, trial.config.params, trial.latency_ms, trial.status, trial.detail, trial.elapsed_s]


def _candidate(result: CandidateResult) -> list[Any]:
    found = result.comparison
    measured: list[Any] = [None] * 6
    if found is not None:
        speedup, share = found.speedup, found.equivalence.match_share
        measured = [
            found.verdict, found.candidate_latency.latency_ms_p50, speedup.median, speedup.low, speedup.high, share
        ]  # fmt: skip
    return [result.name, result.status, *measured, result.compile_s, result.reason]


def _frame(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns))
