"""What the profiler ties to graph nodes on a GPU: the 1.1B decoder, eager, compiled and replayed, and a training step.

    python tests/benchmarks/profiler_on_gpu.py --artifacts artifacts [--quick] [--only decode]

Each capture is filed as a run, artifacts/profiles/<topic>/<run_id>/, with telemetry.json and events.parquet. The last
line is a JSON object of figures; with --artifacts they are filed under artifacts/perf/profiler_on_gpu/ too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler prints each start and stop

import torch
import torch.nn.functional as F
from profiler import growth_figures  # the script beside this one
from torch.profiler import ProfilerActivity

from agnitra_lab.device.graphs import capture
from agnitra_lab.device.info import describe
from agnitra_lab.profiler.capture import profile
from agnitra_lab.profiler.markers import ModuleMarkers
from agnitra_lab.profiler.telemetry import Telemetry
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore
from agnitra_lab.workloads.demos import demo

COMMAND = "python tests/benchmarks/profiler_on_gpu.py"


def file_run(telemetry: Telemetry, topic: str, artifacts: str, options: argparse.Namespace) -> str:
    """File one capture as a profile run and return its id."""
    run = RunStore(artifacts).create("profile", topic, category="profiles")
    telemetry.save(run.directory("profiles"))
    meta = provenance.meta(
        run.run_id, "profile", topic, command=f"{COMMAND} --artifacts artifacts", argv=sys.argv, seed=0,
        device=telemetry.record.device, config={"topic": topic, "quick": options.quick},
    )  # fmt: skip
    filed = summary.summarise(meta, summary.profile_results(telemetry.record))
    run.finish("profiles", filed, run_markdown(filed, f"Profile of {topic}: where its GPU time goes."))
    return run.run_id


def figures_of(telemetry: Telemetry) -> dict[str, Any]:
    """Shares of the GPU's kernel time by owner, and how well the node table adds up to it."""
    record, owners = telemetry.record, telemetry.record.owners
    kernels_ms = sum(row.device_ms for row in telemetry.all_kernels)
    nodes_ms = sum(node.device_ms or 0.0 for node in telemetry.all_nodes)
    idle, gpm = record.gpu.idle, record.gpu.gpm
    return {
        "attributed_share": 1.0 - owners.residual if owners else None,
        "exact_node_share": owners.exact_node if owners else None,
        "param_grad_share": owners.param_grad if owners else None,
        "optimizer_share": owners.optimizer if owners else None,
        "outside_graph_share": owners.outside_graph if owners else None,
        "device_ms": kernels_ms,
        "node_sum_over_device_time": nodes_ms / kernels_ms if kernels_ms else None,
        "wall_ms": record.wall_ms,
        "profiled_ms": record.profiled_ms,
        "gpu_busy_share": record.gpu.gpu_utilisation,
        "launch_bound_share": idle.launch_bound_share if idle else None,
        "peak_memory_gib": (record.memory.peak_memory_bytes or 0) / 2**30 if record.memory else None,
        "num_events": record.num_events,
        "num_graph_nodes": record.num_graph_nodes,
        "graph_ms": telemetry.graph_capture_ms,
        "read_ms": record.overhead.read_ms if record.overhead else None,
        "sm_utilisation": gpm.sm_utilisation if gpm else None,
        "energy_j": record.gpu.energy_j,
    }


def capture_ratio(call: Callable[[], Any], num_rounds: int) -> dict[str, float]:
    """Host wall time of a marked capture over torch.profiler alone, interleaved, and of the latter over itself."""

    def wall_ms(is_marked: bool) -> float:
        markers = ModuleMarkers() if is_marked else contextlib.nullcontext()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]), markers:
            call()
            torch.cuda.synchronize()
            started_ns = time.perf_counter_ns()
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            return (time.perf_counter_ns() - started_ns) / 5e6

    ratios, noise = [], []
    for _ in range(num_rounds):
        first, marked, second = wall_ms(False), wall_ms(True), wall_ms(False)
        ratios.append(2 * marked / (first + second))
        noise.append(second / first)
    return {
        "capture_over_bare_profiler": statistics.median(ratios),
        "bare_profiler_over_itself": statistics.median(noise),
        "bare_profiler_over_itself_p80": sorted(noise)[int(0.8 * len(noise))],
    }


