"""Tab completion on the magics' lines: their options, and the user's names. IPython completes neither by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult
    from IPython.core.magic_arguments import MagicArgumentParser

_MAGIC_LINE = re.compile(r"(?:^|=)\s*%{1,2}(\w+)\s+(.*)$")


def line_matcher(
    parsers: Mapping[str, MagicArgumentParser], namespace: Callable[[], Iterable[str]]
) -> Callable[[CompletionContext], SimpleMatcherResult]:
    """Make a matcher (API version 2) that completes option names, values of fixed choices, and the user's names.

    Args:
        parsers: magic name without "%" -> its parser.
        namespace: gives the user's names, for the expressions of a line.
    """
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher(identifier="agnitra_lab_options")
    def match(context: CompletionContext) -> SimpleMatcherResult:
        found = _MAGIC_LINE.search(context.line_with_cursor[: context.cursor_position])
        parser = parsers.get(found.group(1)) if found else None
        if found is None or parser is None:
            return {"completions": []}
        texts = _texts(parser, found.group(2).split(" "), namespace)
        completions = [SimpleCompletion(text, type="magic") for text in texts if text.startswith(context.token)]
        return {"completions": completions, "suppress": bool(completions)}

    return match


def _texts(parser: MagicArgumentParser, words: list[str], namespace: Callable[[], Iterable[str]]) -> list[str]:
    options: dict[str, Any] = {
        name: action for action in parser._actions for name in action.option_strings if name.startswith("--")
    }
    last = words[-1]
    before = options.get(words[-2]) if len(words) > 1 else None
    if before is not None and before.choices:
        return [str(choice) for choice in before.choices if str(choice).startswith(last)]
    if last.startswith("-"):
        return sorted(name for name in options if name.startswith(last) and name not in words)
    takes_code = any(not action.option_strings for action in parser._actions) or before is not None
    return sorted(name for name in namespace() if last and name.startswith(last)) if takes_code else []
