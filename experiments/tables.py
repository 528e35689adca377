"""Write the tables of results into the pages that show them: python experiments/tables.py [--check]

A page holds `<!-- table NAME [PATTERN ...] -->` ... `<!-- end -->`; what stands between is made from results/NAME.jsonl, of the
cells that fit one of the patterns (all, without one). Below it stands which commit made results of an earlier version. `--check`
changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from importlib import import_module
from pathlib import Path

from grid import Grid, current, made_by, rows_of

ROOT = Path(__file__).parents[1]
PAGES = (*ROOT.glob("experiments/*.md"), *ROOT.glob("docs/results/*.md"))
BLOCK = re.compile(r"<!-- table (\w+)((?: \S+)*) -->\n.*?<!-- end -->", re.S)


def block(match: re.Match[str]) -> str:
    """The block with its table made anew."""
    name, patterns = match[1], match[2].split() or ["*"]
    grid: Grid = import_module(name).GRID
    cells = [cell for cell in grid.cells if any(fnmatch.fnmatch(cell, pattern) for pattern in patterns)]
    table = (grid.table or rows_of)(current(grid), cells, grid.target)
    return f"<!-- table {name}{match[2]} -->\n{table}\n{age(grid)}<!-- end -->"


def age(grid: Grid) -> str:
    """A sentence on results of an earlier version; empty where they are of this one."""
    commit = made_by(grid)
    again = "which drew batches and held-out rows otherwise; run again, the figures differ."
    return f"\nMade by an earlier version (commit {commit}), {again}\n" if commit else ""


def main() -> None:
    """Write all pages, or check them."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(block, text)
        if new != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run python experiments/tables.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
