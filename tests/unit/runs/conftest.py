from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.run import Results
from agnitra_lab.runs import provenance
from agnitra_lab.runs.summary import summarise


@pytest.fixture
def make_summary():
    """(run, kind, **figures) -> RunSummary."""

    def make(run_id="20260114_093012_t_3fa9", kind="report", topic="demo:llama", device="AMD EPYC 9B14", **figures):
        meta = provenance.meta(
            run_id,
            kind,
            topic,
            command="agnitra optimize demo:llama",
            argv=["agnitra", "optimize", "demo:llama"],
            seed=0,
            device=DeviceInfo(type="cpu", name=device),
        )
        return summarise(meta, Results(**figures))

    return make


@pytest.fixture(scope="session")
def make_report():
    """The report tests' factory."""
    path = Path(__file__).parents[1] / "report" / "report_factory.py"
    spec = importlib.util.spec_from_file_location("report_factory_for_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_report
