"""The names of a backward graph's nodes, and the forward node whose gradient each computes, without compiling it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import fx


class _Grabbed(BaseException):
    """Both graphs are here; leave. No Exception, so that nothing on the way takes it for a failure and goes on."""


def backward_origins(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str | None, dict[str, str]]:
    """Let Inductor make the forward and backward graphs, and read whose gradient each backward node computes.

    Args:
        graph_module: Dynamo's graph, inside of its backend call. It is used up.
        example_inputs: what the backend was given.

    Returns:
        Why there is no backward graph, None when there is one; and backward node name -> Dynamo node name. Nodes that
        belong to the backward pass, but that Inductor moved into the forward graph, are among them.

    Source: AOTAutograd's sequence numbers, which `copy_fwd_metadata_to_bw_nodes` uses in the same way.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.output_code import MockFXGraphCacheOutput

    # The name under which a node was made -> the name that it has since a variable took its value.
    made_as = {
        stack[-1][0]: node.name for node in graph_module.graph.nodes if (stack := node.meta.get("source_fn_stack"))
    }
    graphs: list[fx.Graph] = []

    def grab(module: fx.GraphModule, _inputs: Sequence[Any], **how: Any) -> Any:
        graphs.append(module.graph)
        if how.get("is_backward") or how.get("is_inference"):
            raise _Grabbed
        return MockFXGraphCacheOutput(module)

    problem: str | None = "The backward graph was not made; backward kernels stay with their module."
    try:
        with _nothing_cached():
            compile_fx(graph_module, list(example_inputs), inner_compile=grab)
    except _Grabbed:
        # The way out that was meant: both graphs are made, and nothing is compiled.
        problem = None
    except Exception as error:
        problem = f"The backward graph cannot be made ({reason_of(error)})."
    return problem, _origins(graphs, made_as)


@contextmanager
def _nothing_cached() -> Iterator[None]:
    """Keep Inductor from loading what it compiled before, and from starting its compile workers."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    # Without the second, the backward graph is only lowered when a backward pass runs.
    functorch = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    inductor = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}
    with ExitStack() as stack:
        for config, values in ((functorch_config, functorch), (inductor_config, inductor)):
            stack.enter_context(config.patch({key: value for key, value in values.items() if hasattr(config, key)}))
        yield


def _origins(graphs: Iterable[fx.Graph], made_as: Mapping[str, str]) -> dict[str, str]:
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    forward_of: dict[int, str] = {}
    for node in nodes:
        made = node.meta.get("from_node")
        if made and "seq_nr" in node.meta:
            # Of nodes with one number the first made the autograd node.
            forward_of.setdefault(node.meta["seq_nr"], made[0].name)
    origins: dict[fx.Node, str] = {}
    for node in nodes:
        if node.meta.get("from_node") or node.meta.get("partitioner_tag") != "is_backward":
            continue
        stack = node.meta.get("fwd_source_fn_stack")
        origin = made_as.get(stack[-1][0]) if stack else None
        if origin is None and not node.meta.get("is_gradient_acc"):
            origin = forward_of.get(node.meta.get("seq_nr", -1))
        if origin is None:
            # The sum of two gradients, or a node that a pass inserted: it works on what its input computed.
            origin = next((origins[source] for source in node.all_input_nodes if source in origins), None)
        if origin is not None:
            origins[node] = origin
    return {node.name: origin for node, origin in origins.items()}


def reason_of(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.') if lines else 'no message'}"
