"""Benchmark: a Workload and a candidate callable in, a Comparison out (equivalence, interleaved timings, verdict).

verify (seeded inputs, fp64 oracle) -> time_pair (A/B/B/A, cold caches) -> check the timed outputs -> verdict
"""
