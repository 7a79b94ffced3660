"""What finished runs of the same optimisation learnt, kept on disk, so that the next one begins where they ended.

    <tuned folder>/runs/<identity>.json    sha256 of the rest, then one JSON object: graphs, sites, candidates

Same means: model classes, their source files and those they reach, plain attributes, hooks, metadata of weights and
inputs, torch's switches, device, versions, and this package to the byte. Weights' values are no part of it. What is
taken from a record is how the graph looks, which sites it has, and how candidates fared: no kernel runs, and nothing is
kept, on its word. The graph that Dynamo makes of the model says in the end whether it was the same: where it differs,
the record is dropped and the stages are run anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from torch import nn

from agnitra_lab.benchmark import winner as contest
from agnitra_lab.contracts.base import Contract, NonNegative
from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.graph import GraphHandoff
from agnitra_lab.contracts.kernel import Launch, Site, TensorLayout
from agnitra_lab.contracts.measurement import CandidateResult
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import AgnitraError
from agnitra_lab.graph.compiled import CompiledGraph
from agnitra_lab.loop.identity import identity_of
from agnitra_lab.loop.settings import Settings
from agnitra_lab.loop.site_survey import SiteSurvey
from agnitra_lab.patch.candidates import Candidate, Mode
from agnitra_lab.patch.install import Patch
from agnitra_lab.profiler import graphs
from agnitra_lab.runs.atomic import write_atomically

# Intervals this far apart are no matter of the moment: such a loser is not tried again.
_CLEARLY_LOST = 1.03
# A winner this much slower than it was is no measure for the others.
_LIKE_BEFORE = 0.9
_MAX_RECORDS = 64


class StaleRecordError(Exception):
    """The model's graph is not the one that was recorded. Nobody sees it: the stages are run anew."""


class Tried(Contract):
    """How a candidate fared, and in which run.

    Attributes:
        cost_s: from its first step to its verdict.
        graph_sha256: what Dynamo made of the model for it; None where nothing was compiled in the loop's process.
    """

    mode: Mode
    actions: tuple[str, ...]
    is_raw: bool
    result: CandidateResult
    cost_s: NonNegative
    run_id: str
    graph_sha256: str | None = None

    @property
    def candidate(self) -> Candidate:
        """The contestant."""
        return Candidate(self.result.name, self.mode, self.actions, self.is_raw)


class Traced(Contract):
    """A graph, as `CompiledGraph` has it."""

    handoff: GraphHandoff
    origin_of: dict[str, str]
    note: str | None


class Record(Contract):
    """All that is kept of one optimisation."""

    version: Literal[1] = 1
    identity: str
    run_id: str
    exported: Traced | None
    compiled: Traced | None
    findable: tuple[str, ...]
    sites: tuple[str, ...]
    standing: tuple[str, ...]
    launches: tuple[JsonValue, ...]
    tried: tuple[Tried, ...]
    winner: str | None


