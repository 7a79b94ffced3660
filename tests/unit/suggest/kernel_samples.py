"""Search spaces of recorded kernels, and answers that choose from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from suggest_samples import decoder_profile, decoder_record, suggestion_json

from agnitra_lab.contracts.search import KernelConfig, SearchSpace, Trial
from agnitra_lab.errors import TemplateError
from agnitra_lab.llm.reply import LanguageModel
from agnitra_lab.refine import replay
from agnitra_lab.suggest.rounds import Rounds
from agnitra_lab.suggest.sites import KernelSite

ROOT = Path(__file__).parents[3]
_FOLDER = ROOT / "fixtures" / "landscapes"
LANDSCAPES = sorted(
    path
    for name in ("rms_norm__*x2048", "rms_norm__16384x4096", "swiglu__")
    for path in _FOLDER.glob(f"{name}*h200.npz")
)
"""The landscapes that these tests are about; the benchmark of suggestions judges every recorded one."""


def landscape(name: str = "rms_norm__4096x2048") -> replay.Landscape:
    (path,) = [path for path in LANDSCAPES if path.name.startswith(name)]
    return replay.load(path)


def site_of(recorded: replay.Landscape) -> KernelSite:
    return KernelSite(recorded.space, device=recorded.recorded.device)


def choice(place: KernelSite, params: Any, **changes: Any) -> dict[str, Any]:
    """One suggestion as a model would write it."""
    seed = {name: value for name, value in suggestion_json(place.space.template).items() if value is not None}
    return {**seed, "site": place.key, "params": params, **changes}


def measured(recorded: replay.Landscape, configs: Iterable[KernelConfig]) -> list[Trial]:
    trials = []
    for index, config in enumerate(configs):
        try:
            trials.append(Trial(index=index, config=config, latency_ms=recorded.measure(config)))
        except TemplateError as error:
            failed = {"latency_ms": None, "status": "failed", "detail": error.message}
            trials.append(Trial(index=index, config=config, **failed))
    return trials


def begin(client: LanguageModel | None, *sites: KernelSite, **options: Any) -> Rounds:
    from suggest_samples import CUDA

    return Rounds(decoder_record(), decoder_profile(), CUDA, sites=sites, client=client, **options)


def ranked_by_truth(recorded: replay.Landscape) -> list[KernelConfig]:
    """Every config that ran, the fastest first."""
    trials = [trial for trial in measured(recorded, recorded.space.configs) if trial.latency_ms is not None]
    return [trial.config for trial in sorted(trials, key=lambda trial: (trial.latency_ms, trial.config.key()))]


def space_of(template: str, configs: Sequence[dict[str, int]], shape: tuple[int, ...] = (4096, 2048)) -> SearchSpace:
    params = {name: tuple(sorted({point[name] for point in configs})) for name in (configs[0] if configs else {})}
    points = tuple(KernelConfig(template=template, params=point) for point in configs)
    return SearchSpace(template=template, shape=shape, dtype="bfloat16", params=params, configs=points)
