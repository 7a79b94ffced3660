"""What suggestions are worth without a language model, what they cost, and how long a bad server is waited for.

    python tests/benchmarks/suggestion.py [--quick] [--json] [--artifacts artifacts] [--landscapes FOLDER]

Presets: for every recorded landscape, the loss of the final speed (over the optimum) when the first 1, 2, 4 or 8
presets are measured and the best is taken, beside random draws of as many configs. Costs: ranking presets, building a
question, reading an answer. Bad servers: real sockets on the loopback, and how far past its deadline a round returns.
No language model is asked: none is part of this repository. The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.search import KernelConfig, SearchSpace
from agnitra_lab.device.info import describe
from agnitra_lab.errors import AgnitraError
from agnitra_lab.llm.client import ChatClient
from agnitra_lab.llm.settings import LLMSettings
from agnitra_lab.refine import replay
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore
from agnitra_lab.suggest import parsing, prompts
from agnitra_lab.suggest.kernel_presets import ranked
from agnitra_lab.suggest.rounds import Rounds
from agnitra_lab.suggest.sites import KernelSite

ROOT = Path(__file__).parents[2]
for folder in ("llm", "suggest"):
    sys.path.insert(0, str(ROOT / "tests" / "unit" / folder))
import llm_server as misbehave  # noqa: E402
from suggest_samples import CUDA, decoder_profile, decoder_record  # noqa: E402

COUNTS = (1, 2, 4, 8)
DEADLINE_S = 1.0
BAD_SERVERS: dict[str, Callable[[misbehave.Responder], None]] = {
    "prose": misbehave.answer("I would use bigger blocks."),
    "html": misbehave.respond(200, b"<html></html>", content_type="text/html"),
    "nothing": misbehave.respond(200, b""),
    "wrong_key": misbehave.error(401),
    "busy_for_ten_minutes": misbehave.respond(429, b"{}", retry_after="600"),
    "server_errors": misbehave.error(500),
    "truncated": misbehave.close_mid_body,
    "endless": misbehave.endless_body,
    "slow_drip": misbehave.drip_body,
    "slow_headers": misbehave.drip_headers,
    "silent": misbehave.stall_before_headers,
}


def preset_figures(folder: Path, num_draws: int) -> dict[str, Any]:
    """Return the losses in percent, a landscape at a time and over all of them."""
    figures: dict[str, Any] = {}
    losses: dict[int, list[float]] = {count: [] for count in COUNTS}
    for path in sorted(item for item in folder.iterdir() if item.suffix in (".json", ".npz")):
        try:
            recorded = replay.load(path)
        except AgnitraError as error:
            print(f"{path.name} is left out: {error}", file=sys.stderr)
            continue
        name = re.sub(r"\W+", "_", f"{recorded.template}_{'x'.join(map(str, recorded.shape))}_{recorded.dtype}")
        figures[f"{name}_num_configs"] = len(recorded.space.configs)
        presets = ranked(recorded.space, recorded.recorded.device)
        for count in COUNTS:
            loss = loss_percent(recorded, list(presets[:count]))
            losses[count].append(loss)
            figures[f"{name}_loss_of_{count}_percent"] = round(loss, 3)
        figures[f"{name}_random_loss_of_8_percent"] = round(random_loss_percent(recorded, num_draws), 3)
    for count in COUNTS:
        if losses[count]:
            figures[f"presets_loss_of_{count}_percent_max"] = round(max(losses[count]), 3)
            figures[f"presets_loss_of_{count}_percent_mean"] = round(statistics.mean(losses[count]), 3)
    return {"num_landscapes": len(losses[1]), **figures}


def loss_percent(recorded: replay.Landscape, configs: list[KernelConfig]) -> float:
    """Return how much slower than the optimum the best of some configs is; 1000% when none of them ran."""
    latencies = [latency for config in configs if (latency := measured_ms(recorded, config)) is not None]
    return 100 * (min(latencies) / recorded.best_latency_ms - 1) if latencies else 1000.0


def measured_ms(recorded: replay.Landscape, config: KernelConfig) -> float | None:
    try:
        return recorded.measure(config)
    except AgnitraError:
        return None


def random_loss_percent(recorded: replay.Landscape, num_draws: int) -> float:
    """Return the mean loss of the best of eight random configs."""
    chance, configs = random.Random(0), list(recorded.space.configs)
    draws = (chance.sample(configs, min(8, len(configs))) for _ in range(num_draws))
    return statistics.mean(loss_percent(recorded, draw) for draw in draws)


def large_space(num_configs: int) -> SearchSpace:
    """A space as large as the largest that a search is held to."""
    params = {
        "BLOCK_N": tuple(1 << n for n in range(4, 15)), "ROWS_PER_PROGRAM": tuple(range(1, 17)),
        "SPLIT": tuple(range(1, 9)), "num_warps": (1, 2, 4, 8, 16, 32), "num_stages": (1, 2, 3, 4),
    }  # fmt: skip
    points: list[dict[str, int]] = [{}]
    for name, values in params.items():
        points = [{**point, name: value} for point in points for value in values]
    configs = tuple(KernelConfig(template="softmax", params=point) for point in points[:num_configs])
    return SearchSpace(template="softmax", shape=(4096, 8192), dtype="bfloat16", params=params, configs=configs)


def cost_figures(num_repeats: int) -> dict[str, Any]:
    """Return milliseconds of what a round costs on this side, and the size of a question."""
    space = large_space(20_000)
    site = KernelSite(space, bytes_moved=134_217_728, flops=167_772_160)
    record, profile = decoder_record(), decoder_profile()
    messages = prompts.build(record, profile, CUDA, sites=(site,))
    latencies = {"target_latency_ms": 8.0, "expected_latency_ms": 9.0, "rationale": "The row fits one block."}
    items = [{"action": "softmax", "site": site.key, "params": c.params, **latencies} for c in space.configs[:8]]
    answer = json.dumps({"suggestions": items})
    asked = parsing.Asked(("softmax",), (site,))
    timed: dict[str, Callable[[], Any]] = {
        "rank_presets_20000_configs_ms": lambda: ranked(space, CUDA),
        "build_question_20000_configs_ms": lambda: prompts.build(record, profile, CUDA, sites=(site,)),
        "read_answer_of_8_ms": lambda: parsing.parse(answer, model="m", asked=asked),
    }
    figures: dict[str, Any] = {"question_chars": sum(len(message["content"]) for message in messages)}
    for name, call in timed.items():
        call()
        samples = []
        for _ in range(num_repeats):
            started_s = time.perf_counter()
            call()
            samples.append((time.perf_counter() - started_s) * 1e3)
        figures[f"{name}_p50"] = round(statistics.median(samples), 3)
    return figures


def server_figures(names: list[str]) -> dict[str, Any]:
    """Return how long a round takes with each bad server, and the most that one overran its deadline."""
    space = large_space(500)
    figures: dict[str, Any] = {"deadline_s": DEADLINE_S}
    # The client library's import is its own time, once.
    with misbehave.serve(misbehave.error(401)) as server:
        ask_once(server, space)
    for name in names:
        with misbehave.serve(BAD_SERVERS[name]) as server:
            took_s, rounds = ask_once(server, space)
        if rounds.fallback is None or len(rounds.rounds[0].suggestions) != 8:
            raise SystemExit(f"The server {name} left no presets.")
        figures[f"bad_server_{name}_s"] = round(took_s, 3)
    took = [value for key, value in figures.items() if key.startswith("bad_server_")]
    return figures | {"bad_server_overrun_s_max": round(max(max(took) - DEADLINE_S, 0.0), 3)}


def ask_once(server: misbehave.MisbehavingServer, space: SearchSpace) -> tuple[float, Rounds]:
    client = ChatClient(LLMSettings(server.base_url, None, "m", DEADLINE_S))
    rounds = Rounds(decoder_record(), decoder_profile(), CUDA, sites=(KernelSite(space),), client=client)
    started_s = time.perf_counter()
    rounds.ask()
    return time.perf_counter() - started_s, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--landscapes", type=Path, default=ROOT / "fixtures" / "landscapes")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    names = ["prose", "slow_drip"] if options.quick else list(BAD_SERVERS)
    figures = preset_figures(options.landscapes, 20 if options.quick else 1000)
    figures |= cost_figures(3 if options.quick else 30)
    figures |= server_figures(names)
    if not options.json:
        print(*(f"{key:<64}{value}" for key, value in figures.items()), sep="\n")
    if options.artifacts:
        run = RunStore(options.artifacts).create("suggestion", "suggestion", category="perf")
        command = "python tests/benchmarks/suggestion.py" + (" --quick" if options.quick else "")
        meta = provenance.meta(
            run.run_id, "perf", "suggestion", command=command, argv=[Path(sys.argv[0]).name, *sys.argv[1:]], seed=0,
            device=describe("cpu"), config={"deadline_s": DEADLINE_S, "counts": list(COUNTS)},
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "Presets against recorded landscapes, and bad servers."))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
