"""The search of one template at one shape, outside of any graph: on the GPU that is here, or on a recording of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import SearchResult, SearchSpace, Trial
from agnitra_lab.errors import MissingError, UsageError
from agnitra_lab.refine import replay
from agnitra_lab.refine.foreign import knowledge_of, replayed
from agnitra_lab.refine.measuring import Measure
from agnitra_lab.refine.search import Ahead, search
from agnitra_lab.refine.study import NOTHING_KNOWN, Knowledge, LedgerKey


@dataclass(frozen=True)
class Request:
    """What to search and how.

    Attributes:
        template: kernel template.
        shape: as the template counts it; None takes the largest that was recorded.
        dtype: such as "bfloat16".
        sampler: a key of the table of samplers.
        max_trials: configs to measure.
        budget_s: seconds after which no config is begun.
        seed: of every random choice.
        ledger: file of every step, None for none.
        on: "gpu", "recorded", or "auto" for the GPU where there is one.
        is_warm: begin with what recordings of other shapes and devices say.
    """

    template: str
    shape: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    sampler: str = "rl"
    max_trials: int = 24
    budget_s: float = 60.0
    seed: int = 0
    ledger: Path | None = None
    on: str = "auto"
    is_warm: bool = True


@dataclass(frozen=True)
class Found:
    """How a search went.

    Attributes:
        result: with every trial.
        optimum_ms: of the whole space, where a recording knows it.
    """

    result: SearchResult
    optimum_ms: float | None


def search_template(request: Request, *, on_trial: Callable[[Trial], None] | None = None) -> Found:
    """Search one template at one shape.

    Args:
        request: what and how.
        on_trial: called with each trial.

    Raises:
        UsageError: for a template or shape that is neither recorded nor, on a GPU, known.
        MissingError: when a GPU is asked for and there is none.
        SearchError, LedgerError: as `refine.search.search` says.
    """
    if request.on == "gpu" or (request.on == "auto" and request.shape is not None and _has_gpu()):
        return _on_gpu(request, on_trial)
    return _on_recording(request, on_trial)


def _on_recording(request: Request, on_trial: Callable[[Trial], None] | None) -> Found:
    path = replay.find(request.template, request.shape)
    if path is None and request.shape is not None:
        path = replay.nearest(request.template, request.shape)
    if path is None:
        raise UsageError(
            f"No recorded landscape of {request.template!r}.", hint=f"Recorded: {', '.join(replay.recorded())}."
        )
    landscape = replay.load(path)
    if request.shape is not None and landscape.shape != request.shape:
        shapes = "x".join(map(str, landscape.shape))
        raise UsageError(
            f"{request.template} was not recorded at {'x'.join(map(str, request.shape))}.",
            hint=f"The nearest recording is of {shapes}: use --shape {shapes}, or a machine with a GPU.",
        )
    known = knowledge_of(request.template, without=[path]) if request.is_warm else NOTHING_KNOWN
    key = LedgerKey(device=landscape.measured_on, versions=landscape.recorded.versions)
    result = _search(request, landscape.space, replayed(landscape), known, key, on_trial)
    return Found(result, landscape.best_latency_ms)


def _on_gpu(request: Request, on_trial: Callable[[Trial], None] | None) -> Found:
    import torch

    from agnitra_lab.device.info import describe
    from agnitra_lab.generate import kernels as templates
    from agnitra_lab.generate.registry import is_available
    from agnitra_lab.generate.tuned import kernel_sha256
    from agnitra_lab.loop.kernel_lab import KernelLab
    from agnitra_lab.loop.refinement import versions_of

    if not torch.cuda.is_available() or is_available() is not None:
        raise MissingError(
            f"No kernel can be measured here: {is_available() or 'there is no CUDA device'}.",
            hint="Use --on recorded, which replays a GPU's measurements.",
        )
    if request.shape is None:
        raise UsageError("A search on the GPU needs a shape.", hint="Give --shape, such as --shape 4096x2048.")
    site, device = Site(request.template, request.shape, request.dtype), describe(torch.device("cuda"))
    space, seeds = templates.space_of(site), templates.seed_configs(site, ())
    known = knowledge_of(request.template, seeds=seeds) if request.is_warm else Knowledge(seeds=seeds)
    key = LedgerKey(device.name, kernel_sha256(request.template), versions_of(device))
    lab = KernelLab(torch.device("cuda"))
    try:
        return Found(_search(request, space, lab.measure(site), known, key, on_trial, lab.ahead(site)), None)
    finally:
        lab.close()


def _search(
    request: Request, space: SearchSpace, measure: Measure, known: Knowledge, key: LedgerKey,
    on_trial: Callable[[Trial], None] | None, ahead: Ahead | None = None,
) -> SearchResult:  # fmt: skip
    return search(
        space, measure, sampler=request.sampler, max_trials=request.max_trials, budget_s=request.budget_s,
        seed=request.seed, knowledge=known, ledger=request.ledger, ledger_key=key, measured_on=key.device,
        on_trial=on_trial, ahead=ahead,
    )  # fmt: skip


def _has_gpu() -> bool:
    import torch

    from agnitra_lab.generate.registry import is_available

    return torch.cuda.is_available() and is_available() is None
