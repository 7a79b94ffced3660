"""What the profiler costs and how much it explains, on a small launch-bound GPT on the CPU.

    python tests/benchmarks/profiler.py [--quick] [--json] [--artifacts artifacts]

Ratios compare with torch.profiler alone in the same process, in interleaved rounds, in CPU time of the thread; the
same comparison of torch.profiler with itself is the noise. The last line is a JSON object of figures. With --artifacts
they are filed as a run, artifacts/perf/profiler/<run_id>/summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler prints each start and stop

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity

from agnitra_lab.contracts import Workload
from agnitra_lab.device.info import describe
from agnitra_lab.notebook.show import profile_bundle
from agnitra_lab.profiler.attribution import Context, attribute
from agnitra_lab.profiler.capture import capture_block, profile
from agnitra_lab.profiler.event_table import read_events
from agnitra_lab.profiler.frames import event_frame
from agnitra_lab.profiler.graphs import capture_roots
from agnitra_lab.profiler.markers import ModuleMarkers, module_paths
from agnitra_lab.profiler.rows import sum_rows
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore

WIDTH, NUM_HEADS, NUM_LAYERS, NUM_TOKENS, VOCABULARY = 64, 4, 4, 32, 256


class Block(nn.Module):
    """A pre-norm transformer block as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width] -> the same shape."""
        qkv = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (qkv[part].unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in range(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class SmallGPT(nn.Module):
    """Launch-bound: 4 layers of width 64 on 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(NUM_TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] -> logits [batch, tokens, vocabulary]."""
        x = self.embedding(ids) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bare_profiler() -> Any:
    """torch.profiler as it is, recording CPU ops."""
    return torch.profiler.profile(activities=[ProfilerActivity.CPU])


def thread_us(call: Callable[[], Any], num_calls: int) -> float:
    """CPU time of this thread for one call, in microseconds."""
    started_ns = time.thread_time_ns()
    for _ in range(num_calls):
        call()
    return (time.thread_time_ns() - started_ns) / num_calls / 1e3


def profiled_us(call: Callable[[], Any], num_calls: int, *, is_marked: bool) -> float:
    """CPU time of one call under the profiler, with or without the markers that attribution needs."""
    markers = ModuleMarkers() if is_marked else contextlib.nullcontext()
    profiler = bare_profiler()
    profiler.start()
    with markers:
        call()
        spent_us = thread_us(call, num_calls)
    profiler.stop()
    return spent_us


def capture_figures(call: Callable[[], Any], num_rounds: int) -> dict[str, float]:
    """The cost of a capture with attribution over torch.profiler alone, and of the latter over itself."""
    ratios, noise, plain, bare = [], [], [], []
    for _ in range(num_rounds):
        first = profiled_us(call, 40, is_marked=False)
        marked = profiled_us(call, 40, is_marked=True)
        second = profiled_us(call, 40, is_marked=False)
        plain.append(thread_us(call, 40))
        bare.append(first)
        ratios.append(2 * marked / (first + second))
        noise.append(second / first)
    return {
        "capture_over_bare_profiler": statistics.median(ratios),
        "capture_over_bare_profiler_p80": sorted(ratios)[int(0.8 * len(ratios))],
        "bare_profiler_over_itself": statistics.median(noise),
        "bare_profiler_over_itself_p80": sorted(noise)[int(0.8 * len(noise))],
        "bare_profiler_over_plain": statistics.median(b / p for b, p in zip(bare, plain, strict=True)),
        "plain_call_us": statistics.median(plain),
    }


def card_figures(call: Callable[[], Any], num_events: int) -> dict[str, float]:
    """CPU time of the process from the end of a cell of many events to its card, and through torch's own tables.

    The first figure is of a model whose graph is known from an earlier profile, the second of one that is traced anew.
    """
    with capture_block() as block:
        call()
    num_calls = max(1, num_events // (block.telemetry.record.num_events or 1))
    best_s = float("inf")
    for _ in range(3):
        with capture_block() as block:
            for _ in range(num_calls):
                call()
            ended_s = time.process_time()
        card = profile_bundle(block.telemetry.record)
        best_s = min(best_s, time.process_time() - ended_s)
    new_model, ids = SmallGPT().eval(), torch.zeros(1, NUM_TOKENS, dtype=torch.long)
    with capture_block() as new_block, torch.no_grad():
        for _ in range(num_calls):
            new_model(ids)
        new_ended_s = time.process_time()
    profile_bundle(new_block.telemetry.record)
    new_s = time.process_time() - new_ended_s
    with bare_profiler() as profiler:
        for _ in range(num_calls):
            call()
        ended_s = time.process_time()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)
    torch_s = time.process_time() - ended_s
    assert card["text/html"] and table
    return {
        "card_events": float(block.telemetry.record.num_events or 0),
        "end_of_cell_to_card_cpu_s": best_s,
        "end_of_cell_to_card_of_a_new_model_cpu_s": new_s,
        "end_of_cell_to_torch_table_cpu_s": torch_s,
        "card_html_bytes": float(len(card["text/html"])),
    }


def frame_figures(model: nn.Module, call: Callable[[], Any], num_events: int) -> dict[str, float]:
    """Events a second from the profiler's raw result to attributed frames, stop() excluded; bytes on disk."""
    markers = ModuleMarkers()
    best_s, events = float("inf"), 0
    for _ in range(3):
        profiler = bare_profiler()
        profiler.start()
        with markers:
            while events < num_events:
                call()
                events += 600
        profiler.stop()
        graphs = capture_roots(markers.roots)
        started_s = time.process_time()
        table = read_events(profiler.profiler.kineto_results.events())
        attribution = attribute(table, Context(module_paths(markers), graphs.graphs, markers.gradients))
        tables = sum_rows(attribution, has_device=False, num_calls=1)
        frame = event_frame(attribution)
        best_s = min(best_s, time.process_time() - started_s)
        events = 0
    started_s = time.process_time()
    num_torch_events = len(profiler.events())
    torch_s = time.process_time() - started_s
    with tempfile.TemporaryDirectory() as folder, capture_block() as block:
        for _ in range(max(1, num_events // 600)):
            call()
    with tempfile.TemporaryDirectory() as folder:
        _, path = block.telemetry.save(folder)
        num_bytes = path.stat().st_size
    assert len(frame) == len(table) and tables.ops
    return {
        "frame_events": float(len(table)),
        "events_into_frames_per_s": len(table) / best_s,
        "torch_events_per_s": num_torch_events / torch_s,
        "parquet_bytes_per_event": num_bytes / len(block.telemetry.events),
    }


def share_figures(model: nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Shares of the ATen self time by owner: inference and training, traced and exported."""
    figures: dict[str, float] = {}
    programs = {
        "eager": model,
        "traced": torch.fx.symbolic_trace(model),
        "exported": torch.export.export(model, (ids,)).module(),
    }
    for name, program in programs.items():
        found = profile(Workload(name, program, (ids,)), repeat=5).record.owners
        figures[f"{name}_inference_attributed_share"] = 1.0 - found.residual
        figures[f"{name}_inference_exact_node_share"] = found.exact_node
    for name in ("eager", "traced"):
        program = programs[name]
        optimizer = torch.optim.AdamW(program.parameters(), lr=1e-4)

        def step(program: Any = program, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(program(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()

        # Forward and backward alone, as the baselines in the notes were taken; then the whole step.
        def forward_backward(program: Any = program) -> None:
            program(ids).sum().backward()

        for what, body in (("forward_backward", forward_backward), ("training_step", step)):
            found = profile(body, repeat=5, num_warmup=2).record.owners
            figures[f"{name}_{what}_attributed_share"] = 1.0 - found.residual
            figures[f"{name}_{what}_exact_node_share"] = found.exact_node
            figures[f"{name}_{what}_param_grad_share"] = found.param_grad
            figures[f"{name}_{what}_outside_graph_share"] = found.outside_graph
    return figures


def growth_figures(call: Callable[[], Any], num_profiles: int) -> dict[str, float]:
    """Growth of the resident set over many profiles in one process, after the first tenth."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    for _ in range(max(1, num_profiles // 10)):
        profile(call)
    before = resident_bytes()
    for _ in range(num_profiles):
        profile(call)
    return {"profiles": float(num_profiles), "growth_mib": (resident_bytes() - before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--only", nargs="*", default=["capture", "card", "frames", "shares", "growth"])
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, ids = SmallGPT().eval(), torch.randint(0, VOCABULARY, (1, NUM_TOKENS))
    scale = 10 if options.quick else 1

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(ids)

    for _ in range(20):
        call()
    figures: dict[str, float] = {}
    parts: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("capture", lambda: capture_figures(call, 60 // scale)),
        ("card", lambda: card_figures(call, 100_000 // scale)),
        ("frames", lambda: frame_figures(model, call, 100_000 // scale)),
        ("shares", lambda: share_figures(model, ids)),
        ("growth", lambda: growth_figures(call, 1000 // scale) if options.only == ["growth"] else alone("growth")),
    ]

    def alone(name: str) -> dict[str, float]:
        """Measure one part in a new process, which the memory of the others does not disturb."""
        arguments = [sys.executable, __file__, "--json", "--only", name, *(["--quick"] if options.quick else [])]
        printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        return json.loads(printed.strip().splitlines()[-1])

    for name, measure in parts:
        if name not in options.only:
            continue
        found = measure()
        figures |= found
        if not options.json:
            print(name, *(f"\n  {key:<48}{value:.4g}" for key, value in found.items()))
    if options.artifacts:
        run = RunStore(options.artifacts).create("profiler", "profiler", category="perf")
        command = "python tests/benchmarks/profiler.py" + (" --quick" if options.quick else "")
        meta = provenance.meta(
            run.run_id, "perf", "profiler", command=command, argv=sys.argv, seed=0, device=describe("cpu"),
            config={"num_layers": NUM_LAYERS, "width": WIDTH, "num_tokens": NUM_TOKENS, "num_threads": 1},
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "What the profiler costs and how much it explains."))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
