"""Draw the top of a run's report card (verdict, metric cards, charts, candidates), or a profile card, for the README.

    python tests/benchmarks/render_card.py --report artifacts/reports/<topic>/<run>/report.json --out card.png
    python tests/benchmarks/render_card.py --telemetry artifacts/profiles/<topic>/<run>/telemetry.json --out profile.png

Chromium draws it, headless and offline: once to learn the height, once for the picture, so nothing is cut.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from agnitra_lab.contracts.report import Report
from agnitra_lab.contracts.telemetry import TelemetryRecord
from agnitra_lab.notebook.profile_card import profile_card_html
from agnitra_lab.report.card import card_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--default-background-color=00000000",
)  # fmt: skip
MAX_HEIGHT = 4000
TIMEOUT_S = 120
# The candidates are the card's first box with a table; what follows is left out, and so is the space before it.
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0 }} body > div {{ padding-bottom: 14px !important }}
body > div > div:has(table) ~ * {{ display: none !important }}
</style>{card}<script>document.title = Math.ceil(document.body.getBoundingClientRect().height)</script>"""

WHOLE_PAGE = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style>{card}
<script>document.title = Math.ceil(document.body.getBoundingClientRect().height)</script>"""


def main() -> int:
    """Draw the card of a report or of a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--report", type=Path, help="report.json of a finished run")
    source.add_argument("--telemetry", type=Path, help="telemetry.json of a finished profile")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--width", type=int, default=900, help="CSS pixels, at least 500")
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"No browser on PATH (looked for {', '.join(BROWSERS)}): install Chromium.", file=sys.stderr)
        return 1
    if arguments.report is not None:
        html = PAGE.format(card=card_html(Report.from_json(arguments.report.read_text(encoding="utf-8"))))
    else:
        record = TelemetryRecord.from_json(arguments.telemetry.read_text(encoding="utf-8"))
        html = WHOLE_PAGE.format(card=profile_card_html(record))
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "card.html"), Path(folder, "card.png")
        page.write_text(html, encoding="utf-8")
        document = draw(browser, page, arguments.width, MAX_HEIGHT, "--dump-dom")
        height = re.search(r"<title>(\d+)</title>", document)
        if height is None:
            print(f"{browser} did not lay the card out: run it by hand on a page to see why.", file=sys.stderr)
            return 1
        draw(browser, page, arguments.width, int(height[1]), f"--screenshot={picture}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, arguments.out)
    print(f"{arguments.out}: {arguments.width} x {height[1]} px, {arguments.out.stat().st_size:,} bytes")
    return 0


def draw(browser: str, page: Path, width: int, height: int, what: str) -> str:
    """Run the browser once on the page, in a window of that size; return what it wrote."""
    sandbox = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, *FLAGS, *sandbox, profile, f"--window-size={width},{height}", what, page.as_uri()]
    return subprocess.run(command, check=True, timeout=TIMEOUT_S, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
