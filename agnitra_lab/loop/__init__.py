"""THE LOOP: profile -> suggest -> refine -> generate -> patch -> benchmark -> report.

`optimization.Optimization` has one method a stage and holds the state between them, so that a stepper can run them one
by one; `entry.optimize` runs them top to bottom. Model and inputs in, `result.Result` out, evidence under `artifacts/`.
"""

from agnitra_lab.loop.entry import compare, optimize, profile, profile_run
from agnitra_lab.loop.optimization import Optimization
from agnitra_lab.loop.redo import redo
from agnitra_lab.loop.result import Result
from agnitra_lab.loop.settings import Settings

__all__ = ["Optimization", "Result", "Settings", "compare", "optimize", "profile", "profile_run", "redo"]
