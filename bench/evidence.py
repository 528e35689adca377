"""What the experiments have decided: every claim with its interval and verdict, and whether all pages say what the results say.

    python -m bench.evidence [--write]

Reads `results/` and trains nothing. `docs/evidence.md` has the claims of each paper in a table; with `--write` it, and every other
page that shows results, is written anew (as by `python experiments/tables.py`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import tables
from claims import OPEN

FEWEST = 3
"""Seeds that a claim needs at least."""


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each claim, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.evidence", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages that are out of date")
    write = parser.parse_args(arguments).write
    judged = tables.judged_claims().values()
    for claim, line in judged:
        print(f"{claim.paper:12s} {claim.name:40s} {tables.figures(claim, line):40s} {line['verdict']}")
    if write:
        tables.out_of_date(write=True)
    stale = tables.out_of_date()
    for page in stale:
        print(f"{page} is out of date: python -m bench.evidence --write")
    print(json.dumps({**counts(line for _, line in judged), "tables_out_of_date": len(stale)}))


def counts(lines: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many claims there are, and of how many the evidence is weak or missing."""
    lines = [*lines]
    return {
        "claims": len(lines),
        "decided": sum(line["verdict"] != OPEN for line in lines),
        "claims_on_fewer_than_3_seeds": sum(line["seeds"] < FEWEST for line in lines),
        "intervals_missing": sum(line["low"] is None for line in lines),
    }


if __name__ == "__main__":
    main()
