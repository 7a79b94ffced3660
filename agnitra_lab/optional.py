"""The one door to packages that an installation may lack: it names what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from agnitra_lab.errors import MissingError


def require(module: str, *, extra: str | None = None, purpose: str) -> ModuleType:
    """Import `module`, or say which install line brings it.

    Args:
        module: dotted module name.
        extra: the extra of this package that holds it; None when it is a base dependency.
        purpose: what the caller needs it for, as the end of "... is needed ".

    Raises:
        MissingError: when the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        target = f"'agnitra-lab[{extra}]'" if extra else module.partition(".")[0]
        raise MissingError(
            f"{module} is needed {purpose}, and cannot be imported ({error}).",
            hint=f"Install it: pip install {target}",
        ) from error
