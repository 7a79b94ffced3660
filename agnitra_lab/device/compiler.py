"""The C++ compiler that torch.compile needs on a CPU, found before the first compile instead of inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from agnitra_lab.errors import MissingError

_HINT = "Install g++ (apt-get install g++), or set CXX to the path of a compiler."


def require_cpp_compiler() -> str:
    """Return the path of the C++ compiler that Inductor will run.

    Inductor takes the environment variable CXX, else g++ (clang++ on macOS), and asks it for its version.

    Raises:
        MissingError: when it is not found or does not run.
    """
    chosen = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    given = f"CXX={chosen}" if os.environ.get("CXX") else chosen
    path = shutil.which(chosen)
    if path is None:
        raise MissingError(f"torch.compile needs a C++ compiler, and no C++ compiler was found ({given}).", hint=_HINT)
    try:
        subprocess.run([path, "--version"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingError(f"The C++ compiler {given} does not run ({error}).", hint=_HINT) from error
    return path
