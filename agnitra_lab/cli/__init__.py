"""The shell: `agnitra STAGE TARGET`, the same words and the same implementation as the notebook and Python.

Exit codes: 0 done; 1 a check failed; 2 bad usage or input; 3 a needed dependency or device is missing; 130 cancelled.
"""

from agnitra_lab.cli.app import app, main

__all__ = ["app", "main"]
