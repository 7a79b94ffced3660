"""The design's rules that no linter holds: what importing costs, what is public, how large files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agnitra_lab

PACKAGE = Path(agnitra_lab.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "triton", "plotly", "pandas", "numpy", "openai", "IPython")


def _loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert _loaded_by("import agnitra_lab") == set()


def test_the_shell_help_loads_nothing_heavy() -> None:
    run_help = "import sys; sys.argv = ['agnitra', '--help']\nfrom agnitra_lab.cli import main\nmain(exits=False)"
    assert _loaded_by(run_help) == set()


def test_contracts_load_no_array_library() -> None:
    assert _loaded_by("import agnitra_lab.contracts") == set()


def test_the_heavy_import_check_can_fail() -> None:
    assert "numpy" in _loaded_by("import numpy")


def test_every_public_name_resolves_to_its_defining_module() -> None:
    assert set(agnitra_lab.__all__) == set(agnitra_lab._PUBLIC)
    assert len(agnitra_lab.__all__) <= 12
    for name in agnitra_lab.__all__:
        assert getattr(agnitra_lab, name).__module__.startswith(agnitra_lab._PUBLIC[name])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_for_and_fits_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert text.count("\n") <= 500
    for node in ast.walk(tree):
        # A Triton kernel is one launch and must stand alone in the source that is rendered from it.
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        is_kernel = path.parent.name == "templates" and "triton.jit" in decorators
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel:
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"


def test_no_module_imports_the_facade() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "agnitra_lab", f"{path.name}:{node.lineno} imports the facade"
