import ast
import builtins
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import torch

from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.errors import TemplateError
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.registry import TEMPLATES, load
from agnitra_lab.generate.render import render

POINT = {"BLOCK_N": 2048, "ROWS_PER_PROGRAM": 1, "num_warps": 4, "num_stages": 1}

OTHER_POINTS = {
    "split_gemm": {
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "K_CHUNK": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3,
    },
}  # fmt: skip


SITES = {
    "skinny_gemm": (1, 64, 512), "decode_attention": (1, 2, 4, 300, 64),
    "cached_attention": (1, 2, 4, 300, 64), "channel_norm": (4, 6, 10),
    "group_norm": (4, 6, 10), "split_gemm": (1, 128, 128, 128), "linear_cross_entropy": (300, 64, 2000),
    "depthwise_conv": (2, 4, 1, 6, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1, 2),
}  # fmt: skip


def config(template: str = "rms_norm", **changes: int) -> KernelConfig:
    return KernelConfig(template=template, params=OTHER_POINTS.get(template, POINT) | changes)


def any_config(template: str) -> KernelConfig:
    dtype = "float32" if template == "split_gemm" else "bfloat16"
    return default_config(template, SITES.get(template, (8, 2048)), dtype)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_rendering_twice_gives_the_same_bytes(template: str) -> None:
    first, second = render(any_config(template)), render(any_config(template))
    assert first.source.encode() == second.source.encode()
    assert first.content_hash == second.content_hash
    assert first.name == f"{template}_{first.content_hash[:12]}"


def test_another_process_renders_the_same_hash() -> None:
    code = (
        "from agnitra_lab.contracts.search import KernelConfig; from agnitra_lab.generate.render import render; "
        f"print(render(KernelConfig(template='rms_norm', params={POINT})).content_hash)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == render(config()).content_hash


def test_the_order_of_the_parameters_does_not_matter() -> None:
    turned = KernelConfig(template="rms_norm", params=dict(reversed(POINT.items())))
    assert render(turned).content_hash == render(config()).content_hash


@pytest.mark.parametrize("changes", [{"BLOCK_N": 1024}, {"ROWS_PER_PROGRAM": 2}, {"num_warps": 8}, {"num_stages": 2}])
def test_every_parameter_is_part_of_the_source(changes: dict[str, int]) -> None:
    assert render(config(**changes)).content_hash != render(config()).content_hash


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_source_is_python_that_imports_triton_alone(template: str) -> None:
    tree = ast.parse(render(any_config(template)).source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"triton", "triton.language"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    kernel = load(template).kernel
    functions = kernel if isinstance(kernel, tuple) else (kernel,)
    names = [function.fn.__name__ for function in functions]
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == names
    used = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert used - set(dir(builtins)) <= set(names), "a device function is missing from the source"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"BLOCK_N": 1000}, "BLOCK_N=1000, but it must be a power of two from 1 to 32768"),
        ({"BLOCK_N": 0}, "BLOCK_N=0"),
        ({"BLOCK_N": 65536}, "BLOCK_N=65536"),
        ({"num_warps": 3}, "num_warps=3, but it must be a power of two from 1 to 32"),
        ({"num_warps": -4}, "num_warps=-4"),
        ({"num_stages": 0}, "num_stages=0, but it must be a whole number from 1 to 8"),
        ({"BLOCK_K": 32}, "it takes exactly BLOCK_N, ROWS_PER_PROGRAM, num_warps, num_stages"),
    ],
)
def test_a_parameter_out_of_its_domain_is_refused_with_the_domain(changes: dict[str, int], words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(config(**changes))
    assert words in str(caught.value)


def test_a_missing_parameter_is_refused() -> None:
    with pytest.raises(TemplateError, match="was given the parameters BLOCK_N; it takes exactly"):
        render(KernelConfig(template="rms_norm", params={"BLOCK_N": 1024}))


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TemplateError, match=r"'no_such'; known are .*rms_norm.*swiglu"):
        render(config("no_such"))


def test_a_call_on_the_cpu_is_refused_with_the_way_out() -> None:
    with torch.no_grad(), pytest.raises(TemplateError, match="GPU kernel and was given a tensor on cpu"):
        render(config()).call(torch.randn(2, 8), torch.randn(8), 1e-6)


def test_a_call_is_traced_by_dynamo_without_a_graph_break() -> None:
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    call = render(default_config("rms_norm", (4, 64), "float32")).call
    compiled = torch.compile(lambda x, weight: call(x + 1, weight, 1e-6, x), backend=backend, fullgraph=True)
    with torch.no_grad():
        x, weight = torch.randn(4, 64, device="meta"), torch.nn.Parameter(torch.randn(64, device="meta"))
        normed, summed = compiled(x, weight)
    assert normed.shape == summed.shape == (4, 64)
    (graph_module,) = graphs
    assert torch.ops.agnitra.add_rms_norm in {
        getattr(node.target, "overloadpacket", node.target) for node in graph_module.graph.nodes
    }
