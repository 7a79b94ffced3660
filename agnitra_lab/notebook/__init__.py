"""The loop in a notebook: magics and cards. A cell or expressions in, the loop's own records out, shown as cards.

Views only: every figure comes from a contract that the loop made. `%load_ext agnitra_lab` loads neither torch nor
plotly nor pandas; the first magic that needs one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(ip: InteractiveShell) -> None:
    """Register the magics, the completion of their options, and how results are displayed.

    Args:
        ip: the shell; `%load_ext agnitra_lab` passes it.
    """
    from agnitra_lab.notebook.magics import install

    install(ip)


def unload_ipython_extension(ip: InteractiveShell) -> None:
    """Take away everything that `load_ipython_extension` registered.

    Args:
        ip: the shell; `%unload_ext agnitra_lab` passes it.
    """
    from agnitra_lab.notebook.magics import uninstall

    uninstall(ip)