def inference_captures(name: str, scale: str) -> Any:
    """Yield (topic, telemetry, more figures) for one demo: eager, compiled, reduce-overhead, a graph by hand."""
    workload = demo(name, scale=scale, device="cuda")
    with torch.no_grad():
        eager = profile(workload)
        yield f"{name}-eager", eager, capture_ratio(workload, 7)
        yield (
            f"{name}-eager-cuda-graph",
            profile(capture(workload, num_warm_calls=3)[0].replay, repeat=3, num_warmup=2, reference=eager),
            {},
        )
        for topic, mode in (("compiled", None), ("reduce-overhead", "reduce-overhead")):
            torch._dynamo.reset()
            started_s = time.perf_counter()
            compiled = replace(workload, model=torch.compile(workload.model, mode=mode))
            for _ in range(4):
                compiled()
            compile_s = time.perf_counter() - started_s
            yield f"{name}-{topic}", profile(compiled), {"compile_s": compile_s}
    torch._dynamo.reset()


def training_captures(scale: str) -> Any:
    """Yield the captures of a training step: the decoder on 1,024 tokens, cross-entropy, AdamW; eager and compiled."""
    workload = demo("llama-prefill", scale=scale, device="cuda")
    model = workload.model.train()
    ids = next(value for value in (*workload.args, *workload.kwargs.values()) if isinstance(value, torch.Tensor))[:1]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(run: Callable[..., Any]) -> None:
        optimizer.zero_grad()
        logits = run(ids, *workload.args[1:], **workload.kwargs)
        F.cross_entropy(logits.flatten(0, -2).float(), ids.expand(*logits.shape[:-1]).flatten()).backward()
        optimizer.step()

    yield "llama-training-eager", profile(lambda: step(model), repeat=2, num_warmup=2, should_time=True), {}
    torch._dynamo.reset()
    compiled = torch.compile(model)
    yield "llama-training-compiled", profile(lambda: step(compiled), repeat=2, num_warmup=2, should_time=True), {}


def growth_on_gpu(num_profiles: int) -> dict[str, float]:
    """Growth of the resident set over many profiles of a small model, after the first tenth."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).cuda().eval()
    x = torch.randn(8, 64, device="cuda")

    def call() -> None:
        with torch.no_grad():
            model(x)

    return growth_figures(call, num_profiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, a tenth of the profiles")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--only", nargs="*", default=["decode", "prefill", "training", "growth"])
    parser.add_argument("--artifacts", help="file the captures and the figures as runs in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device; tests/benchmarks/profiler.py runs on a CPU.")
    scale = "tiny" if options.quick else "full"
    torch.manual_seed(0)
    sources = {
        "decode": lambda: inference_captures("llama-decode", scale),
        "prefill": lambda: inference_captures("llama-prefill", scale),
        "training": lambda: training_captures(scale),
    }
    figures: dict[str, Any] = {}
    for name in (name for name in sources if name in options.only):
        for topic, telemetry, more in sources[name]():
            found = figures_of(telemetry) | more
            if options.artifacts:
                found["run_id"] = file_run(telemetry, topic, options.artifacts, options)
            figures |= {f"{topic.replace('-', '_')}_{key}": value for key, value in found.items()}
            if not options.json:
                print(
                    topic, json.dumps(found, indent=1), telemetry.record.graph_note, telemetry.record.notes, flush=True
                )
        torch.cuda.empty_cache()
    if "growth" in options.only:
        grown = growth_on_gpu(100 if options.quick else 1000)
        figures |= grown
        print("growth", grown, flush=True)
    if options.artifacts:
        run = RunStore(options.artifacts).create("profiler", "profiler_on_gpu", category="perf")
        meta = provenance.meta(
            run.run_id, "perf", "profiler_on_gpu", command=f"{COMMAND} --artifacts artifacts", argv=sys.argv,
            seed=0, device=describe("cuda"), config={"scale": scale, "only": options.only},
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "What the profiler ties to graph nodes on a GPU."))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
