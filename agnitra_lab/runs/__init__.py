"""Runs: contracts in (Report, RunSummary, Event), directories under `artifacts/` out, and those read back.

`layout` says where things are, `store` writes them, `read` lists and verifies them, `provenance` and `summary` build
`summary.json` and `run.md`, `regressions` compares two summaries.
"""
