"""The rounds on a real device: a served model's configs are compiled, measured and told; presets are no slow start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from agnitra_lab.loop import Optimization, Settings
from agnitra_lab.workloads.target import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "llm"))
import llm_server as misbehave

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def listed_configs(facts: dict[str, Any], start: int) -> list[dict[str, Any]]:
    """Three configs of each site whose space is listed in the question, and one that is no config."""
    latencies = {"target_latency_ms": 8.0, "expected_latency_ms": 9.0, "rationale": "Try."}
    items = []
    for site in facts["kernel_sites"]:
        order, configs = site.get("valid", {"order": [], "configs": []}).values()
        chosen = [dict(zip(order, point, strict=True)) for point in configs[start : start + 3]]
        for params in [*chosen, dict.fromkeys(site["params"], 10**9)]:
            items.append({"action": site["action"], "site": site["site"], "params": params, **latencies})
    return items


def test_a_served_models_configs_are_measured_on_this_device(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def adviser(responder: misbehave.Responder) -> None:
        asked.append(json.loads(responder.server_state.seen[-1].body["messages"][1]["content"]))
        items = listed_configs(asked[-1], 3 * (len(asked) - 1))
        misbehave.answer(json.dumps({"suggestions": items}))(responder)

    with misbehave.serve(adviser) as server:
        loop = Optimization(
            resolve("demo:llama-decode@tiny"),
            Settings(
                suggest="llm", llm_base_url=server.base_url, llm_model="m", is_llm_cached=False, budget_s=200.0,
                is_warm=False, tuned_folder=tmp_path / "tuned", artifacts=tmp_path / "artifacts",
            ),
        )  # fmt: skip
        try:
            loop.profile()
            loop.suggest()
            loop.refine()
        finally:
            loop.close()
    proposal = loop.proposal
    assert len(proposal.rounds) >= 2, proposal.stopped_because
    assert proposal.rounds[0].measured_on == {}
    assert proposal.rounds[1].best_latency_ms
    assert any("measured_here" in site and "floor_us" in site for site in asked[1]["kernel_sites"])
    assert loop.searches
    assert all(search.measured_on == torch.cuda.get_device_name() for search in loop.searches)
