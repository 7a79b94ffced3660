"""The run summary: `summary.json` of every directory under `artifacts/`, as the artifacts layout fixes it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from agnitra_lab.contracts.base import Contract, Count, NonNegative

Category = Literal["baseline", "bench", "perf", "profiles", "certs", "cmaes", "vis", "reports", "regressions"]
Kind = Literal["baseline", "bench", "perf", "certs", "cmaes", "profile", "report"]

RUN_ID_PATTERN = r"^\d{8}_\d{6}(_[A-Za-z0-9.-]+)*$"


class GitState(Contract):
    """The commit that ran. `commit_full` is null outside a checkout."""

    commit_full: str | None
    branch: str | None
    dirty: bool | None


class PythonState(Contract):
    """The interpreter that ran."""

    executable: str
    version: str


class DeviceName(Contract):
    """Device as the layout names it."""

    type: str
    name: str


class Meta(Contract):
    """Provenance: who, what, where."""

    run_id: Annotated[str, Field(pattern=RUN_ID_PATTERN)]
    generated_at: str
    kind: Kind
    topic: Annotated[str, Field(min_length=1)]
    git: GitState
    python: PythonState
    command: str
    argv: tuple[str, ...]
    seed: int | None = None
    seeds: dict[str, int] | None = None
    device: DeviceName | str
    versions: dict[str, str] = {}
    environment: dict[str, str] = {}
    config: dict[str, JsonValue] = {}
    links: dict[str, str] = {}
    """Category -> path of the same run's other directories, relative to this one."""

    @model_validator(mode="after")
    def _seeded(self) -> Self:
        if self.seed is None and self.seeds is None:
            raise ValueError("meta needs `seed`, or `seeds` when several matter")
        return self


class Budget(Contract):
    """What was intended to run."""

    max_steps: Count | None = None
    warmup_steps: Count | None = None
    tokens_per_step_global: Count | None = None
    flops_per_token_est: NonNegative | None = None
    flops_per_step_est: NonNegative | None = None
    target_flops: NonNegative | None = None
    planned_total_flops_est: NonNegative | None = None
    budget_s: NonNegative | None = None


class Results(Contract):
    """What happened. The layout's own names, plus any figure by a name that ends in its unit."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    losses: tuple[float, ...] | None = None
    final_loss: float | None = None
    tokens_per_second: NonNegative | None = None
    tflops_per_second_est: NonNegative | None = None
    peak_memory_allocated_gb: NonNegative | None = None
    metrics_jsonl: str | None = None


class RunSummary(Contract):
    """`summary.json`."""

    schema_version: str
    meta: Meta
    budget: Budget
    results: Results


SUMMARY_SCHEMA_VERSION = "agnitra.summary.v1"


class FileEntry(Contract):
    """One file of a finished run."""

    path: str
    size_bytes: Count
    sha256: str


class Manifest(Contract):
    """Written last: a run directory without one is incomplete."""

    run_id: str
    files: tuple[FileEntry, ...]
    schema_version: str = "agnitra.manifest.v1"
