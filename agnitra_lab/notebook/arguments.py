"""The line of a magic -> its options and its Python expressions."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError

if TYPE_CHECKING:
    from argparse import Namespace

    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.magic_arguments import MagicArgumentParser

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


def parse(parser: MagicArgumentParser, pieces: Sequence[str], magic: str) -> Namespace:
    """Parse a line's options.

    Args:
        parser: of the magic.
        pieces: the line, as `pieces_of` cuts it.
        magic: the magic as the user writes it, for the error.

    Raises:
        UsageError: an unknown option, or a value that does not fit.
    """
    from IPython.core.error import UsageError as IPythonUsageError

    try:
        return parser.parse_args([_unquoted(piece) for piece in pieces])
    except IPythonUsageError as error:
        raise UsageError(f"{magic}: {error}.", hint=f"Its options: {magic}?") from error


def pieces_of(line: str) -> list[str]:
    """Cut a line at the spaces that are in no bracket and no string: each piece is an option, a value or code."""
    pieces, current, depth, quote, is_escaped = [], "", 0, "", False
    for character in line.strip():
        if quote:
            quote = "" if character == quote and not is_escaped else quote
            is_escaped = character == "\\" and not is_escaped
        elif character in _QUOTES:
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
        if character.isspace() and not quote and depth <= 0:
            pieces.append(current)
            current = ""
        else:
            current += character
    return [piece for piece in (*pieces, current) if piece]


def split_options(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate options from code. Every option takes one value, as `--name VALUE` or `--name=VALUE`.

    Returns:
        (pieces of code, options and their values).
    """
    code: list[str] = []
    options: list[str] = []
    rest = iter(pieces)
    for piece in rest:
        if not piece.startswith("--"):
            code.append(piece)
            continue
        options.append(piece)
        value = None if "=" in piece else next(rest, None)
        if value is not None:
            options.append(value)
    return code, options


def two_expressions(code: Sequence[str]) -> tuple[str, str | None]:
    """Tell the model's expression from that of its inputs.

    Args:
        code: pieces of the line, without its options.

    Returns:
        (model, inputs); inputs are None when there is one expression.

    Raises:
        UsageError: when no cut gives valid Python.
    """
    # Two before one: `model (a, b)` is a model and its inputs here, although it would be a call.
    for cut in range(1, len(code)):
        model, inputs = " ".join(code[:cut]), " ".join(code[cut:])
        if _is_expression(model) and _is_expression(inputs):
            return model, inputs
    whole = " ".join(code)
    if whole and (len(code) == 1 or _is_expression(whole)):
        return whole, None
    given = f"got {whole!r}" if whole else "got none"
    raise UsageError(
        f"Expected a model and its inputs, {given}.",
        hint="Write: %agnitra_optimize model inputs. Put an expression that holds spaces in parentheses.",
    )


def three_expressions(code: Sequence[str]) -> tuple[str, str, str | None]:
    """Tell the baseline's expression from the candidate's and from that of their inputs.

    Raises:
        UsageError: when no cut gives valid Python.
    """
    for cut in range(1, len(code)):
        first = " ".join(code[:cut])
        if _is_expression(first) or _is_target(first):
            with contextlib.suppress(UsageError):
                return first, *two_expressions(code[cut:])
    raise UsageError(
        f"Expected a baseline, a candidate and their inputs, got {' '.join(code)!r}.",
        hint="Write: %agnitra_compare model candidate inputs, or the ids of two runs.",
    )


def value_of(shell: InteractiveShell, expression: str) -> Any:
    """Evaluate an expression in the user's namespace.

    Raises:
        UsageError: with the exception's own words.
    """
    try:
        return eval(expression, shell.user_global_ns, shell.user_ns)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{expression!r} cannot be evaluated: {type(error).__name__}: {text}.",
            hint="Define it in a cell above and run that cell.",
        ) from error


def model_of(shell: InteractiveShell, expression: str) -> Any:
    """Evaluate an expression that stands for a model or workload, or build the workload of a TARGET string."""
    return _resolve(expression) if _is_target(expression) else value_of(shell, expression)


def workload_of(shell: InteractiveShell, expression: str) -> Workload:
    """Find the workload that an option names: a variable, an expression, or a TARGET string.

    Raises:
        UsageError: when it is something else.
    """
    found = model_of(shell, expression)
    if not isinstance(found, Workload):
        raise UsageError(
            f"{expression!r} is a {type(found).__name__}.",
            hint="Expected a Workload, or a TARGET such as demo:llama-decode.",
        )
    return found


def _is_target(text: str) -> bool:
    return text.endswith(".pt2") or (":" in text and not _is_expression(text))


def _resolve(target: str) -> Workload:
    from agnitra_lab.workloads.target import resolve

    build: Callable[[str], Workload] = resolve
    return build(target)


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True


def _unquoted(piece: str) -> str:
    name, separator, value = piece.partition("=") if piece.startswith("--") else ("", "", piece)
    is_quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in _QUOTES
    return f"{name}{separator}{value[1:-1] if is_quoted else value}"
