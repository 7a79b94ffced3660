"""Where kernel templates would apply in a graph, and at which shape their configs should be searched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agnitra_lab.contracts.graph import GraphHandoff, WorkloadProfile

TEMPLATE_OF_PATTERN = {"rms_norm": "rms_norm", "gated_mlp": "swiglu"}
# The node of a pattern whose output has the template's shape: the activation, not the projection around it.
_SHAPE_OPS = {"rms_norm": ("aten::mul", "aten::rms_norm"), "swiglu": ("aten::silu", "aten::sigmoid")}


@dataclass(frozen=True)
class Site:
    """One template at one shape.

    Attributes:
        template: template name.
        shape: (rows, columns).
        dtype: such as "bfloat16".
        num_nodes: how many places of the graph share it.
    """

    template: str
    shape: tuple[int, int]
    dtype: str
    num_nodes: int


def template_sites(handoff: GraphHandoff, profile: WorkloadProfile) -> list[Site]:
    """List the most frequent shape of each template in the graph."""
    nodes = {node.name: node for node in handoff.graph.nodes}
    counts: dict[tuple[str, tuple[int, int], str], int] = {}
    for pattern in profile.patterns:
        template = TEMPLATE_OF_PATTERN.get(pattern.pattern_name)
        if template is None:
            continue
        members = [nodes[name] for name in pattern.subgraph if name in nodes]
        shaped = [node for node in members if node.op in _SHAPE_OPS[template] and len(node.shape) >= 2 and node.dtype]
        if shaped:
            node = shaped[-1]
            key = (template, (math.prod(node.shape[:-1]), node.shape[-1]), str(node.dtype))
            counts[key] = counts.get(key, 0) + 1
    best: dict[str, Site] = {}
    for (template, shape, dtype), count in counts.items():
        if template not in best or count > best[template].num_nodes:
            best[template] = Site(template, shape, dtype, count)
    return list(best.values())
