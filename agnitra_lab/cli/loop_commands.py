"""Commands along the loop: demo, optimize, profile, generate, benchmark; suggest and refine have their own files."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agnitra_lab.cli.app import app
from agnitra_lab.errors import UsageError

if TYPE_CHECKING:
    from agnitra_lab.loop import Optimization

Target = Annotated[
    str, typer.Argument(help="FILE.py:FUNCTION, package.module:FUNCTION, ARCHIVE.pt2, or demo:NAME[@SCALE].")
]
Artifacts = Annotated[Path, typer.Option(help="Folder of the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")]
BudgetS = Annotated[float, typer.Option("--budget", min=1.0, help="Seconds for compiling candidates.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Tokens = Annotated[int, typer.Option(min=1, help="Volume that the usage event accounts for.")]
Price = Annotated[str, typer.Option("--price", help="Price of one GPU hour, USD.")]
Project = Annotated[str, typer.Option("--project", help="Project id of the usage event.")]
LLMUrl = Annotated[
    str | None, typer.Option("--llm-url", help="OpenAI-compatible base URL; its key: AGNITRA_LLM_API_KEY.")
]
LLMModel = Annotated[str | None, typer.Option("--llm-model", help="Model name at that server.")]


class SuggestFrom(StrEnum):
    """Where suggestions come from."""

    AUTO = "auto"
    LLM = "llm"
    PRESET = "preset"


class SamplerName(StrEnum):
    """How kernel configs are searched."""

    RL = "rl"
    PORTFOLIO = "portfolio"
    REINFORCE = "reinforce"
    REINFORCE_COLD = "reinforce-cold"
    COORDINATE = "coordinate"
    CMAES = "cmaes"
    TPE = "tpe"
    RANDOM = "random"
    EXHAUSTIVE = "exhaustive"
    NONE = "none"


SuggestOption = Annotated[
    SuggestFrom, typer.Option("--suggest", help="auto: the language model where one is configured, else presets.")
]
SamplerOption = Annotated[SamplerName, typer.Option("--sampler", help="none: preset kernel configs, no search.")]


@app.command()
def demo(artifacts: Artifacts = Path("artifacts"), suggest: SuggestOption = SuggestFrom.AUTO) -> int:
    """Optimise a small Llama-style decoder, with real timings on this machine."""
    _optimize("demo:llama-decode", artifacts=artifacts, suggest=suggest.value, budget_s=40.0, timing_s=3.0)
    return 0


@app.command()
def optimize(
    target: Target,
    suggest: SuggestOption = SuggestFrom.AUTO,
    sampler: SamplerOption = SamplerName.RL,
    budget_s: BudgetS = 300.0,
    seed: Seed = 0,
    tokens: Tokens = 262_144,
    price: Price = "2.50",
    project: Project = "default",
    llm_url: LLMUrl = None,
    llm_model: LLMModel = None,
    is_isolated: Annotated[
        bool, typer.Option("--isolate", help="Compile and time each candidate in a process of its own first.")
    ] = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Run the whole loop on TARGET and file the evidence."""
    _optimize(
        target, artifacts=artifacts, suggest=suggest.value, sampler=_sampler(sampler), budget_s=budget_s, seed=seed,
        tokens_processed=tokens, price_per_gpu_hour=price, project_id=project, llm_base_url=llm_url,
        llm_model=llm_model, is_isolated=is_isolated,
    )  # fmt: skip
    return 0


@app.command()
def benchmark(
    target: Target,
    candidate: Annotated[str, typer.Option(help="What to compare with eager.")] = "agnitra",
    budget_s: BudgetS = 300.0,
    seed: Seed = 0,
    is_json: Json = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Compare one candidate with eager on TARGET; exit 1 on a regression or lost equivalence."""
    from agnitra_lab.cli import console

    loop = new_loop(target, artifacts=artifacts, suggest="preset", budget_s=budget_s, seed=seed, only=candidate)
    loop.on_checkpoint = None if is_json else console.print_checkpoint
    result = loop.run_all()
    console.print_comparison(result.report, is_json=is_json, paths=(result.json_path,))
    return 1 if result.report.comparison.verdict in ("slower", "not_equivalent") else 0


@app.command()
def profile(
    target: Target,
    repeat: Annotated[int, typer.Option(min=1, help="Calls to capture.")] = 3,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace too: a .json or .json.gz file.")] = None,
    is_json: Json = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Find out what burns the time of TARGET, down to the graph node."""
    from agnitra_lab.cli import console
    from agnitra_lab.loop import profile_run
    from agnitra_lab.workloads.target import resolve

    telemetry, directory = profile_run(
        resolve(target), artifacts=artifacts, repeat=repeat, trace=trace, command=_command()
    )
    console.print_telemetry(telemetry, directory, target, is_json=is_json)
    return 0


@app.command()
def generate(
    template: Annotated[str, typer.Argument(help="Kernel template, such as rms_norm.")],
    shape: Annotated[str, typer.Option(help="ROWSxCOLUMNS.")] = "4096x2048",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> int:
    """Print the Triton source of a kernel template at its preset config."""
    from agnitra_lab.generate.defaults import default_config
    from agnitra_lab.generate.render import render

    try:
        rows, columns = (int(edge) for edge in shape.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"Not a shape: {shape!r}.", hint="Expected ROWSxCOLUMNS, such as 4096x2048.") from error
    sys.stdout.write(render(default_config(template, (rows, columns), dtype)).source)
    return 0


def _optimize(target: str, **settings: Any) -> None:
    from agnitra_lab.cli import console

    loop = new_loop(target, **settings)
    loop.on_checkpoint = console.print_checkpoint
    console.print_start(loop.workload, loop.device_info)
    console.print_result(loop.run_all())


def new_loop(target: str, **settings: Any) -> Optimization:
    """Make a loop over a TARGET string, once it is known that its runs can be written."""
    # Before torch is loaded and the model is built: a folder that cannot be written is known at once.
    from agnitra_lab.runs.store import RunStore

    RunStore(settings["artifacts"]).check_writable()
    from agnitra_lab.workloads.target import resolve

    workload = resolve(target)
    from agnitra_lab.loop import Optimization, Settings

    return Optimization(workload, Settings(command=_command(), **settings))


def _sampler(sampler: SamplerName) -> str | None:
    return None if sampler is SamplerName.NONE else sampler.value


def _command() -> str:
    return shlex.join(["agnitra", *sys.argv[1:]])
