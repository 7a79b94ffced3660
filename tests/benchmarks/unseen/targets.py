"""Print the unseen workloads as targets of `agnitra suite run`, one a line: python targets.py [PART ...]."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PARTS = (
    "layers",
    "operators",
    "losses",
    "chains",
    "fusions",
    "blocks",
    "vision",
    "windows",
    "language",
    "latent",
    "decoding",
    "generative",
    "others",
    "networks",
    "published",
)


def functions(part: str) -> list[str]:
    """Return the names of a module's workloads: its public functions that are said to return one.

    Read from the source, so that a list needs no torch.
    """
    tree = ast.parse((HERE / f"{part}.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and not node.args.args
        and isinstance(node.returns, ast.Name)
        and node.returns.id == "Workload"
    ]


def targets(parts: Sequence[str] = PARTS) -> list[str]:
    """Return FILE.py:FUNCTION of each workload, with paths from the current folder where they lie below it."""
    here = HERE.resolve()
    folder = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    return [f"{folder / part}.py:{function}" for part in parts for function in functions(part)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; by default all")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}. Known: {', '.join(PARTS)}.")
    print("\n".join(targets(arguments.parts or PARTS)))


if __name__ == "__main__":
    main()
