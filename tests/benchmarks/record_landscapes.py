"""Record what every valid config of every kernel template costs on this GPU, one JSON file a template and shape.

    python tests/benchmarks/record_landscapes.py --out fixtures/landscapes [--quick] [--only rms_norm]

A sample is the span between two CUDA events around one replay of a CUDA graph that holds one call, with the L2 filled
by reading a 256 MB buffer before the first event. The samples of all configs of a landscape are taken in rounds, so
that a drift of the clock reaches all of them alike. Eager, torch.compile and a device copy of as many bytes are
measured the same way in the same rounds. The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.refine.replay import LandscapeFailure, LandscapeFile, LandscapeRow

SHAPES = {
    "rms_norm": ((1, 2048), (4096, 2048), (16384, 4096)),
    "swiglu": ((1, 5632), (4096, 5632), (16384, 14336)),
}
QUICK_SHAPES = {"rms_norm": ((4096, 2048),), "swiglu": ((4096, 5632),)}
DTYPE = torch.bfloat16
STREAMS = {"rms_norm": 2, "swiglu": 3}
"""Tensors of the full shape that one call reads or writes."""
FLUSH_BYTES = 256 * 2**20
TIMING = "CUDA events around one CUDA graph replay of one call; cold L2 (256 MB read before the first event); median"


def make_inputs(template: str, shape: tuple[int, ...], *, is_filled: bool = True) -> tuple[Any, ...]:
    """Return the positional arguments of a template's call, with fixed random values."""
    torch.manual_seed(0)
    new = torch.randn if is_filled else torch.empty
    if template == "rms_norm":
        return new(shape, device="cuda", dtype=DTYPE), new(shape[-1], device="cuda", dtype=DTYPE), 1e-6
    merged = new((*shape[:-1], 2 * shape[-1]), device="cuda", dtype=DTYPE)
    return merged.chunk(2, dim=-1)


def compile_ahead(configs: list[tuple[KernelConfig, tuple[int, ...]]], num_processes: int) -> None:
    """Fill Triton's disk cache in parallel: one process compiles about one config a second."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes) as pool:
        for _ in pool.imap_unordered(_compile_one, configs, chunksize=4):
            pass


def _compile_one(point: tuple[KernelConfig, tuple[int, ...]]) -> None:
    config, shape = point
    try:
        with torch.inference_mode():
            render(config).call(*make_inputs(config.template, shape, is_filled=False))
            torch.cuda.synchronize()
    except Exception as error:  # the measuring process meets the same failure and files it
        print(f"ahead of time: {config.key()}: {type(error).__name__}", file=sys.stderr)


def capture(call: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of one call, after three calls outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


class Clock:
    """Takes cold samples of captured calls."""

    def __init__(self) -> None:
        self._cold = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self._sink = torch.empty((), device="cuda")

    def sample_us(self, graph: torch.cuda.CUDAGraph, num_samples: int) -> list[float]:
        """Return `num_samples` spans in microseconds, enqueued together so that the host is never waited for."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_samples)
        ]
        for start, end in events:
            torch.sum(self._cold, dim=0, out=self._sink)
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1000 for start, end in events]


