"""The rollback card: what was compared with the original, and whether all of it is the same."""

from __future__ import annotations

from agnitra_lab.contracts.patch import RollbackProof
from agnitra_lab.notebook import cards
from agnitra_lab.report import numbers, palette
from agnitra_lab.report.html import Html

_COLUMNS = (cards.Column("What", 28), cards.Column("Found", 72))


def rollback_card_html(proof: RollbackProof) -> Html:
    """Render the proof of a rollback as one block of HTML."""
    return cards.block(
        cards.kicker(["rollback"]),
        cards.title(rollback_sentence(proof), palette.ACCENT if proof.is_restored else palette.WARNING),
        cards.section(cards.table(cards.Table("What was compared", _COLUMNS, rollback_facts(proof)))),
    )


def rollback_card_text(proof: RollbackProof) -> str:
    """Render the proof of a rollback as plain text."""
    lines = ["Agnitra Lab rollback", rollback_sentence(proof), ""]
    lines += [f"{label}: {value}." for label, value in rollback_facts(proof)]
    return "\n".join(numbers.plain_text(line) for line in lines) + "\n"


def rollback_sentence(proof: RollbackProof) -> str:
    """Whether the original is back."""
    return (
        "The original is restored, bit for bit." if proof.is_restored
        else f"The original was NOT restored: {proof.detail or 'see below'}."
    )  # fmt: skip


def rollback_facts(proof: RollbackProof) -> list[tuple[str, str]]:
    """What was compared, and what was found."""

    def same(is_equal: bool) -> str:
        return "the same" if is_equal else "DIFFERENT"

    facts = [
        ("Attributes", same(proof.attributes_equal)),
        ("Hooks", same(proof.hooks_equal)),
        ("Parameters and buffers", f"{same(proof.parameters_equal)}, {proof.num_parameters:,} parameters"),
        ("Outputs", same(proof.outputs_equal)),
        ("State sha256", proof.state_sha256[:16]),
    ]
    return [*facts, ("Detail", proof.detail)] if proof.detail else facts
