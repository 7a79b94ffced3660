"""Graphs as facts: a model and its inputs -> `GraphHandoff` (capture) -> `WorkloadProfile` (semantics)."""
