"""A cell's body as IPython itself would run it: same names, same value, same traceback, same sources.

`shell.run_cell` would swallow the exception, so that the notebook calls a failed cell a success; here the body is
parsed, and run by exec and eval in the user's namespace.

Source: IPython `core/magics/execution.py` (`%%time` runs its body this way).
"""

from __future__ import annotations

import ast
import inspect
import re
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any

from agnitra_lab.errors import UsageError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


class CellBody:
    """A compiled cell body; each call runs it once and returns the value of its last expression.

    Args:
        shell: whose namespace, transformers and compiler are used.
        cell: the text below the magic's line.
        magic: the magic as the user writes it, for messages and to find its line in the cell.

    Attributes:
        is_empty: there is no statement in it.

    Raises:
        SyntaxError: as in any cell.
        UsageError: the body awaits at top level, which a magic cannot do.
    """

    def __init__(self, shell: InteractiveShell, cell: str, magic: str) -> None:
        self._shell = shell
        source = "\n" * _num_lines_above(shell, cell, magic) + shell.transform_cell(cell)
        # Registered before anything can fail: tracebacks and inspect.getsource (which triton.jit reads) look it up.
        compiler: Any = shell.compile  # takes trees as well as text
        # The number of the running cell: from IPython 9 on, shell.execution_count is that of the next one by now.
        filename = compiler.cache(source, shell.displayhook.prompt_count)
        tree = shell.transform_ast(compiler.ast_parse(source, filename=filename))
        _refuse_await(tree, filename, compiler.flags, magic)
        body = _interactive(list(tree.body), shell.ast_node_interactivity)
        self.is_empty = not body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        shows_all = shell.ast_node_interactivity == "all"
        module = ast.Interactive(body) if shows_all else ast.Module(body, type_ignores=[])
        self._statements: CodeType | None = (
            compiler(module, filename, "single" if shows_all else "exec") if body else None
        )
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


def user_traceback(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins in the body of a cell, or all of it when the body is not in it."""
    part = trace
    while part is not None:
        if part.tb_frame.f_code is CellBody.__call__.__code__ and part.tb_next is not None:
            return part.tb_next
        part = part.tb_next
    return trace


def _num_lines_above(shell: InteractiveShell, cell: str, magic: str) -> int:
    """Count the lines above the body's first statement, so that tracebacks count as the user's cell does.

    They are the magic's own line, those of magics around it, and the blank lines that IPython drops.
    """
    lines = cell.splitlines()
    num_blank = next((index for index, line in enumerate(lines) if line.strip()), len(lines))
    history: Any = shell.history_manager
    raw = re.sub(r"\A\s*\n", "", history.input_hist_raw[-1]).rstrip() if history is not None else ""
    above = raw.removesuffix(cell.rstrip()).splitlines() if raw.endswith(cell.rstrip()) else []
    return num_blank + (len(above) if above and above[-1].startswith(magic) else 1)


def _interactive(body: list[ast.stmt], interactivity: str) -> list[ast.stmt]:
    """Give the body the value that the user's ast_node_interactivity asks for: that of a last assignment."""
    target = None
    if interactivity == "last_expr_or_assign" and body:
        last = body[-1]
        if isinstance(last, ast.Assign) and len(last.targets) == 1:
            target = last.targets[0]
        elif isinstance(last, ast.AugAssign | ast.AnnAssign):
            target = last.target
    if not isinstance(target, ast.Name):
        return body
    return [*body, ast.fix_missing_locations(ast.Expr(ast.Name(target.id, ast.Load())))]


def _refuse_await(tree: ast.Module, filename: str, flags: int, magic: str) -> None:
    code = compile(tree, filename, "exec", flags=flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise UsageError(
            f"{magic} cannot run a cell that awaits at top level; nothing was run.",
            hint="Await in a cell of its own, as in x = await load(), and profile the cell that computes.",
        )
