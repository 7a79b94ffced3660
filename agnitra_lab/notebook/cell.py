"""A cell's body as IPython itself would run it: same names, same value, same traceback, same sources.

`shell.run_cell` would swallow the exception, so that the notebook calls a failed cell a success; here the body is
parsed, and run by exec and eval in the user's namespace.

Source: IPython `core/magics/execution.py` (`%%time` runs its body this way).
"""

from __future__ import annotations

import ast
import inspect
from types import CodeType
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import UsageError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


class CellBody:
    """A compiled cell body; each call runs it once and returns the value of its last expression.

    Args:
        shell: whose namespace, transformers and compiler are used.
        cell: the text below the magic's line.

    Raises:
        SyntaxError: as in any cell.
        UsageError: the body awaits at top level, which a magic cannot do.
    """

    def __init__(self, shell: InteractiveShell, cell: str) -> None:
        self._shell = shell
        source = _line_padding(cell) + shell.transform_cell(cell)
        # Registered before anything can fail: tracebacks and inspect.getsource (which triton.jit reads) look it up.
        compiler: Any = shell.compile  # takes trees as well as text
        filename = compiler.cache(source, shell.execution_count)
        tree = shell.transform_ast(compiler.ast_parse(source, filename=filename))
        _refuse_await(tree, filename, compiler.flags)
        body = list(tree.body)
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        module = ast.Module(body, type_ignores=[])
        self._statements: CodeType | None = compiler(module, filename, "exec") if body else None
        self._value: CodeType | None = (
            compiler(ast.Expression(last.value), filename, "eval") if isinstance(last, ast.Expr) else None
        )

    def __call__(self) -> Any:
        """Run the body; what it raises passes unchanged."""
        __tracebackhide__ = True  # IPython leaves this frame out of the user's traceback
        shell = self._shell
        if self._statements is not None:
            exec(self._statements, shell.user_global_ns, shell.user_ns)
        if self._value is not None:
            return eval(self._value, shell.user_global_ns, shell.user_ns)
        return None


def _line_padding(cell: str) -> str:
    """Blank lines for the magic's own line and those that IPython drops, so that tracebacks count as the cell does."""
    lines = cell.splitlines()
    num_leading = next((index for index, line in enumerate(lines) if line.strip()), len(lines))
    return "\n" * (1 + num_leading)


def _refuse_await(tree: ast.Module, filename: str, flags: int) -> None:
    code = compile(tree, filename, "exec", flags=flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise UsageError(
            "%%agnitra_profile cannot run a cell that awaits at top level; nothing was run.",
            hint="Await in a cell of its own, and profile the cell that computes.",
        )
