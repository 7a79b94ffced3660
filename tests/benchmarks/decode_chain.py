"""The decode path on a GPU: skinny GEMMs against cuBLAS, decode attention against SDPA, and a whole decoder's chain.

    python tests/benchmarks/decode_chain.py [--quick] [--only gemm chain attention step] [--change gate_up.BLOCK_N=4]

`chain` is the products alone. `step` is the whole token: the products with rotation, cache and attention between them,
once as Inductor's pointwise kernels and decode_attention, once as cached_attention; `alone` is that attention without
the products.

Weights and caches rotate past the L2 inside one CUDA graph, so that every read comes from memory. Each number stands
beside the device copy that was measured first. Results are checked against torch; those of the whole token, where the
rounding of 22 layers moves 2% of the elements past that check, by their error against fp64.
The last line is a JSON object of figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.device.graphs import capture
from agnitra_lab.device.peaks import measure_peaks
from agnitra_lab.generate import registry
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.render import render

DTYPE = torch.bfloat16
SHAPES_1B = {"qkv": (2560, 2048), "o": (2048, 2048), "gate_up": (11264, 2048), "down": (2048, 5632)}
SHAPES_8B = {"8b_o": (4096, 4096), "8b_qkv": (6144, 4096), "8b_gate_up": (28672, 4096), "8b_down": (4096, 14336)}
HEAD = (32000, 2048)
NUM_LAYERS = 22
EPS = 1e-5
# (batch, key/value heads, query heads a key/value head, keys, head size)
ATTENTIONS = {
    "1b": (1, 4, 8, 1024, 64),
    "8b": (1, 8, 4, 4096, 128),
    "8b_batch_8": (8, 8, 4, 4096, 128),
    "mha": (1, 16, 1, 2048, 64),
}
CACHE_BYTES = 240 * 2**20
"""Four times the 60 MB L2 of an H200."""
NUM_WORKERS = 12
NUM_REPLAYS = 15

Params = dict[str, int]


def graph_us(call: Callable[[], Any], num_calls: int) -> float:
    """Median device time of one of the `num_calls` calls that a CUDA graph of `call` replays, in us."""
    graph, _ = capture(call)
    for _ in range(2):
        graph.replay()
    samples = []
    for _ in range(NUM_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / num_calls)
    return statistics.median(samples)


def kernel(template: str, params: Params) -> Callable[..., Any]:
    return render(KernelConfig(template=template, params=params)).call


def gemm_configs(num_rows: int, weight_rows: int, num_cols: int, limit: int) -> list[Params]:
    """About `limit` sensible configs: the template's own first choice, then an even walk through its space."""
    template = "skinny_gemm"
    shape = (num_rows, weight_rows, num_cols)
    found = [dict(config.params) for config in registry.load(template).space(shape, str(DTYPE)).configs]
    whole = [params for params in found if params["SPLIT"] == 1]
    parts = [params for params in found if params["SPLIT"] > 1]
    chosen = [dict(default_config(template, shape, str(DTYPE)).params)]
    for part, share in ((whole, limit - 2 if parts else limit), (parts, 2)):
        chosen += part[:: max(1, round(len(part) / share))]
    return list({json.dumps(params): params for params in chosen}.values())


def random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_()


def gemm_case(
    num_rows: int, weight_rows: int, num_cols: int, flags: Iterable[str] = ()
) -> tuple[torch.Tensor, dict[str, Any]]:
    """x and the options of one fused product."""
    num_out = weight_rows // 2 if "gate" in flags else weight_rows
    options: dict[str, Any] = {}
    if "norm" in flags:
        options |= {"norm_weight": random(num_cols), "eps": EPS}
    if "gate" in flags:
        options |= {"gate": "gate_first", "activation": "silu"}
    if "residual" in flags:
        options["residual"] = random(num_rows, num_out)
    return random(num_rows, num_cols), options


