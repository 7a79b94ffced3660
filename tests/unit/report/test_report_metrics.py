from __future__ import annotations

import pytest
from report_factory import make_report

from agnitra_lab.report.metrics import metric_cards

LABELS = ["Latency", "Tokens/s", "GPU utilisation", "GPU hours saved", "Cost impact"]


def cards_of(*arguments, **changes):
    return {card.label: card for card in metric_cards(make_report(*arguments, **changes))}


def test_there_are_five_cards_in_a_fixed_order(any_report):
    assert [card.label for card in metric_cards(any_report)] == LABELS


def test_a_faster_run_shows_before_after_and_change():
    card = cards_of("cuda")["Latency"]
    assert (card.baseline, card.value, card.change) == ("24.40 ms", "15.06 ms", "1.62× as fast")
    assert card.state == "better"


def test_images_are_called_images():
    report = make_report()
    comparison = report.comparison.model_copy(update={"item_unit": "images"})
    assert metric_cards(report.model_copy(update={"comparison": comparison}))[1].label == "Images/s"


@pytest.mark.parametrize("verdict", ["no_change", "slower", "not_equivalent"])
def test_without_a_faster_candidate_nothing_claims_a_gain(verdict):
    cards = cards_of("cuda", verdict)
    assert [cards[label].change for label in LABELS if label != "GPU utilisation"] == ["no change"] * 4
    assert cards["Latency"].value == "24.40 ms"
    assert cards["GPU hours saved"].value == "0.0000 h"
    assert not any(card.state == "better" for card in cards.values())


def test_an_absent_value_says_why_and_is_never_zero():
    cards = cards_of("cpu")
    for label in ("GPU utilisation", "GPU hours saved"):
        assert cards[label].state == "absent"
        assert "no GPU" in cards[label].note
        assert not any(digit in cards[label].value for digit in "0123456789")


def test_a_missing_reading_on_a_gpu_gives_its_reason():
    report = make_report("cuda")
    gpu = report.telemetry.gpu.model_copy(update={"gpu_utilisation": None, "reason": "no permission to read NVML"})
    telemetry = report.telemetry.model_copy(update={"gpu": gpu})
    assert metric_cards(report.model_copy(update={"telemetry": telemetry}))[2].note == "no permission to read NVML"
