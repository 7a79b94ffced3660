"""A real IPython shell in this process, and a real kernel beside it, both with the extension loaded."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output
from notebook_kernel import KernelSession
from traitlets.config import Config

DEFINE_MODEL = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
x = torch.randn(2, 8)
"""


class Shell:
    """A shell whose cells give back all that they displayed."""

    def __init__(self, ip):
        self.ip = ip

    def run(self, cell):
        with capture_output() as captured:
            result = self.ip.run_cell(cell, store_history=True)
        return Ran(result, captured)

    def ok(self, cell):
        ran = self.run(cell)
        assert ran.success, ran.text
        return ran

    def __getitem__(self, name):
        return self.ip.user_ns[name]

    def __contains__(self, name):
        return name in self.ip.user_ns


class Ran:
    """One executed cell."""

    def __init__(self, result, captured):
        self.success, self.value = result.success, result.result
        self.error = result.error_before_exec or result.error_in_exec
        self.text = captured.stdout + captured.stderr
        self.bundles = [output.data for output in captured.outputs if isinstance(output, RichOutput)]

    @property
    def cards(self):
        return [bundle["text/html"] for bundle in self.bundles if "Agnitra Lab" in bundle.get("text/html", "")]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGNITRA_DISPLAY", raising=False)
    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    ip = InteractiveShell.instance(config=config)
    ip.colors = "nocolor"
    made = Shell(ip)
    made.ok("%load_ext agnitra_lab")
    yield made
    InteractiveShell.clear_instance()


@pytest.fixture
def modelled(shell):
    shell.ok(DEFINE_MODEL)
    return shell


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    with KernelSession(tmp_path_factory.mktemp("kernel")) as session:
        session.run("%load_ext agnitra_lab")
        yield session