def is_right(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare with the fp32 result by the project's rule for bf16: 99.9% of elements within 1.6e-2."""
    tolerance = 1.6e-2 * (expected.pow(2).mean().sqrt() + expected.abs())
    return bool(((output.float() - expected).abs() <= tolerance).float().mean() >= 0.999)


def baselines(template: str, shape: tuple[int, ...], inputs: tuple[Any, ...], is_quick: bool) -> dict[str, Callable]:
    """Return what a config is compared with: eager, torch.compile, and a copy of as many bytes."""
    reference = registry.load(template).reference
    # Every shape is compiled for itself, and more of them than the limit of recompilations of one function.
    torch._dynamo.reset()
    num_elements = STREAMS[template] * inputs[0].numel() // 2
    source, target = (torch.zeros(num_elements, device="cuda", dtype=DTYPE) for _ in range(2))
    calls: dict[str, Callable] = {"copy": lambda: target.copy_(source), "eager": lambda: reference(*inputs)}
    modes = {"compile": None} if is_quick else {"compile": None, "max_autotune": "max-autotune-no-cudagraphs"}
    for name, mode in modes.items():
        compiled = torch.compile(reference, mode=mode, dynamic=False, fullgraph=True)
        calls[name] = lambda compiled=compiled: compiled(*inputs)
    return calls


def record(
    template: str, shape: tuple[int, ...], clock: Clock, is_quick: bool, num_rounds: int
) -> tuple[LandscapeFile, dict[str, Any]]:
    """Measure one landscape and its baselines."""
    module, inputs = registry.load(template), make_inputs(template, shape)
    space = module.space(shape, str(DTYPE))
    expected = module.reference(*(value.float() if torch.is_tensor(value) else value for value in inputs))
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    failures: list[LandscapeFailure] = []
    pool = torch.cuda.graph_pool_handle()
    for config in space.configs:
        try:
            call = render(config).call
            if not is_right(call(*inputs), expected):
                raise RuntimeError("the output differs from the reference")
            graphs[config.key()] = capture(lambda call=call: call(*inputs), pool)
        except Exception as error:  # a config that cannot run is a fact about the landscape
            failures.append(LandscapeFailure(params=config.params, detail=f"{type(error).__name__}: {error}"[:300]))
    others = baselines(template, shape, inputs, is_quick)
    graphs |= {name: capture(call, pool) for name, call in others.items()}
    samples: dict[str, list[float]] = {key: [] for key in graphs}
    for _ in range(num_rounds):
        for key, graph in graphs.items():
            samples[key] += clock.sample_us(graph, 10)
    rows = tuple(
        LandscapeRow(
            params=config.params,
            latency_us_p50=round(statistics.median(samples[config.key()]), 3),
            samples_us=tuple(round(sample, 3) for sample in samples[config.key()]),
        )
        for config in space.configs
        if config.key() in graphs
    )
    landscape = LandscapeFile(
        template=template,
        shape=shape,
        dtype=space.dtype,
        device=device_info(),
        versions=versions(),
        command="python tests/benchmarks/record_landscapes.py --out fixtures/landscapes" + " --quick" * is_quick,
        timing=TIMING,
        params=space.params,
        rows=rows,
        failures=tuple(failures),
    )
    return landscape, figures(landscape, {name: statistics.median(samples[name]) for name in others})


def figures(landscape: LandscapeFile, others_us: dict[str, float]) -> dict[str, Any]:
    """Summarise a landscape against its baselines and its ceiling."""
    ordered = sorted(landscape.rows, key=lambda row: row.latency_us_p50)
    best, start = ordered[0], default_config(landscape.template, landscape.shape, landscape.dtype)
    default_us = next((row.latency_us_p50 for row in ordered if row.params == start.params), None)
    num_bytes = STREAMS[landscape.template] * 2
    for extent in landscape.shape:
        num_bytes *= extent
    return {
        "num_configs": len(ordered),
        "num_failed": len(landscape.failures),
        "best": best.params,
        "best_us": best.latency_us_p50,
        "default_us": default_us,
        "median_us": ordered[len(ordered) // 2].latency_us_p50,
        "worst_us": ordered[-1].latency_us_p50,
        "best_gb_per_s": round(num_bytes / best.latency_us_p50 / 1e3, 1),
        "copy_gb_per_s": round(num_bytes / others_us["copy"] / 1e3, 1),
        **{f"{name}_us": round(value, 3) for name, value in others_us.items()},
    }


def device_info() -> DeviceInfo:
    """Describe the GPU and the versions on it."""
    properties = torch.cuda.get_device_properties(0)
    driver = None
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # the driver's version is a courtesy; its absence is recorded as None
        driver = None
    return DeviceInfo(
        type="cuda",
        name=properties.name,
        arch=f"sm{properties.major}{properties.minor}",
        num_multiprocessors=properties.multi_processor_count,
        total_memory_bytes=properties.total_memory,
        l2_cache_bytes=getattr(properties, "L2_cache_size", None),
        torch_version=torch.__version__,
        triton_version=versions()["triton"],
        cuda_version=torch.version.cuda,
        driver_version=driver,
        python_version=platform.python_version(),
    )


def versions() -> dict[str, str]:
    """Return the versions that decide what a kernel compiles to."""
    import triton

    return {"torch": str(torch.__version__), "triton": triton.__version__, "python": platform.python_version()}


def main() -> int:
    """Record all landscapes, writing each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="one shape a template, 20 samples a config")
    parser.add_argument("--only", choices=sorted(SHAPES), help="one template")
    arguments = parser.parse_args()
    reason = registry.is_available()
    if reason is not None:
        print(f"Nothing was recorded: {reason}.", file=sys.stderr)
        return 3
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    plan = [(name, shape) for name in shapes for shape in shapes[name] if arguments.only in (None, name)]
    points = [(c, shape) for name, shape in plan for c in registry.load(name).space(shape, str(DTYPE)).configs]
    compile_ahead(points, max(1, min(12, (os.cpu_count() or 2) - 2)))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), **versions()}
    result["compile_ahead_s"] = round(time.perf_counter() - began, 1)
    print(f"{len(points)} kernels compiled in {result['compile_ahead_s']} s", flush=True)
    clock = Clock()
    with torch.inference_mode():
        for name, shape in plan:
            landscape, summary = record(name, shape, clock, arguments.quick, 2 if arguments.quick else 4)
            (arguments.out / landscape.file_name()).write_text(landscape.to_json() + "\n", encoding="utf-8")
            subject = f"{name}_{'x'.join(map(str, shape))}"
            result |= {f"{subject}_{key}": value for key, value in summary.items()}
            print(f"{subject}: {json.dumps(summary)}", flush=True)
            torch.cuda.empty_cache()
    result["wall_s"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
