"""Landscapes in a few lines: the same figures whatever the order, bounded whatever the size."""

from __future__ import annotations

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import landscape, measured

from agnitra_lab.contracts.search import KernelConfig, Trial
from agnitra_lab.suggest import landscapes

RECORDED = landscape("rms_norm__16384x4096")
TRIALS = measured(RECORDED, RECORDED.space.configs)


def test_a_whole_landscape_is_its_best_its_spread_and_its_marginals():
    facts = landscapes.summarise(TRIALS)
    assert facts["num_measured"] == len(RECORDED.space.configs)
    assert facts["best_us"] == 129.2
    assert facts["best"][0] == {"us": 129.2, "BLOCK_N": 8192, "ROWS_PER_PROGRAM": 1, "num_warps": 16, "num_stages": 1}
    marginals = facts["best_over_best_by_value"]
    assert marginals["BLOCK_N"]["8192"] == 1.0
    assert all(min(values.values()) == 1.0 for values in marginals.values())


def test_the_order_of_measuring_changes_nothing():
    shuffled = random.Random(0).sample(TRIALS, len(TRIALS))
    assert landscapes.summarise(shuffled) == landscapes.summarise(TRIALS)


def test_several_measurements_of_one_config_count_by_their_median():
    lucky = TRIALS[0].model_copy(update={"latency_ms": 1e-6})
    facts = landscapes.summarise([*[TRIALS[0]] * 4, lucky])
    assert facts["num_measured"] == 1
    assert facts["best_us"] > 1


def test_nothing_measured_says_only_that():
    assert landscapes.summarise([]) == {"num_measured": 0, "num_failed": 0}
    assert landscapes.best_latency_ms([]) is None


def test_a_failures_words_are_printable_redacted_and_short():
    secret = "sk-" + "a1B2" * 8
    detail = f"\x1b[2JRuntimeError {secret} {'x' * 500}: more"
    failed = Trial(index=0, config=TRIALS[0].config, latency_ms=None, status="failed", detail=detail)
    text = json.dumps(landscapes.summarise([failed]))
    assert secret not in text
    assert "\\u001b" not in text
    assert len(text) < 400


latencies = st.none() | st.floats(1e-6, 1e4)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), latencies), max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_summary_is_bounded_json_whatever_was_measured(points):
    trials = [
        Trial(index=i, config=KernelConfig(template="t", params={"A": a, "B": b}), latency_ms=ms,
              status="ok" if ms else "failed", detail=None if ms else f"class {a % 9}")
        for i, (a, b, ms) in enumerate(points)
    ]  # fmt: skip
    text = json.dumps(landscapes.summarise(trials), allow_nan=False)
    assert len(text) < 3_500