def warm_gemm(task: tuple[int, int, int, Params, tuple[str, ...]]) -> str | None:
    """Compile one config in a worker, into the disk cache; return what went wrong."""
    num_rows, weight_rows, num_cols, params, flags = task
    try:
        with torch.inference_mode():
            x, options = gemm_case(num_rows, weight_rows, num_cols, flags)
            weight = random(weight_rows, num_cols) * num_cols**-0.5
            call = kernel("skinny_gemm", params)
            output = call(x, weight, **options)
            return difference(output, registry.load("skinny_gemm").reference(x, weight, **options))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def warm_attention(task: tuple[tuple[int, ...], Params]) -> str | None:
    """Compile one attention config in a worker; return what went wrong."""
    shape, params = task
    try:
        with torch.inference_mode():
            q, (k, v), mask = attention_case(shape, 1)[:3]
            output = kernel("decode_attention", params)(q, k[0], v[0], mask)
            return difference(output, F.scaled_dot_product_attention(q, k[0], v[0], mask, enable_gqa=True))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def difference(output: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Say how a result differs from torch's by more than bf16 rounding, or None."""
    scale = expected.double().pow(2).mean().sqrt()
    wrong = (output.double() - expected.double()).abs() > 3.2e-2 * (scale + expected.double().abs())
    share = float(wrong.double().mean())
    return None if share <= 0.001 else f"WRONG: {share:.2%} of the elements"


def compile_all(pool: ProcessPoolExecutor, warm: Callable[[Any], str | None], tasks: list[Any]) -> list[Any]:
    """Compile in parallel; return the tasks that work and report the rest."""
    kept = []
    for task, problem in zip(tasks, pool.map(warm, tasks), strict=True):
        if problem is None:
            kept.append(task)
        else:
            print(f"  dropped {task}: {problem}", flush=True)
    return kept


def rotating_weights(weight_rows: int, num_cols: int) -> torch.Tensor:
    num_weights = max(20, -(-CACHE_BYTES // (2 * weight_rows * num_cols)))
    return random(num_weights, weight_rows, num_cols) * num_cols**-0.5


def time_gemm(weights: torch.Tensor, x: torch.Tensor, call: Callable[..., Any]) -> float:
    return graph_us(lambda: [call(x, weight) for weight in weights], len(weights))


def line(name: str, time_us: float, num_bytes: float, copy: float) -> str:
    rate = num_bytes / time_us / 1e3
    return f"{name:70s} {time_us:8.2f} us {rate:7.0f} GB/s {rate / copy:6.1%} of copy"


def gemm_figures(
    pool: ProcessPoolExecutor, shapes: dict[str, tuple[int, int]], rows: tuple[int, ...], copy: float, limit: int
) -> tuple[dict[str, Any], dict[tuple[str, int], list[tuple[float, Params]]]]:
    """Time every shape; return figures and the configs of each, fastest first."""
    cases = [(name, shape, m) for (name, shape), m in itertools.product(shapes.items(), rows)]
    tasks = [(m, *shape, params, ()) for _, shape, m in cases for params in gemm_configs(m, *shape, limit)]
    started = time.perf_counter()
    works = compile_all(pool, warm_gemm, tasks)
    print(f"compiled {len(tasks)} configs in {time.perf_counter() - started:.0f} s", flush=True)
    ranked: dict[tuple[str, int], list[tuple[float, Params]]] = {}
    figures: dict[str, Any] = {}
    for name, shape, m in cases:
        weights, x = rotating_weights(*shape), random(m, shape[1])
        figures[f"{name}_m{m}_cublas_us"] = time_gemm(weights, x, F.linear)
        timed = []
        for task in works:
            if task[:3] == (m, *shape):
                timed.append((time_gemm(weights, x, kernel("skinny_gemm", task[3])), task[3]))
        ranked[name, m] = sorted(timed, key=lambda pair: pair[0])
        del weights
    dependent = [(m, *shape, params | {"PDL": 2}, ()) for name, shape, m in cases for _, params in ranked[name, m][:3]]
    works = compile_all(pool, warm_gemm, dependent)
    for name, shape, m in cases:
        weights, x = rotating_weights(*shape), random(m, shape[1])
        num_bytes = 2 * (shape[0] * shape[1] + m * sum(shape))
        print(line(f"{name} M={m} {shape[0]}x{shape[1]} cuBLAS", figures[f"{name}_m{m}_cublas_us"], num_bytes, copy))
        for time_us, params in ranked[name, m]:
            print(line(f"  {compact(params)}", time_us, num_bytes, copy))
        if ranked[name, m]:
            best_us, best = ranked[name, m][0]
            figures |= {f"{name}_m{m}_us": best_us, f"{name}_m{m}_config": compact(best)}
            figures[f"{name}_m{m}_share_of_copy"] = num_bytes / best_us / 1e3 / copy
        after = []
        for task in works:
            if task[:3] == (m, *shape):
                after.append((time_gemm(weights, x, kernel("skinny_gemm", task[3])), task[3]))
                print(line(f"  {compact(task[3])}", after[-1][0], num_bytes, copy), flush=True)
        if after:
            after.sort(key=lambda pair: pair[0])
            figures |= {f"{name}_m{m}_pdl_us": after[0][0], f"{name}_m{m}_pdl_config": compact(after[0][1])}
        ranked[name, m] = sorted([*ranked[name, m], *after], key=lambda pair: pair[0])
        del weights
    return figures, ranked


def compact(params: Params) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


CHAIN = {
    "qkv": (SHAPES_1B["qkv"], ("norm",)),
    "o": (SHAPES_1B["o"], ("residual",)),
    "gate_up": (SHAPES_1B["gate_up"], ("norm", "gate")),
    "down": (SHAPES_1B["down"], ("residual",)),
    "head": (HEAD, ("norm",)),
}


def chain_figures(
    pool: ProcessPoolExecutor,
    ranked: dict[tuple[str, int], list[tuple[float, Params]]],
    copy: float,
    *,
    is_quick: bool,
) -> dict[str, Any]:
    """The dependent chain of a 1.1B decoder's products at batch 1: everything but attention, rotation and the cache."""
    best: dict[str, Params] = {}
    for name, (shape, _) in CHAIN.items():
        plain = [params for _, params in ranked.get((name, 1), []) if params["PDL"] == 1]
        best[name] = plain[0] if plain else dict(default_config("skinny_gemm", (1, *shape), str(DTYPE)).params)
    tasks = [(1, *shape, best[name] | {"PDL": pdl}, flags) for pdl in (1, 2) for name, (shape, flags) in CHAIN.items()]
    works = compile_all(pool, warm_gemm, tasks)
    layers = [
        {name: random(*shape) * shape[1] ** -0.5 for name, (shape, _) in CHAIN.items() if name != "head"}
        for _ in range(NUM_LAYERS)
    ]
    head, norm, x = random(*HEAD) * HEAD[1] ** -0.5, torch.ones(2048, device="cuda", dtype=DTYPE), random(1, 2048)
    num_bytes = 2 * (HEAD[0] * HEAD[1] + NUM_LAYERS * sum(n * k for n, k in SHAPES_1B.values()))

    def eager() -> torch.Tensor:
        h = x
        for layer in layers:
            q = F.linear(F.rms_norm(h, (2048,), norm, EPS), layer["qkv"])[:, :2048]
            h = h + F.linear(q, layer["o"])
            gate, up = F.linear(F.rms_norm(h, (2048,), norm, EPS), layer["gate_up"]).chunk(2, -1)
            h = h + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(F.rms_norm(h, (2048,), norm, EPS), head)

    figures = {"chain_limit_ms": num_bytes / copy / 1e6, "chain_torch_ms": graph_us(eager, 1) / 1e3}
    if not is_quick:
        compiled = torch.compile(eager)
        compiled()
        figures["chain_compiled_ms"] = graph_us(compiled, 1) / 1e3
    expected = eager()
    for pdl in (1, 2):
        if sum(task[3]["PDL"] == pdl for task in works) < len(CHAIN):
            continue
        calls = {name: kernel("skinny_gemm", best[name] | {"PDL": pdl}) for name in CHAIN}

        def fused(calls: dict[str, Callable[..., Any]] = calls) -> torch.Tensor:
            h, normed = x, {"norm_weight": norm, "eps": EPS, "cast_before_weight": False}
            for layer in layers:
                q = calls["qkv"](h, layer["qkv"], **normed)[:, :2048]
                h = calls["o"](q, layer["o"], residual=h)
                g = calls["gate_up"](h, layer["gate_up"], **normed, gate="gate_first", activation="silu")
                h = calls["down"](g, layer["down"], residual=h)
            return calls["head"](h, head, **normed)

        problem = difference(fused(), expected)
        figures[f"chain_fused{'_pdl' if pdl == 2 else ''}_ms"] = graph_us(fused, 1) / 1e3
        print(f"chain PDL={pdl}: {figures} {problem or 'agrees'}", flush=True)
    return figures


def attention_case(shape: tuple[int, ...], num_caches: int) -> tuple[Any, Any, Any, float]:
    batch, num_kv_heads, group, num_keys, head_size = shape
    cache = (num_caches, batch, num_kv_heads, num_keys, head_size)
    mask = torch.ones(1, num_keys, dtype=torch.bool, device="cuda")
    q = random(batch, num_kv_heads * group, 1, head_size)
    return q, (random(*cache), random(*cache)), mask, 4.0 * batch * num_kv_heads * num_keys * head_size


def attention_configs(shape: tuple[int, ...], limit: int) -> list[Params]:
    space = registry.load("decode_attention").space(shape, str(DTYPE))
    start = dict(default_config("decode_attention", shape, str(DTYPE)).params)
    near = [
        dict(config.params)
        for config in space.configs
        if config.params["BLOCK_N"] >= 32
        and config.params["num_warps"] in (2, 4)
        and (config.params["SPLIT"] == 1 or abs(config.params["SPLIT"].bit_length() - start["SPLIT"].bit_length()) <= 1)
    ]
    step = max(1, -(-len(near) // limit))
    return list({json.dumps(params): params for params in [start, *near[::step]]}.values())


def attention_figures(pool: ProcessPoolExecutor, names: Iterable[str], copy: float, limit: int) -> dict[str, Any]:
    """Time SDPA's backends and our configs over rotating caches."""
    from torch.nn.attention import SDPBackend

    tasks = [(ATTENTIONS[name], params) for name in names for params in attention_configs(ATTENTIONS[name], limit)]
    works = compile_all(pool, warm_attention, tasks)
    backends = {
        "default": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    figures: dict[str, Any] = {}
    for name in names:
        found = [params for shape, params in works if shape == ATTENTIONS[name]]
        figures |= one_attention(name, ATTENTIONS[name], found, backends, copy)
    return figures


def one_attention(
    name: str, shape: tuple[int, ...], configs: list[Params], backends: dict[str, Any], copy: float
) -> dict[str, Any]:
    from torch.nn.attention import sdpa_kernel

    figures: dict[str, Any] = {}
    num_bytes = attention_case(shape, 1)[3]
    num_caches = int(min(64, max(4, -(-CACHE_BYTES // num_bytes))))
    q, (k, v), mask, _ = attention_case(shape, num_caches)

    def sweep(call: Callable[..., Any], given: torch.Tensor | None, **options: Any) -> float:
        return graph_us(lambda: [call(q, k[i], v[i], given, **options) for i in range(num_caches)], num_caches)

    for backend, member in backends.items():
        for given, label in ((mask, ""), (None, "_no_mask")):
            allowed = [member] if member is not None else [m for m in backends.values() if m is not None]
            try:
                with sdpa_kernel(allowed):
                    time_us = sweep(F.scaled_dot_product_attention, given, enable_gqa=True)
            except RuntimeError:
                torch.cuda.synchronize()
                continue
            figures[f"attention_{name}_{backend}{label}_us"] = time_us
            print(line(f"attention {name} {shape} {backend}{label}", time_us, num_bytes, copy), flush=True)
    timed = sorted(
        ((sweep(kernel("decode_attention", params), mask), params) for params in configs), key=lambda pair: pair[0]
    )
    for time_us, params in timed:
        print(line(f"  {compact(params)}", time_us, num_bytes, copy), flush=True)
    if timed:
        figures |= {f"attention_{name}_us": timed[0][0], f"attention_{name}_config": compact(timed[0][1])}
    return figures


def step_configs() -> list[Params]:
    """The rule of thumb for the 1.1B decoder's attention and what lies around it."""
    shape = ATTENTIONS["1b"]
    start = dict(default_config("cached_attention", shape, str(DTYPE)).params)
    near = [
        start | {"BLOCK_N": block_n, "SPLIT": split, "num_warps": num_warps}
        for block_n, split, num_warps in (
            (64, 16, 4), (64, 16, 2), (32, 32, 8), (32, 32, 4), (32, 16, 4), (64, 8, 8), (64, 8, 4), (128, 8, 8),
            (16, 64, 2),
        )
    ]  # fmt: skip
    return list({json.dumps(params): params for params in [start, start | {"PDL": 1}, *near]}.values())


def step_case() -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Tensors of the attention of one token of the 1.1B decoder, at the last slot."""
    _, num_kv_heads, group, num_keys, size = ATTENTIONS["1b"]
    q, k, v = (
        random(1, num_kv_heads * group, 1, size),
        random(1, num_kv_heads, 1, size),
        random(1, num_kv_heads, 1, size),
    )
    angle = torch.rand(1, 1, size // 2, device="cuda").repeat(1, 1, 2) * 6.0
    position = torch.full((1,), num_keys - 1, device="cuda")
    mask = torch.ones(1, num_keys, dtype=torch.bool, device="cuda")
    caches = [random(1, num_kv_heads, num_keys, size) for _ in range(2)]
    tensors = [q, k, v, *caches, position, mask, angle.cos().to(DTYPE), angle.sin().to(DTYPE)]
    return tensors, {"form": "halves", "rotary": size}


def warm_step(params: Params) -> str | None:
    """Compile one config of the step in a worker; return what went wrong."""
    try:
        with torch.inference_mode():
            tensors, options = step_case()
            twins = [tensor.clone() for tensor in tensors]
            output = kernel("cached_attention", params)(*tensors, **options)
            expected = registry.load("cached_attention").reference(*twins, **options)
            return next(filter(None, map(difference, [output, *tensors[3:5]], [expected, *twins[3:5]])), None)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def prepare(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor, *caches: torch.Tensor
) -> torch.Tensor:
    """Rotate q and k and write k and v into the cache, as the model's own code does; return q."""
    q, k, v = parts_of(qkv)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    caches[0].index_copy_(2, position, turned(k))
    caches[1].index_copy_(2, position, v)
    return turned(q)


def parts_of(qkv: torch.Tensor) -> list[torch.Tensor]:
    _, num_kv_heads, group, _, size = ATTENTIONS["1b"]
    heads = (num_kv_heads * group, num_kv_heads, num_kv_heads)
    parts = qkv.split([number * size for number in heads], dim=-1)
    return [part.view(1, 1, -1, size).transpose(1, 2) for part in parts]


class Decoder:
    """Weights, caches and products of the 1.1B decoder: one token, whatever attends.

    Args:
        products: name in CHAIN -> the call of the product.
    """

    def __init__(self, products: dict[str, Callable[..., Any]]) -> None:
        self.products = products
        self.layers = [
            {name: random(*shape) * shape[1] ** -0.5 for name, (shape, _) in CHAIN.items() if name != "head"}
            for _ in range(NUM_LAYERS)
        ]
        self.head, self.norm = random(*HEAD) * HEAD[1] ** -0.5, torch.ones(2048, device="cuda", dtype=DTYPE)
        self.x = random(1, 1, 2048)
        (*_, self.position, self.mask, self.cos, self.sin), self.options = step_case()
        _, num_kv_heads, _, num_keys, size = ATTENTIONS["1b"]
        self.caches = [[random(1, num_kv_heads, num_keys, size) for _ in range(2)] for _ in range(NUM_LAYERS)]
        self.num_bytes = 2 * (HEAD[0] * HEAD[1] + NUM_LAYERS * sum(n * k for n, k in SHAPES_1B.values()))
        self.num_bytes += NUM_LAYERS * 4 * num_kv_heads * num_keys * size

    def token(self, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Compute one token.

        Args:
            attend: takes q, k and v side by side, and the two caches.
        """
        h, normed = self.x, {"norm_weight": self.norm, "eps": EPS}
        for layer, cache in zip(self.layers, self.caches, strict=True):
            out = attend(self.products["qkv"](h, layer["qkv"], **normed), cache)
            h = self.products["o"](out.transpose(1, 2).flatten(2), layer["o"], residual=h)
            g = self.products["gate_up"](h, layer["gate_up"], **normed, gate="gate_first", activation="silu")
            h = self.products["down"](g, layer["down"], residual=h)
        return self.products["head"](h, self.head, **normed)

    def in_one(self, params: Params) -> Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]:
        """Return what attends by cached_attention with one config."""
        call = kernel("cached_attention", params)

        def attend(qkv: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            return call(*parts_of(qkv), *cache, self.position, self.mask, self.cos, self.sin, **self.options)

        return attend

    def exact(self) -> torch.Tensor:
        """Compute the token in fp64."""
        others = (self.cos, self.sin, self.mask)
        return exact_token(self.x, self.layers, self.head, self.norm, self.caches, others)


def attend_alone(params: Params) -> float:
    """Median device time of one attention of one token in us, each after the one before, over rotating caches."""
    (q, k, v, *_, position, mask, cos, sin), options = step_case()
    shape = (1, *ATTENTIONS["1b"][1:2], *ATTENTIONS["1b"][3:])
    num_caches = -(-CACHE_BYTES // (4 * shape[1] * shape[2] * shape[3]))
    caches = [[random(*shape) for _ in range(2)] for _ in range(num_caches)]
    call = kernel("cached_attention", params)

    def chain() -> torch.Tensor:
        h = q
        for cache in caches:
            h = call(h, k, v, *cache, position, mask, cos, sin, **options)
        return h

    return graph_us(chain, num_caches)


def step_products(changes: Iterable[str]) -> dict[str, Params]:
    """The rule of thumb's configs of the products, with "product.PARAM=value" changes."""
    best = {
        name: dict(default_config("skinny_gemm", (1, *shape), str(DTYPE)).params) for name, (shape, _) in CHAIN.items()
    }
    for change in changes:
        place, _, value = change.partition("=")
        name, _, param = place.partition(".")
        if param not in best.get(name, {}) or not value.isdigit():
            raise SystemExit(f"--change takes one of {', '.join(best)}, a dot, a parameter, = and a number: {change!r}")
        best[name][param] = int(value)
    return best


def step_figures(pool: ProcessPoolExecutor, copy: float, changes: Iterable[str]) -> dict[str, Any]:
    """Time one token of the whole 1.1B decoder in our kernels, with the attention's step as several or as one.

    Args:
        pool: compiles.
        copy: the device's copy bandwidth in GB/s.
        changes: of the products' configs.
    """
    best = step_products(changes)
    compile_all(pool, warm_gemm, [(1, *shape, best[name], flags) for name, (shape, flags) in CHAIN.items()])
    attention = dict(default_config("decode_attention", ATTENTIONS["1b"], str(DTYPE)).params)
    compile_all(pool, warm_attention, [(ATTENTIONS["1b"], attention)])
    configs = compile_all(pool, warm_step, step_configs())
    decoder = Decoder({name: kernel("skinny_gemm", params) for name, params in best.items()})
    pointwise, split = torch.compile(prepare, fullgraph=True), kernel("decode_attention", attention)

    def in_several(qkv: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        return split(pointwise(qkv, decoder.cos, decoder.sin, decoder.position, *cache), *cache, decoder.mask)

    figures: dict[str, Any] = {"step_limit_ms": decoder.num_bytes / copy / 1e6}
    exact = decoder.exact()
    allowed = 1.25 * error(decoder.token(in_several), exact)
    figures["step_in_several_error"] = allowed / 1.25
    figures["step_in_several_ms"] = graph_us(lambda: decoder.token(in_several), 1) / 1e3
    figures["step_products_ms"] = graph_us(lambda: decoder.token(lambda qkv, cache: parts_of(qkv)[0]), 1) / 1e3
    print(figures, flush=True)
    timed: list[tuple[float, float, Params]] = []
    for params in configs:
        in_one = decoder.in_one(params)
        found = error(decoder.token(in_one), exact)
        problem = None if found <= allowed else f"WRONG: error {found:.2e}, allowed {allowed:.2e}"
        time_ms, alone_us = graph_us(lambda run=in_one: decoder.token(run), 1) / 1e3, attend_alone(params)
        print(f"step {compact(params):60s} {time_ms:.4f} ms, alone {alone_us:.2f} us {problem or 'agrees'}", flush=True)
        if params["PDL"] == 1:
            figures["step_in_one_no_pdl_ms"] = time_ms
        elif problem is None:
            timed.append((time_ms, alone_us, params))
        if params == configs[0]:
            figures |= {"step_in_one_default_ms": time_ms, "step_in_one_default_alone_us": alone_us}
            figures["step_kernels_us"] = kernel_times(lambda run=in_one: decoder.token(run))
    figures["step_in_several_kernels_us"] = kernel_times(lambda: decoder.token(in_several))
    again = graph_us(lambda: decoder.token(in_several), 1) / 1e3
    fastest, alone_us, params = min(timed, key=lambda row: row[0])
    figures |= {"step_in_one_ms": fastest, "step_in_one_alone_us": alone_us, "step_config": compact(params)}
    return figures | {"step_in_several_again_ms": again}


def exact_token(
    x: torch.Tensor, layers: list[dict[str, torch.Tensor]], head: torch.Tensor, norm: torch.Tensor,
    caches: list[list[torch.Tensor]], others: tuple[torch.Tensor, ...],
) -> torch.Tensor:  # fmt: skip
    """Compute one token in fp64, each sum and product rounded once."""
    (cos, sin), mask, h = (other.double() for other in others[:2]), others[2], x.double()
    for layer, cache in zip(layers, caches, strict=True):
        weights = {name: weight.double() for name, weight in layer.items()}
        written = [part.double() for part in cache]
        position = torch.full((1,), written[0].shape[2] - 1, device=x.device)
        qkv = F.linear(F.rms_norm(h, (h.shape[-1],), norm.double(), EPS), weights["qkv"])
        q = prepare(qkv, cos, sin, position, *written)
        out = F.scaled_dot_product_attention(q, *written, mask, enable_gqa=True)
        h = h + F.linear(out.transpose(1, 2).flatten(2), weights["o"])
        gate, up = F.linear(F.rms_norm(h, (h.shape[-1],), norm.double(), EPS), weights["gate_up"]).chunk(2, -1)
        h = h + F.linear(F.silu(gate) * up, weights["down"])
    return F.linear(F.rms_norm(h, (h.shape[-1],), norm.double(), EPS), head.double())


def error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    return float((output.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Mean device time of each kernel of a call in us, by name, as the profiler sees it in a graph's replay."""
    from torch.profiler import ProfilerActivity, profile

    graph, _ = capture(call)
    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        graph.replay()
        torch.cuda.synchronize()
    return {
        f"{event.key[:60]} x{event.count}": round(event.self_device_time_total / event.count, 2)
        for event in profiled.key_averages()
        if event.self_device_time_total
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 1.1B shapes at batch 1, six configs each")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--only", nargs="*", default=["gemm", "chain", "attention", "step"])
    parser.add_argument("--change", nargs="*", default=[], help="in `step`, such as gate_up.BLOCK_N=4")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO() if options.json else sys.stdout):
        figures = run(options)
    print(json.dumps(figures))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for and return the figures."""
    copy = measure_peaks("cuda", DTYPE).copy_bandwidth_gb_per_s or 1.0
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_gb_per_s": copy}
    print(figures, flush=True)
    ranked: dict[tuple[str, int], list[tuple[float, Params]]] = {}
    workers = ProcessPoolExecutor(NUM_WORKERS, mp_context=multiprocessing.get_context("spawn"))
    with workers as pool, torch.inference_mode():
        if "gemm" in options.only:
            small = {**SHAPES_1B, "head": HEAD}
            shapes, rows = (small, (1,)) if options.quick else ({**small, **SHAPES_8B}, (1, 8))
            found, ranked = gemm_figures(pool, shapes, rows, copy, 6 if options.quick else 11)
            figures |= found
        if "chain" in options.only:
            figures |= chain_figures(pool, ranked, copy, is_quick=options.quick)
        if "attention" in options.only:
            figures |= attention_figures(pool, ["1b"] if options.quick else list(ATTENTIONS), copy, 8)
        if "step" in options.only:
            figures |= step_figures(pool, copy, options.change) | {"changes": " ".join(options.change)}
    return figures


if __name__ == "__main__":
    main()
