"""Write what results say into the pages that say it: python experiments/tables.py [--check]

What stands between one of these marks and `<!-- end -->` is made from results:

- `<!-- table NAME [PATTERN ...] -->`: the table of results/NAME.jsonl, of the cells that fit one of the patterns (all, without one);
- `<!-- table archive/NAME ... -->`: the same of results/archive/NAME.jsonl, with the commit that made them: history;
- `<!-- claims PAPER -->`: a row for each claim of a paper that an experiment judges, with its interval and its verdict; with
  `claims PAPER, decided` or `claims PAPER, not decided` of these alone;
- `<!-- claim NAME -->`: the figures and the verdict of one claim, inside a sentence.

`--check` changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

from claims import OPEN, Claim, judged
from grid import Grid, Line, archived, current, made_by, rows_of

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ("hlora_llm", "fedfa_speed", "fedfa_llm", "hierfedlora_llm", "cllora_llm", "all_four")
"""Those that judge claims."""
BLOCK = re.compile(r"<!-- (table|claims|claim) ([^>]+) -->.*?<!-- end -->", re.S)


def pages() -> Iterator[Path]:
    """The pages of the repository."""
    yield ROOT / "README.md"
    yield from sorted(ROOT.glob("docs/**/*.md"))
    yield from sorted(ROOT.glob("experiments/*.md"))


def block(match: re.Match[str]) -> str:
    """The block with what stands in it made anew."""
    kind, about = match[1], match[2]
    if kind == "claim":
        claim, line = judged_claims()[about]
        return f"<!-- claim {about} -->{figures(claim, line)}: {line['verdict']}<!-- end -->"
    made = claims_table(about) if kind == "claims" else results_table(about)
    return f"<!-- {kind} {about} -->\n{made}\n<!-- end -->"


def results_table(about: str) -> str:
    """The table of an experiment's results; `about` is its name and patterns of cells."""
    name, *patterns = about.split()
    history, name = name.startswith("archive/"), name.removeprefix("archive/")
    grid: Grid = import_module(name).GRID
    cells = [cell for cell in grid.cells if any(fnmatch.fnmatch(cell, pattern) for pattern in patterns or ["*"])]
    table = (grid.table or rows_of)(archived(grid) if history else current(grid), cells, grid.target)
    return f"{table}\n\nHistory: made by an earlier version (commit {made_by(grid)})." if history else table


@cache
def judged_claims() -> dict[str, tuple[Claim, Line]]:
    """Every claim of every experiment by name, with its line of figures and verdict."""
    found = dict[str, tuple[Claim, Line]]()
    for name in EXPERIMENTS:
        grid: Grid = import_module(name).GRID
        own = grid.claims(current(grid)) if grid.claims else ()
        if twice := [claim.name for claim in own if claim.name in found]:
            raise ValueError(f"two claims are called {twice[0]}")
        found |= {claim.name: (claim, line) for claim, line in zip(own, judged(own), strict=True)}
    return found


def claims_table(about: str) -> str:
    """A row for each claim of a paper; of all, of those that are decided, or of those that are not."""
    paper, _, kind = about.partition(", ")
    rows = [
        "| claim | what was done | seeds | mean [95 % interval] | after Holm | verdict |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {claim.says} | {claim.done} | {claim.seeds} | {figures(claim, line)} | {ends(line['corrected'])} | {line['verdict']} |"
        for claim, line in judged_claims().values()
        if claim.paper == paper and kind in ("", OPEN if line["verdict"] == OPEN else "decided")
    ]
    return "\n".join(rows) if len(rows) > 2 else "None so far."


def figures(claim: Claim, line: Line) -> str:
    """The mean of a claim's figures and its interval."""
    if line["estimate"] is None:
        return "no results"
    mean = f"{line['estimate']:.3g} times" if claim.times else f"{line['estimate']:+.3g} {claim.unit}"
    return f"{mean} {ends((line['low'], line['high']))}"


def ends(interval: tuple[float | None, float | None] | None) -> str:
    """The two ends of an interval."""
    low, high = interval or (None, None)
    return "–" if low is None or high is None else f"[{low:.3g}, {high:.3g}]"


def out_of_date(write: bool = False) -> list[str]:
    """The pages that do not say what the results say; written anew, if that is wanted."""
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(block, text)
        if new != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if write:
                page.write_text(new, encoding="utf-8")
    return stale


def main() -> None:
    """Write all pages, or check them."""
    check = "--check" in sys.argv
    stale = out_of_date(write=not check)
    if stale and check:
        sys.exit(f"out of date, run python experiments/tables.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
