"""Agnitra Lab: a Jupyter-native workbench that makes PyTorch inference cheaper and proves it.

    profile -> suggest -> refine -> generate -> patch -> benchmark -> report

    import agnitra_lab
    result = agnitra_lab.optimize(model, inputs)   # the whole loop; result.model is the drop-in
    telemetry = agnitra_lab.profile(lambda: model(x))  # what burns the time, as frames and as JSON
    comparison = agnitra_lab.compare(model, candidate, inputs)  # is it really faster, and still right

In a notebook: `%load_ext agnitra_lab`, then `%%agnitra_profile` on a cell, `%agnitra_optimize model inputs`, or
`Workbench(model, inputs)` to go step by step.
In a shell: `agnitra demo`, `agnitra profile TARGET`, `agnitra optimize TARGET`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from agnitra_lab.contracts.workload import Workload
    from agnitra_lab.errors import AgnitraError
    from agnitra_lab.loop import Optimization, Result, Settings, compare, optimize, profile
    from agnitra_lab.notebook import load_ipython_extension, unload_ipython_extension
    from agnitra_lab.notebook.workbench import Workbench

# Public name -> defining module. Resolved on first use, so that importing the package loads neither torch nor plotly.
_PUBLIC = {
    "optimize": "agnitra_lab.loop",
    "profile": "agnitra_lab.loop",
    "compare": "agnitra_lab.loop",
    "Optimization": "agnitra_lab.loop",
    "Result": "agnitra_lab.loop",
    "Settings": "agnitra_lab.loop",
    "Workbench": "agnitra_lab.notebook.workbench",
    "Workload": "agnitra_lab.contracts.workload",
    "AgnitraError": "agnitra_lab.errors",
    "load_ipython_extension": "agnitra_lab.notebook",
    "unload_ipython_extension": "agnitra_lab.notebook",
}

__all__ = [
    "AgnitraError",
    "Optimization",
    "Result",
    "Settings",
    "Workbench",
    "Workload",
    "compare",
    "load_ipython_extension",
    "optimize",
    "profile",
    "unload_ipython_extension",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'agnitra_lab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
