"""One escaping builder for all HTML: text becomes markup here and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Html | None
_VOID = {"img", "meta", "br", "hr", "wbr"}


def escape(text: str) -> Html:
    """Escape text for content and quoted attributes; control characters other than newline and tab are dropped."""
    # A report's JSON is hundreds of kilobytes of a hundred different characters.
    hidden = {ord(c): None for c in set(text) if c not in "\n\t" and not c.isprintable()}
    return Html(html.escape(text.translate(hidden) if hidden else text, quote=True))


def join(children: Iterable[Child]) -> Html:
    """Put pieces one after the other; plain text is escaped, None left out."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """Build an element.

    Args:
        name: element name.
        children: escaped unless they are `Html`.
        attributes: a trailing underscore is dropped and others become dashes; True gives a bare attribute, None and
            False none.
    """
    parts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(attribute)
        elif value is not None and value is not False:
            parts.append(f'{attribute}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")
