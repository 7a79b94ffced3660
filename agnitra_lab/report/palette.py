"""Dark navy and electric teal: every colour has a role, and its contrast is computed, not eyeballed.

The card paints its own surface: notebooks put outputs on white or on their own dark, and neither may decide.
"""

from __future__ import annotations

SURFACE = "#0B1220"
PANEL = "#111A2E"
TEXT = "#E6F1FF"
MUTED = "#9FB3C8"
ACCENT = "#2EE6D6"
CANDIDATE = ACCENT
BASELINE = "#E69F00"
SECONDARY = "#56B4E9"
WARNING = "#FFD166"
EDGE = "#5B7499"
GRID = "#2A3B57"

TEXT_ROLES = {"text": TEXT, "muted": MUTED, "accent": ACCENT, "warning": WARNING}
DATA_ROLES = {"candidate": CANDIDATE, "baseline": BASELINE, "secondary": SECONDARY}
SURFACES = {"surface": SURFACE, "panel": PANEL}


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21.

    Args:
        first: "#RRGGBB".
        second: "#RRGGBB"; the order does not matter.

    Source: WCAG 2.2, "contrast ratio" and "relative luminance".
    """
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
