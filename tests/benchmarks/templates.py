"""Every memory-bound template on a GPU: the rule of thumb and the best of a few configs, eager and torch.compile.

    python tests/benchmarks/templates.py [--quick] [--only softmax layer_norm] [--num-configs 40] [--json FILE]

Times are device times of a CUDA graph's replay with a cold L2 (`benchmark.timing.measure_kernel`). Outputs are held
against the template's reference in float64 before they are timed. Beside the device's copy bandwidth, which large
tensors reach, stands torch's own copy of the site's bytes: a small one is bound by its launch and its tail. The last
line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from agnitra_lab.benchmark.elements import match, rtol_of
from agnitra_lab.benchmark.timing import measure_kernel
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.device.info import describe
from agnitra_lab.device.peaks import measure_peaks
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.graph.tree import map_tensors, tensors

SITES: list[tuple[str, tuple[int, ...], str]] = [
    ("rms_norm", (16384, 4096), "bfloat16"),
    ("rms_norm", (4096, 2048), "bfloat16"),
    ("swiglu", (16384, 14336), "bfloat16"),
    ("swiglu", (4096, 5632), "bfloat16"),
    ("layer_norm", (16384, 4096), "bfloat16"),
    ("layer_norm", (16384, 1024), "float32"),
    ("layer_norm", (16, 4194304), "float32"),
    ("channel_norm", (16, 64, 65536), "float32"),
    ("channel_norm", (32, 384, 3136), "bfloat16"),
    ("group_norm", (512, 8, 4096), "bfloat16"),
    ("group_norm", (64, 16, 65536), "float32"),
    # N, channels, then extents, taps, strides and dilations of depth, height and width; 1 for planes, 2 for channels
    # innermost.
    ("depthwise_conv", (32, 384, 1, 56, 56, 1, 7, 7, 1, 1, 1, 1, 1, 1, 1), "bfloat16"),
    ("depthwise_conv", (32, 384, 1, 56, 56, 1, 7, 7, 1, 1, 1, 1, 1, 1, 2), "bfloat16"),
    ("depthwise_conv", (32, 384, 1, 56, 56, 1, 7, 7, 1, 1, 1, 1, 1, 1, 1), "float32"),
    ("depthwise_conv", (32, 144, 1, 112, 112, 1, 3, 3, 1, 2, 2, 1, 1, 1, 2), "bfloat16"),
    ("depthwise_conv", (8, 2048, 1, 1, 4096, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1), "bfloat16"),
    ("depthwise_conv", (8, 2048, 1, 1, 4096, 1, 1, 4, 1, 1, 1, 1, 1, 1, 2), "bfloat16"),
    ("softmax", (16384, 4096), "bfloat16"),
    ("softmax", (512, 131072), "bfloat16"),
    ("softmax", (1024, 4096), "float32"),
    ("softmax", (4, 1000000), "float32"),
    ("cross_entropy", (1024, 128256), "bfloat16"),
    ("cross_entropy", (8192, 32000), "bfloat16"),
    ("cross_entropy", (4096, 1000), "float32"),
    ("cumsum", (2048, 32768), "float32"),
    ("cumsum", (16384, 4096), "bfloat16"),
    ("rope", (4, 1024, 32, 64), "bfloat16"),
]
REQUIRED_SHARE = 0.999
NUM_WORKERS = 12


def configs_of(template: str, shape: tuple[int, ...], dtype: str, num_configs: int) -> list[KernelConfig]:
    """The rule of thumb first, half of all from around it, half from an even walk through the rest of the space."""
    start = default_config(template, shape, dtype)

    def steps(config: KernelConfig) -> float:
        return sum(abs(math.log2(value / start.params[name])) for name, value in config.params.items())

    ordered = sorted(registry.load(template).space(shape, dtype).configs, key=steps)
    near, rest = ordered[: num_configs // 2], ordered[num_configs // 2 :]
    return near + rest[:: max(1, -(-len(rest) // max(1, num_configs - len(near))))]


def is_right(output: Any, expected: Any) -> bool:
    for (_, out), (_, ref) in zip(tensors(output), tensors(expected), strict=True):
        found = match(out, ref.to(out.dtype), ref, rtol=rtol_of(out.dtype), required_share=REQUIRED_SHARE)
        if found.problem is not None or found.share < found.required_share:
            return False
    return True


def compile_ahead(template: str, shape: tuple[int, ...], dtype: str, configs: list[KernelConfig]) -> None:
    """Run some configs once, in a worker, for what that leaves in Triton's cache; what fails fails again when timed."""
    arguments, options = registry.load(template).example(shape, dtype, "cuda")
    for config in configs:
        with torch.no_grad(), contextlib.suppress(Exception):
            render(config).call(*arguments, **options)


