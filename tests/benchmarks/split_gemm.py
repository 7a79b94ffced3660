"""fp32 products on the tensor cores against SGEMM: TFLOP/s with and without the split of A, and the error of both.

    python tests/benchmarks/split_gemm.py [--quick] [--json] [--artifacts artifacts]

The configs of a shortlist are compiled in parallel, timed at 4096 x 4096 x 4096 and at 1024 x 1024 x 4096, and the best
of them are what the other shapes choose from. A time is the median span of a CUDA graph replay of one call, the L2
filled by a read of 256 MB before each. Errors are against a product in fp64 on the device. Every figure has SGEMM's
(torch.mm with TF32 off) beside it, measured in the same rounds. The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.device.graphs import capture
from agnitra_lab.device.info import describe
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render
from agnitra_lab.runs import provenance, summary
from agnitra_lab.runs.markdown import run_markdown
from agnitra_lab.runs.store import RunStore

COMMAND = "python tests/benchmarks/split_gemm.py"
TUNED_SHAPES = ((1, 4096, 4096, 4096), (1, 1024, 1024, 4096))
SHAPES = (
    *TUNED_SHAPES,
    (1, 2048, 8192, 4096),
    (1, 1024, 4096, 1024),
    (1, 1024, 1024, 1024),
    (1, 2048, 2048, 2048),
    (1, 8192, 8192, 8192),
    (1, 16384, 2048, 512),
    (1, 128, 4096, 4096),
    (1, 1000, 3001, 2053),
    (1, 1024, 1024, 32768),
    (16, 512, 512, 1024),
    (1, 16384, 16384, 64),
    (1, 8192, 8192, 128),
)
"""(batches, M, N, K)."""
QUICK_SHAPES = (*TUNED_SHAPES, (1, 1000, 3001, 2053), (16, 512, 512, 1024))
POSITIVE_SIZES = ((512, 768), (1024, 1024), (2048, 1024), (2048, 2048))
FLUSH_BYTES = 256 * 2**20
BLOCKS = (
    # BLOCK_M, BLOCK_N, BLOCK_K, K_CHUNK, num_warps, num_stages
    (128, 128, 64, 64, 8, 3),
    (128, 128, 64, 64, 8, 2),
    (128, 128, 64, 128, 8, 3),
    (128, 128, 32, 64, 8, 4),
    (128, 128, 32, 32, 8, 4),
    (128, 128, 32, 128, 8, 5),
    (64, 256, 64, 64, 8, 2),
    (64, 256, 32, 64, 8, 4),
    (64, 128, 64, 64, 4, 4),
    (64, 128, 64, 64, 4, 2),
    (64, 128, 32, 32, 4, 4),
    (64, 128, 32, 32, 4, 3),
    (128, 64, 64, 64, 4, 4),
    (128, 64, 64, 64, 4, 2),
    (128, 64, 32, 64, 4, 4),
)


def shortlist(is_quick: bool) -> list[KernelConfig]:
    """Return the configs to try: every block shape, and both groupings of the large ones."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "K_CHUNK", "num_warps", "num_stages")
    chosen = BLOCKS[:1] + BLOCKS[3:4] + BLOCKS[8:9] + BLOCKS[11:12] if is_quick else BLOCKS
    points = [dict(zip(names, blocks, strict=True)) | {"GROUP_M": 8} for blocks in chosen]
    if not is_quick:
        points += [point | {"GROUP_M": 4} for point in points[:1]]
    return [KernelConfig(template="split_gemm", params=point) for point in points]


def operands(shape: tuple[int, ...], kind: str = "normal") -> tuple[torch.Tensor, torch.Tensor]:
    """Draw A [batches, M, K] and B [batches, K, N] (two dimensions for one batch).

    Args:
        kind: "normal"; "positive", where nothing cancels; "ranges", rows of A and columns of B from 1e-6 to 1e4.
    """
    num_batches, num_m, num_n, num_k = shape
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(num_batches, num_m, num_k, device="cuda", generator=generator)
    b = torch.randn(num_batches, num_k, num_n, device="cuda", generator=generator)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    if kind == "ranges":
        a *= torch.logspace(-6, 4, num_m, device="cuda")[:, None]
        b *= torch.logspace(4, -6, num_n, device="cuda")
    return (a[0], b[0]) if num_batches == 1 else (a, b)


def compile_ahead(configs: list[KernelConfig]) -> None:
    """Fill Triton's disk cache in parallel: the measuring process then compiles nothing."""
    with multiprocessing.get_context("spawn").Pool(min(8, len(configs))) as pool:
        for problem in pool.imap_unordered(_compile_one, configs):
            if problem:
                print("ahead of time:", problem, file=sys.stderr)


def _compile_one(config: KernelConfig) -> str | None:
    try:
        with torch.no_grad():
            # Sizes divide by 16 as those of the large shapes do: Triton compiles for that apart.
            render(config).call(torch.zeros(256, 4096, device="cuda"), torch.zeros(4096, 256, device="cuda"))
            torch.cuda.synchronize()
    except Exception as error:  # the measuring process meets the same failure and files it
        return f"{config.key()}: {type(error).__name__}: {error}"
    return None


