"""The design documents' own examples validate, and come back as they were."""

import json
from pathlib import Path

import pytest

from agnitra_lab.contracts import PUBLISHED, Suggestion, TelemetryRecord, UsageEvent
from agnitra_lab.errors import UsageError

SEEDS = Path(__file__).parents[3] / "fixtures" / "seeds"
EXAMPLES = {
    "telemetry.json": "telemetry",
    "usage_event.json": "usage",
    "summary.json": "summary",
    "suggestion.json": "suggestion",
    "patch_log.json": "patch",
}


@pytest.mark.parametrize(("file", "contract"), EXAMPLES.items())
def test_a_seed_example_round_trips_key_for_key(file: str, contract: str) -> None:
    text = (SEEDS / file).read_text()
    parsed = PUBLISHED[contract].from_json(text)
    assert json.loads(parsed.model_dump_json(exclude_unset=True)) == json.loads(text)


@pytest.mark.parametrize("contract", PUBLISHED.values())
def test_every_published_contract_exports_a_closed_json_schema(contract: type) -> None:
    schema = contract.model_json_schema()
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


def test_a_written_document_reads_back_equal() -> None:
    event = UsageEvent.from_json((SEEDS / "usage_event.json").read_text())
    assert UsageEvent.from_json(event.to_json()) == event


def test_an_unknown_key_is_named_in_the_error() -> None:
    with pytest.raises(UsageError, match=r"colour.*Extra inputs"):
        TelemetryRecord.from_json('{"bottleneck": null, "events": [], "gpu": {}, "behavior": {}, "colour": 1}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 1000),
        ("block_size", 10**9),
        ("tile_shape", [0, 4]),
        ("unroll_factor", 3.5),
        ("expected_latency_ms", -1.0),
        ("action", "rm -rf"),
        ("rationale", ""),
    ],
)
def test_a_suggestion_out_of_range_is_refused(field: str, value: object) -> None:
    document = json.loads((SEEDS / "suggestion.json").read_text()) | {field: value}
    with pytest.raises(UsageError, match=field):
        Suggestion.from_json(json.dumps(document))


def test_a_contract_never_changes_after_it_was_made() -> None:
    record = TelemetryRecord.from_json((SEEDS / "telemetry.json").read_text())
    with pytest.raises(ValueError, match="frozen"):
        record.name = "other"  # type: ignore[misc]
