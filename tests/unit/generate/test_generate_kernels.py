"""From a place in the graph to the configs that are measured there."""

from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.generate.kernels import chosen_configs, seed_configs, space_of, supported
from agnitra_lab.graph.sites import Site

SITE = Site("rms_norm", (4096, 2048), "bfloat16", 9)


def suggestion(**fields: object) -> Suggestion:
    given = {"action": "rms_norm", "block_size": 2048, "tile_shape": (1, 2048), "unroll_factor": 1, **fields}
    return Suggestion(target_latency_ms=1.0, expected_latency_ms=1.0, rationale="r", source="llm:m", **given)


def test_a_site_without_any_valid_config_is_left_out() -> None:
    assert supported([SITE, Site("rms_norm", (4096, 2048), "float64", 9)]) == [SITE]


def test_a_suggestion_only_chooses_among_the_valid_configs() -> None:
    seeds = seed_configs(SITE, [suggestion(block_size=65536, num_warps=1, num_stages=8)])
    valid = {config.key() for config in space_of(SITE).configs}
    assert {config.key() for config in seeds} <= valid


def test_suggestions_of_other_actions_seed_nothing() -> None:
    assert seed_configs(SITE, [suggestion(action="swiglu")]) == seed_configs(SITE, [])


def test_a_template_that_was_not_searched_gets_the_rule_of_thumb() -> None:
    chosen = chosen_configs([], [SITE])
    assert [config.template for config in chosen] == ["rms_norm"]
    assert chosen == seed_configs(SITE, [])
