"""Workloads: named models with random weights and fixed seeds, and TARGET strings -> `Workload`."""
