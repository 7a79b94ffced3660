"""Structured events that a run emits, one JSON object a line."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from agnitra_lab.contracts.base import Contract

EventName = Literal[
    "run.started",
    "stage.completed",
    "optimization.completed",
    "optimization.fallback",
    "optimization.rolled_back",
    "usage.attach",
]


class Event(Contract):
    """One thing that happened in a run."""

    event: EventName
    timestamp: str
    """UTC, ISO 8601, ends in Z."""
    run_id: str
    payload: dict[str, JsonValue]
    schema_version: str = "agnitra.event.v1"
