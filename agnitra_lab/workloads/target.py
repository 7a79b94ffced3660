"""TARGET strings of the shell -> `Workload`.

FILE.py:FUNCTION          a function that returns a model and its inputs, or a Workload
package.module:FUNCTION   the same from an importable module
ARCHIVE.pt2               a torch.export archive with its example inputs
demo:NAME[@SCALE]         a named workload of this package
suite:NAME[@SCALE]        a workload of the suite that the optimiser is judged on
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import AgnitraError, MissingError, TargetError
from agnitra_lab.workloads.adopt import as_workload
from agnitra_lab.workloads.demos import DEMOS, demo
from agnitra_lab.workloads.suite import SUITE, suite_workload

_FORMS = "Expected FILE.py:FUNCTION, package.module:FUNCTION, ARCHIVE.pt2, demo:NAME, or suite:NAME."


def resolve(target: str) -> Workload:
    """Build the workload that `target` names.

    Raises:
        TargetError: a missing file, module or function; a function that raises or returns something else.
        MissingError: torch is not installed.
    """
    if not importlib.util.find_spec("torch"):
        raise MissingError(
            "torch is needed to run a model, and is not installed.", hint="Install it: pip install torch"
        )
    if target.startswith("demo:"):
        name, _, scale = target.removeprefix("demo:").partition("@")
        return demo(name, scale=scale or None)
    if target.startswith("suite:"):
        name, _, scale = target.removeprefix("suite:").partition("@")
        return suite_workload(name, scale=scale or None)
    if target.endswith(".pt2"):
        return _from_archive(Path(target))
    location, separator, function = target.rpartition(":")
    if not separator or not location or not function:
        hint = f"{_FORMS} Demos: {', '.join(DEMOS)}."
        raise TargetError(f"Not a target: {target!r}.", hint=hint)
    module = _load_file(Path(location)) if location.endswith(".py") else _load_module(location)
    build = getattr(module, function, None)
    if build is None:
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise TargetError(
            f"{location} has no function {function!r}.", hint=f"It has: {', '.join(sorted(known)[:12]) or 'none'}."
        )
    return _call(build, target, default_name=function if function != "build" else Path(location).stem)


def own_name(target: str) -> str | None:
    """Return what a user's own workload is called in a table: file or module and function, without its folder.

    Args:
        target: of any form; a named workload of this package has no such name, nor has an archive.
    """
    location, separator, function = target.rpartition(":")
    if not separator or not location or not function or location in ("demo", "suite"):
        return None
    return f"{Path(location).stem if location.endswith('.py') else location}:{function}"


OWN = "own"
"""Family and scale of what is no workload of the suite: the target says for itself how large it is."""


def called(name: str) -> str:
    """Return what a workload of the suite, or a target, is called in the suite's tables."""
    return name if name in SUITE else own_name(name) or name


def family_of(name: str) -> str:
    """Return what kind of model a workload of the suite is, or `OWN`."""
    return SUITE[name].family if name in SUITE else OWN


def table_facts(name: str, scale: str) -> dict[str, Any]:
    """Return the fields of a `SuiteResult` that are known before anything has run.

    Args:
        name: a workload of the suite, or a target.
        scale: of the suite's workloads.
    """
    is_own = name not in SUITE
    return {
        "workload": called(name), "family": family_of(name), "scale": OWN if is_own else scale,
        "is_algebra": not is_own and SUITE[name].is_algebra,
    }  # fmt: skip


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TargetError(f"No such file: {path}.", hint=_FORMS)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} cannot be loaded as Python.", hint=_FORMS)
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses and pickles inside the file look their module up by name.
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if previous is None:
            sys.modules.pop(path.stem, None)
        raise TargetError(f"{path} raised {_one_line(error)} while it was loaded.", hint=_where(error, path)) from error
    finally:
        sys.path.remove(folder)
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TargetError(f"No module named {error.name!r} for target module {name!r}.", hint=_FORMS) from error
    except Exception as error:
        raise TargetError(f"Module {name!r} raised {_one_line(error)} while it was imported.") from error
    finally:
        sys.path.remove("")


def _call(build: Any, target: str, *, default_name: str) -> Workload:
    try:
        made = build() if not isinstance(build, Workload) else build
    except AgnitraError:
        raise
    except Exception as error:
        raise TargetError(f"{target} raised {_one_line(error)}.", hint=_where(error)) from error
    if isinstance(made, Workload):
        return made
    if isinstance(made, tuple) and len(made) == 2 and callable(made[0]):
        return as_workload(made[0], made[1], name=default_name)
    raise TargetError(
        f"{target} returned {type(made).__name__}.", hint="Expected (model, inputs) or an agnitra_lab.Workload."
    )


def _from_archive(path: Path) -> Workload:
    if not path.is_file():
        raise TargetError(f"No such archive: {path}.", hint=_FORMS)
    import torch

    try:
        program = torch.export.load(path)
    except Exception as error:
        raise TargetError(f"{path} is not a torch.export archive ({_one_line(error)}).") from error
    if program.example_inputs is None:
        raise TargetError(f"{path} holds no example inputs.", hint="Export the model with its inputs and save again.")
    args, kwargs = program.example_inputs
    return Workload(path.stem, program.module(), tuple(args), dict(kwargs))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _where(error: BaseException, path: Path | None = None) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.lineno:
        return f"At line {error.lineno} of {path.name if path else error.filename}."
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    return f"At line {own[-1].lineno} of {Path(own[-1].filename).name}." if own else None
