"""THE LOOP: profile -> suggest -> refine -> generate -> patch -> benchmark -> report.

`optimization.Optimization` has one method a stage and holds the state between them, so that a stepper can run them one
by one; `entry.optimize` runs them top to bottom. Model and inputs in, `result.Result` out, evidence under `artifacts/`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agnitra_lab.loop.entry import compare, optimize, profile, profile_run
    from agnitra_lab.loop.optimization import Optimization
    from agnitra_lab.loop.redo import redo
    from agnitra_lab.loop.result import Result
    from agnitra_lab.loop.settings import Settings

# Public name -> defining module. Loaded on first use: settings are wanted where the stages, and 170 modules with them,
# are not yet.
_PUBLIC = {
    "Optimization": "optimization",
    "Result": "result",
    "Settings": "settings",
    "compare": "entry",
    "optimize": "entry",
    "profile": "entry",
    "profile_run": "entry",
    "redo": "redo",
}

__all__ = ["Optimization", "Result", "Settings", "compare", "optimize", "profile", "profile_run", "redo"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'agnitra_lab.loop' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"agnitra_lab.loop.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