def time_all(calls: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, float]:
    """Return the median span of each call in ms, taken in rounds; a call that cannot be captured is left out."""
    cold, sink = torch.ones(FLUSH_BYTES // 4, device="cuda"), torch.empty((), device="cuda")
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = capture(call)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    spans: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(num_rounds):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in graphs}
        for name, (graph, _) in graphs.items():
            torch.sum(cold, dim=0, out=sink)
            events[name][0].record()
            graph.replay()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            spans[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in spans.items()}


def tflop_per_s(shape: tuple[int, ...], latency_ms: float) -> float:
    """Return the rate of the fp32 product."""
    return 2 * shape[0] * shape[1] * shape[2] * shape[3] / latency_ms / 1e9


def errors(output: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the mean and the largest error, each in units of its own row's mean size, so that no row hides another."""
    scale = expected.abs().mean(dim=-1, keepdim=True)
    found = (output.double() - expected).abs() / scale
    return float(found.mean()), float(found.max())


def parts_of(config: KernelConfig, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split B [K, N] as a rewrite does with a weight."""
    return render(config).call(b.t())


def tune(configs: list[KernelConfig], shape: tuple[int, ...], num_rounds: int) -> list[tuple[float, KernelConfig]]:
    """Time the product alone (both operands split beforehand) and print a row for each config, fastest first."""
    _, num_m, num_n, num_k = shape
    a, b = operands(shape)
    expected = a.double() @ b.double()
    sgemm_errors = errors(a @ b, expected)
    a_parts, b_parts = parts_of(configs[0], a.t()), parts_of(configs[0], b)

    def product(config: KernelConfig) -> Callable[[], torch.Tensor]:
        order = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "K_CHUNK", "GROUP_M", "num_warps", "num_stages")
        point = [config.params[name] for name in order]
        return lambda: torch.ops.agnitra.split_gemm(*a_parts, *b_parts, None, 1, num_k, 0, *point)

    spans = time_all({config.key(): product(config) for config in configs}, num_rounds)
    rows = []
    for config in configs:
        if config.key() not in spans:
            continue
        mean, largest = errors(product(config)()[0], expected)
        ratios = (mean / sgemm_errors[0], largest / sgemm_errors[1])
        print(
            f"{num_m}x{num_n}x{num_k} {config.key():110s} {tflop_per_s(shape, spans[config.key()]):6.1f} TFLOP/s  "
            f"error / SGEMM's: mean {ratios[0]:.2f} max {ratios[1]:.2f}",
            flush=True,
        )
        rows.append((spans[config.key()], config))
    return sorted(rows, key=lambda row: row[0])


def measure(shape: tuple[int, ...], configs: list[KernelConfig], num_rounds: int) -> dict[str, Any]:
    """Time one shape with each config, and compare the best with SGEMM."""
    num_batches, _, _, num_k = shape
    a, b = operands(shape)
    rule_of_thumb = default_config("split_gemm", shape, "float32")
    # Where sums are short, long chunks are faster, and wrong by more than SGEMM.
    valid = {config.key() for config in registry.load("split_gemm").space(shape, "float32").configs}
    keys = {config.key(): config for config in [*configs, rule_of_thumb] if config.key() in valid}
    calls: dict[str, Callable[[], Any]] = {"sgemm": lambda: a @ b}
    for key, config in keys.items():
        calls[key] = lambda config=config: render(config).call(a, b)
    spans = time_all(calls, num_rounds)
    best = min((key for key in spans if key != "sgemm"), key=spans.__getitem__)
    call = render(keys[best]).call
    expected = a.double() @ b.double()
    sgemm_mean, sgemm_max = errors(a @ b, expected)
    mean, largest = errors(call(a, b), expected)
    del expected
    found = {
        "sgemm_tflop_per_s": tflop_per_s(shape, spans["sgemm"]),
        "both_split_tflop_per_s": tflop_per_s(shape, spans[best]),
        "default_tflop_per_s": tflop_per_s(shape, spans[rule_of_thumb.key()]) if rule_of_thumb.key() in spans else None,
        "error_mean_ratio": mean / sgemm_mean,
        "error_max_ratio": largest / sgemm_max,
        "best": best,
    }
    if num_batches == 1:
        b_parts, b_exponent = parts_of(keys[best], b)
        a_parts = parts_of(keys[best], a.t())
        point = [keys[best].params[name] for name in registry.load("split_gemm").PARAMS]
        more = time_all(
            {
                "weight": lambda: call(a, b_parts, None, b_exponent),
                "product": lambda: torch.ops.agnitra.split_gemm(
                    *a_parts, b_parts, b_exponent, None, 1, num_k, 0, *point
                ),
                "split_a": lambda: torch.ops.agnitra.split_fp16(a[None]),
                "split_b": lambda: torch.ops.agnitra.split_fp16(b.t()[None]),
            },
            num_rounds,
        )
        found |= {
            "weight_split_before_tflop_per_s": tflop_per_s(shape, more["weight"]),
            "product_alone_tflop_per_s": tflop_per_s(shape, more["product"]),
            "split_rows_gb_per_s": 8e-6 * a.numel() / more["split_a"],
            "split_columns_gb_per_s": 12e-6 * b.numel() / more["split_b"],
        }
    return found


def error_sweep(config: KernelConfig, depths: tuple[int, ...]) -> dict[str, float]:
    """Return the error against SGEMM's over K, kinds of values and sizes: SGEMM splits K where its result is small."""
    found = {}
    cases = [("normal", (512, 768)), ("ranges", (512, 768)), *[("positive", sizes) for sizes in POSITIVE_SIZES]]
    for kind, (num_m, num_n) in cases:
        for num_k in depths:
            a, b = operands((1, num_m, num_n, num_k), kind)
            expected = a.double() @ b.double()
            output = render(config).call(a, b)
            # Columns differ in size as rows do: both are taken out before errors are compared.
            sizes = expected.abs().mean(dim=0) / expected.abs().mean()
            ours, theirs = errors(output / sizes, expected / sizes), errors((a @ b) / sizes, expected / sizes)
            ratio = (ours[0] / theirs[0], ours[1] / theirs[1])
            print(
                f"{kind:9s} {num_m:4d} x {num_n:4d}, K={num_k:6d}  mean {ours[0]:.2e} ({ratio[0]:.2f}x)  "
                f"max {ours[1]:.2e} ({ratio[1]:.2f}x)"
            )
            name = f"{kind}_{num_m}x{num_n}x{num_k}_error"
            found |= {f"{name}_mean_ratio": ratio[0], f"{name}_max_ratio": ratio[1]}
    return found


def check_limits(config: KernelConfig) -> bool:
    """Whether infinities, NaNs, zeros, the largest and the least numbers give what they give in SGEMM."""
    a, b = operands((1, 256, 128, 512))
    a[0, 3], a[1, 4], a[2, 5], a[2, 6] = float("inf"), float("nan"), float("inf"), float("-inf")
    a[3], a[4], a[4, 0] = 0, 0, float("-inf")
    b[0, 0], b[0, 1], b[0, 2] = 0, 1e-30, -1e-40
    a[5] *= 1e35
    a[6] *= 1e-35
    output, eager = render(config).call(a, b), a @ b
    expected = a.double() @ b.double()
    is_finite = eager.isfinite()
    same = torch.equal(is_finite, output.isfinite()) and torch.equal(
        torch.nan_to_num(output[~is_finite]), torch.nan_to_num(eager[~is_finite])
    )
    sizes = torch.where(is_finite, expected, 0.0).abs().mean(dim=-1, keepdim=True)
    close = (output.double() - expected).abs() <= 1e-5 * sizes
    return bool(same and close[is_finite].all() and (output[3] == 0).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four configs, four shapes")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--artifacts", help="file the figures as a run in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    started_s = time.perf_counter()
    stdout = sys.stdout
    if options.json:
        sys.stdout = sys.stderr
    torch.set_float32_matmul_precision("highest")
    figures: dict[str, Any] = {}
    with torch.no_grad():
        configs = shortlist(options.quick)
        compile_ahead(configs)
        print(f"{len(configs)} configs compiled in {time.perf_counter() - started_s:.1f} s", flush=True)
        finalists: dict[str, KernelConfig] = {}
        for shape in TUNED_SHAPES:
            for _, config in tune(configs, shape, 7 if options.quick else 15)[:3]:
                finalists[config.key()] = config
        kept = list(finalists.values())
        figures["limits_are_as_in_sgemm"] = check_limits(kept[0])
        print("infinities, NaNs, zeros, extremes as in SGEMM:", figures["limits_are_as_in_sgemm"], flush=True)
        figures |= error_sweep(kept[0], (256, 1024, 8192) if options.quick else (256, 512, 1024, 2048, 4096, 16384))
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            if time.perf_counter() - started_s > 100:
                print("out of time: the remaining shapes are left out", flush=True)
                break
            found = measure(shape, kept, 7 if options.quick else 15)
            name = "gemm_" + "x".join(map(str, shape[1:] if shape[0] == 1 else shape))
            figures |= {f"{name}_{key}": value for key, value in found.items()}
            print(name, json.dumps(found, indent=1), flush=True)
            torch.cuda.empty_cache()
    figures["device_name"] = torch.cuda.get_device_name()
    figures["elapsed_s"] = time.perf_counter() - started_s
    if options.artifacts:
        run = RunStore(options.artifacts).create("split_gemm", "split_gemm", category="perf")
        meta = provenance.meta(
            run.run_id, "perf", "split_gemm", command=f"{COMMAND} --artifacts artifacts", argv=sys.argv,
            seed=0, device=describe("cuda"), config={"quick": options.quick},
        )  # fmt: skip
        filed = summary.summarise(meta, summary.Results(**figures))
        run.finish("perf", filed, run_markdown(filed, "fp32 products on the tensor cores against SGEMM."))
    sys.stdout = stdout
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
