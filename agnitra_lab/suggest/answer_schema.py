"""The JSON schema that a language model is asked to follow: closed, in the subset that strict servers take.

Every field is required and null where it does not apply. A search space appears as what each of its parameters may be;
which combinations are valid is checked when the answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.suggest.sites import KernelSite

SCHEMA_NAME = "agnitra_suggestions"
KERNEL_FIELDS = ("block_size", "tile_shape", "unroll_factor", "num_warps", "num_stages")
ASKED_FIELDS = ("action", *KERNEL_FIELDS, "target_latency_ms", "expected_latency_ms", "rationale")
CHOICE_FIELDS = ("site", "params")
"""Asked for instead of the seed's kernel fields, which follow from them, where search spaces are handed in."""

_STRICT_KEYWORDS = frozenset(
    ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems")
)


def answer_schema(actions: Sequence[str] = tuple(ACTIONS), sites: Sequence[KernelSite] = ()) -> dict[str, Any]:
    """Return the schema of an answer.

    Args:
        actions: the actions that may be chosen.
        sites: the search spaces that may be chosen from.
    """
    item = item_schema(actions, sites)
    return {
        "type": "object",
        "properties": {"suggestions": {"type": "array", "items": item}},
        "required": ["suggestions"],
        "additionalProperties": False,
    }


def item_schema(actions: Sequence[str], sites: Sequence[KernelSite] = ()) -> dict[str, Any]:
    """Return the schema of one suggestion."""
    contract = Suggestion.model_json_schema()["properties"]
    names = [name for name in ASKED_FIELDS if not sites or name not in KERNEL_FIELDS]
    fields = {name: _for_strict_servers(contract[name]) for name in names}
    fields["action"] = {"type": "string", "enum": list(actions)}
    if sites:
        fields["site"] = {"anyOf": [{"type": "string", "enum": [site.key for site in sites]}, {"type": "null"}]}
        fields["params"] = {"anyOf": [*_distinct(_params_schema(site) for site in sites), {"type": "null"}]}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _params_schema(site: KernelSite) -> dict[str, Any]:
    properties = {name: {"type": "integer", "enum": list(values)} for name, values in site.space.params.items()}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _distinct(schemas: Any) -> list[dict[str, Any]]:
    distinct: list[dict[str, Any]] = []
    for schema in schemas:
        if schema not in distinct:
            distinct.append(schema)
    return distinct


def _for_strict_servers(schema: dict[str, Any]) -> dict[str, Any]:
    """Say the same without `prefixItems` and the keywords of text, which strict servers refuse."""
    kept = {name: value for name, value in schema.items() if name in _STRICT_KEYWORDS}
    if "anyOf" in schema:
        kept["anyOf"] = [_for_strict_servers(choice) for choice in schema["anyOf"]]
    if "prefixItems" in schema:
        kept["items"] = _for_strict_servers(schema["prefixItems"][0])
    return kept
