"""The Typer application, and how failures become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from agnitra_lab.errors import AgnitraError, MissingError
from agnitra_lab.redact import redact_text

CANCELLED = 130
_CANCELLED_TEXT = "Cancelled. The run it was writing has no manifest and reads as incomplete."

# Typer carries click under its own name from 0.26 on; before, it was the click package.
_BadCommandLine: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if issubclass(base, Exception) and base.__name__ == "ClickException"
)

app = typer.Typer(
    name="agnitra",
    help="Find what burns GPU time, make it faster with proof that the answers are still right, and get the receipt.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(*, exits: bool = True) -> int:
    """Run the shell command of `sys.argv`.

    Args:
        exits: leave the process with the exit code; otherwise return it.
    """
    code = _run()
    if exits:
        sys.stdout.flush()
        sys.exit(code)
    return code


def _run() -> int:
    try:
        result = app(standalone_mode=False, prog_name="agnitra")
        code = result if isinstance(result, int) else 0
        if code == CANCELLED:
            # Typer turns Ctrl-C into this code by itself, and says nothing.
            _complain(_CANCELLED_TEXT)
        return code
    except AgnitraError as error:
        _complain(str(error))
        return error.exit_code
    except _BadCommandLine as error:
        _complain(f"{error.format_message()} See: agnitra --help")  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _complain(_CANCELLED_TEXT)
        return CANCELLED
    except ModuleNotFoundError as error:
        name = (error.name or "a package").partition(".")[0]
        _complain(f"{name} is needed for this command, and is not installed. Install it: pip install {name}")
        return MissingError.exit_code
    except BrokenPipeError:
        # `agnitra runs | head`: the reader went away, which is no failure; nothing more may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("AGNITRA_DEBUG"):
            traceback.print_exc()
        text = " ".join(str(error).split())[:600]
        _complain(f"{type(error).__name__}: {text} (set AGNITRA_DEBUG=1 for the traceback)")
        return 1


def _complain(text: str) -> None:
    sys.stderr.write(f"agnitra: {redact_text(text)}\n")


# Commands register themselves on `app`; they import torch and plotly only when they run.
from agnitra_lab.cli import (  # noqa: E402
    dashboard_commands,  # noqa: F401
    landscape_commands,  # noqa: F401
    loop_commands,  # noqa: F401
    refine_commands,  # noqa: F401
    run_commands,  # noqa: F401
    suggest_commands,  # noqa: F401
    suite_commands,  # noqa: F401
)