def copy_us(num_bytes: float) -> float:
    """Device time of torch's copy that reads and writes `num_bytes` in all, in us."""
    source = torch.empty(int(num_bytes) // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return measure_kernel(lambda: target.copy_(source), device="cuda") * 1e3


def measure_site(
    pool: ProcessPoolExecutor, template: str, shape: tuple[int, ...], dtype: str, num_configs: int, copy_gb_per_s: float
) -> dict:
    module = registry.load(template)
    configs = configs_of(template, shape, dtype, num_configs)
    shares = [configs[i::NUM_WORKERS] for i in range(min(NUM_WORKERS, len(configs)))]
    for done in [pool.submit(compile_ahead, template, shape, dtype, share) for share in shares]:
        done.result()
    arguments, options = module.example(shape, dtype, "cuda")
    num_bytes, _ = module.cost(shape, dtype)

    def widen(value: Any) -> Any:
        wide = map_tensors(((value,), {}), lambda t: t.double() if t.is_floating_point() else t)
        return wide[0][0]

    expected = module.reference(*[widen(a) for a in arguments], **{k: widen(v) for k, v in options.items()})
    row: dict[str, Any] = {"template": template, "shape": list(shape), "dtype": dtype, "copy_us": copy_us(num_bytes)}
    times: list[tuple[float, str]] = []
    for config in configs:
        try:
            call = render(config).call
            if not is_right(call(*arguments, **options), expected):
                print(f"  WRONG {config.key()}", flush=True)
                continue
            times.append((measure_kernel(lambda c=call: c(*arguments, **options), device="cuda") * 1e3, config.key()))
            row.setdefault("default_us", times[-1][0])
        except Exception as error:
            print(f"  FAILED {config.key()}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    del expected
    row["num_configs"] = len(times)
    if times:
        row["best_us"], row["best_config"] = min(times)
        row["gb_per_s"] = num_bytes / row["best_us"] / 1e3
        row["share_of_copy"] = row["gb_per_s"] / copy_gb_per_s
        row["share_of_own_copy"] = row["copy_us"] / row["best_us"]
    for name, function in (("eager", module.reference), ("compile", torch.compile(module.reference, dynamic=False))):
        try:
            row[f"{name}_us"] = measure_kernel(lambda f=function: f(*arguments, **options), device="cuda") * 1e3
        except Exception as error:
            print(f"  {name} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)
    return row


def line_of(row: dict[str, Any]) -> str:
    site = f"{row['template']} {tuple(row['shape'])} {row['dtype']}"
    shares = f"{row.get('share_of_copy', 0):.3f} of copy, {row.get('share_of_own_copy', 0):.3f} of its own"
    others = ", ".join(f"{name} {row.get(f'{name}_us', 0):.1f}" for name in ("default", "compile", "eager"))
    return f"{site}: best {row.get('best_us', 0):.1f} us ({shares}), {others}; {row.get('best_config')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four configs a site")
    parser.add_argument("--num-configs", type=int, default=14)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--json", default=None, help="write the rows to this file too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    device = describe("cuda")
    peaks = measure_peaks("cuda", torch.bfloat16)
    copy = peaks.copy_bandwidth_gb_per_s or 1.0
    print(f"{device.name}, torch {device.torch_version}, copy {copy:.0f} GB/s", flush=True)
    rows = []
    workers = ProcessPoolExecutor(NUM_WORKERS, mp_context=multiprocessing.get_context("spawn"))
    with workers as pool, torch.no_grad():
        for template, shape, dtype in SITES:
            if template not in registry.TEMPLATES or (given.only is not None and template not in given.only):
                continue
            started = time.perf_counter()
            try:
                row = measure_site(pool, template, shape, dtype, 4 if given.quick else given.num_configs, copy)
            except Exception as error:
                print(f"{template} {shape} {dtype}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            rows.append(row)
            print(line_of(row), f"[{time.perf_counter() - started:.0f} s]", flush=True)
            if given.json:
                with open(given.json, "w") as file:  # noqa: PTH123
                    json.dump({"device": device.model_dump(mode="json"), "copy_gb_per_s": copy, "rows": rows}, file)
    shares = [row["share_of_copy"] for row in rows if "share_of_copy" in row]
    figures = {
        "device": device.name, "copy_gb_per_s": copy, "num_sites": len(rows),
        "share_of_copy_min": min(shares, default=None),
        "share_of_copy_median": statistics.median(shares) if shares else None,
        "share_of_own_copy_min": min((row["share_of_own_copy"] for row in rows if "best_us" in row), default=None),
        "num_at_least_092": sum(share >= 0.92 for share in shares),
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