class Earlier:
    """The record of one optimisation; it knows nothing where there is none, or the run is not to start warm.

    Args:
        workload: what is optimised.
        settings: whether to start warm, and the folder.
        device: where it runs. On a CPU nothing is kept: its kernels are not searched, and its timings spread too far.
    """

    def __init__(self, workload: Workload, settings: Settings, device: DeviceInfo) -> None:
        self._workload = workload
        self._is_partial = settings.only is not None or settings.accept is not None
        self._identity = _identity(workload, device) if is_kept_on(device) else None
        folder = settings.memory / "runs"
        self._path = folder / f"{self._identity}.json" if self._identity is not None else None
        self._record = self._read() if settings.is_warm else None
        self._graphs: dict[str, str] = {}

    @property
    def run_id(self) -> str | None:
        """The run that the graph and its sites are known from."""
        return self._record.run_id if self._record is not None else None

    def remind(self) -> None:
        """Tell the profiler the model's graphs, which it then need not trace."""
        if self._record is None:
            return
        for kept, is_compiled in ((self._record.exported, False), (self._record.compiled, True)):
            if kept is not None:
                graph = CompiledGraph(kept.handoff, kept.origin_of, kept.note)
                graphs.remember(*self._call(), graph, is_compiled=is_compiled)

    def surveyed(self) -> SiteSurvey | None:
        """Return where kernels would go, None where that is to be found out."""
        record = self._record
        if record is None:
            return None
        return SiteSurvey(
            frozenset(record.findable), tuple(map(Site.of_key, record.sites)),
            frozenset(map(Site.of_key, record.standing)), tuple(_launch(row) for row in record.launches),
        )  # fmt: skip

    def winner(self) -> Candidate | None:
        """Return the candidate that was kept, to be tried first."""
        found = self._of_name(self._record.winner) if self._record is not None else None
        return found.candidate if found is not None else None

    def why_not(self, candidate: Candidate, results: Sequence[CandidateResult]) -> str | None:
        """Say why a candidate need not be tried again; None where it is to be tried.

        Args:
            candidate: the contestant.
            results: of this run so far. The winner of then must have done here what it did there.
        """
        lost, won = self._of(candidate), self._of_name(self._record.winner) if self._record is not None else None
        if lost is None or won is None or lost.result.name == won.result.name:
            return None
        now = next((row for row in results if row.name == won.result.name and row.status == "kept"), None)
        if now is None or contest.speedup_of(now) < _LIKE_BEFORE * contest.speedup_of(won.result):
            return None
        ratio = _lost_by(won.result, lost.result)
        if ratio is None:
            return None
        return f"{ratio:.2f} times the time of {won.result.name}, measured in run {lost.run_id}; not tried again"

    def cost_s(self, candidate: Candidate) -> float | None:
        """Return what a candidate took from its first step to its verdict, None where it was never tried."""
        found = self._of(candidate)
        return found.cost_s if found is not None else None

    def most_s(self) -> float:
        """Return what the longest candidate with Inductor's default options took, 0 where none is known."""
        rows = self._record.tried if self._record is not None else ()
        return max((row.cost_s for row in rows if row.mode == "default"), default=0.0)

    def check(self, patch: Patch) -> None:
        """Hold the graph that Dynamo made for a candidate against the one that was recorded.

        Raises:
            StaleRecordError: when they differ.
        """
        found = self._of_name(patch.name)
        known = found.graph_sha256 if found is not None else None
        if patch.graph_sha256 is None:
            return
        self._graphs[patch.name] = patch.graph_sha256
        if known is not None and known != patch.graph_sha256:
            raise StaleRecordError(f"The graph of {self._workload.name!r} differs from that of run {self.run_id}.")

    def forget(self) -> None:
        """Know nothing from here on; the model's graphs are traced again."""
        self._record = None
        graphs.forget(self._workload.model)

    def keep(
        self, run_id: str, surveyed: SiteSurvey, tried: Mapping[str, tuple[Candidate, float]],
        results: Sequence[CandidateResult], winner: str | None,
    ) -> None:  # fmt: skip
        """Write down what a finished run learnt. A folder that cannot be written costs the next run time, no more.

        Args:
            run_id: the run.
            surveyed: its sites.
            tried: the candidates that it tried, and the seconds of each.
            results: every row.
            winner: name of the kept one; of a run that was told what to try the earlier one stays.
        """
        if self._path is None or self._identity is None or not surveyed.findable:
            return
        before = self._record
        rows = {row.result.name: row for row in (before.tried if before is not None else ())}
        with contextlib.suppress(AgnitraError, OSError, ValueError):
            for result in results:
                # Of one that was given up what it took is known, and no more.
                is_given_up = result.status == "skipped" and result.name not in rows
                if result.name in tried and (result.status in ("kept", "rejected") or is_given_up):
                    rows[result.name] = self._row(run_id, *tried[result.name], result)
            record = Record(
                identity=self._identity,
                run_id=run_id if before is None else before.run_id,
                exported=self._traced(is_compiled=False),
                compiled=self._traced(is_compiled=True),
                findable=tuple(sorted(surveyed.findable)),
                sites=tuple(site.key() for site in surveyed.sites),
                standing=tuple(sorted(site.key() for site in surveyed.standing)),
                launches=tuple(row for row in map(_row_of, surveyed.launches) if row is not None),
                tried=tuple(rows.values()),
                winner=(before.winner if before is not None else None) if self._is_partial else winner,
            )
            body = record.to_json(indent=None).encode()
            write_atomically(self._path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            _prune(self._path.parent)

    def _row(self, run_id: str, candidate: Candidate, cost_s: float, result: CandidateResult) -> Tried:
        known = self._of(candidate)
        return Tried(
            mode=candidate.mode, actions=candidate.actions, is_raw=candidate.is_raw, result=result, run_id=run_id,
            # With warm caches a candidate costs less than it may without them.
            cost_s=max(cost_s, known.cost_s if known is not None else 0.0),
            graph_sha256=self._graphs.get(candidate.name) or (known.graph_sha256 if known is not None else None),
        )  # fmt: skip

    def _read(self) -> Record | None:
        if self._path is None:
            return None
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        digest, _, body = content.partition(b"\n")
        try:
            if hashlib.sha256(body).hexdigest().encode() != digest:
                raise ValueError("cut short or changed")
            record = Record.from_json(body)
            [*map(Site.of_key, record.sites), *map(Site.of_key, record.standing), *map(_launch, record.launches)]
            return record if record.identity == self._identity else None
        except (AgnitraError, ValueError, TypeError, KeyError, AttributeError):
            # What cannot be read is kept aside, where the next record does not overwrite it.
            with contextlib.suppress(OSError):
                self._path.replace(self._path.with_suffix(".unreadable"))
            return None

    def _traced(self, *, is_compiled: bool) -> Traced | None:
        found = graphs.remembered(*self._call(), is_compiled=is_compiled)
        if found is None:
            return None
        return Traced(handoff=found.handoff, origin_of=dict(found.origin_of), note=found.note)

    def _call(self) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
        # Only of a module is there an identity, and so a record.
        return cast(nn.Module, self._workload.model), self._workload.args, self._workload.kwargs

    def _of_name(self, name: str | None) -> Tried | None:
        rows = self._record.tried if self._record is not None else ()
        return next((row for row in rows if row.result.name == name), None)

    def _of(self, candidate: Candidate) -> Tried | None:
        found = self._of_name(candidate.name)
        return found if found is not None and found.candidate == candidate else None


def _identity(workload: Workload, device: DeviceInfo) -> str | None:
    try:
        return identity_of(workload, device)
    except Exception:
        # Some object that hangs on the model raises when it is looked at: nothing is kept of such a model.
        return None


def is_kept_on(device: DeviceInfo) -> bool:
    """Whether records are kept of optimisations on a device."""
    return device.type == "cuda"


def _lost_by(won: CandidateResult, lost: CandidateResult) -> float | None:
    """Return how many times the winner's time another took, None unless that was beyond doubt."""
    is_beaten = lost.status == "rejected" and contest.is_clear(won, lost, by=_CLEARLY_LOST)
    return contest.lead(won, lost) if is_beaten else None


def _row_of(launch: Launch) -> JsonValue:
    """Return a launch as JSON; None for one with a value that JSON does not keep: it is then compiled where it runs."""
    try:
        return [launch.site.key(), _plain(launch.args), _plain(launch.options)]
    except TypeError:
        return None


def _plain(value: Any) -> JsonValue:
    if isinstance(value, TensorLayout):
        return {"layout": [list(value.shape), list(value.stride), value.offset, value.dtype]}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return cast(JsonValue, value)
    raise TypeError(f"{type(value).__name__} is not kept")


def _launch(row: JsonValue) -> Launch:
    key, args, options = cast(list[Any], row)
    return Launch(Site.of_key(key), _value(args), _value(options))


def _value(row: Any) -> Any:
    if isinstance(row, list):
        return tuple(map(_value, row))
    if isinstance(row, dict):
        shape, stride, offset, dtype = row["layout"]
        getattr(torch, dtype)
        return TensorLayout(tuple(shape), tuple(stride), offset, dtype)
    return row


def _prune(folder: Path) -> None:
    """Leave the newest records: each change of this package or of a model makes new ones."""
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[_MAX_RECORDS:]:
        path.unlink(missing_ok=True)
