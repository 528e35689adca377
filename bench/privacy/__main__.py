"""What the measures of privacy cost and what they hold, each beside an oracle.

    python -m bench.privacy [--quick] [--only PART ...]

Each part is a module of this folder with a function `figures(quick)`, which prints what it measured and returns its figures. Without
`--quick` the figures of each part are appended to `results/privacy.jsonl` with its seconds and the machine; `--quick` measures less
and keeps nothing. A part that fails is shown with its error, its figures are null, and the command ends with 1.

The last line is one JSON object:

- `epsilon_gap`: largest difference of our epsilon from that of an oracle (Gaussian releases: dp-accounting; sampled steps: a
  second oracle of our own, with its error bounds; bar 1e-6);
- `below_oracle`: how many of our epsilons are below their oracle (bar 0);
- `noise_left`: standard deviation of what is left of the noise in a released model after the best that a reader of the run folder
  can subtract, over that of the noise (bar 1);
- `dp_step_ratio`: processor time of a step with each example clipped, over that of a plain step (bar 1.1);
- `masked_bytes_ratio`, `masked_bytes_ratio_one_side`: what a member of a masked sum of ten sends, over the plain float16 factors of
  rank 8, both sides trained and one (bars 1.5 and 0.9);
- `secure_excess_percent`: by how much the merge of summed parts is farther from the mean change than the exact merge (no bar);
- `sum_exact`: whether every opened sum was that of the plain integers (3 to 100 members, 0, 10 and 30 % lost; bar true);
- `lost_thirty_percent_seconds`: processor time to open the sum of 100 members of whom 30 are lost (s; bar 10);
- `robust_points_lost`: points of accuracy (of 100) that 20 % attackers cost at most (bar 2);
- `audit_false_alarms`, `audit_missed`: of 20 correct runs those with an estimate above epsilon, and of 20 with half the noise those
  with none above (bars 0).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from bench.privacy import accounting, audit, kills, masked_sums, noise, opened_sums, records, robust, slots
from fedloom.runs.manifest import machine_kind

RESULTS = Path(__file__).parents[2] / "results" / "privacy.jsonl"
Figures: TypeAlias = Callable[[bool], Mapping[str, object]]
PARTS: Mapping[str, tuple[Figures, tuple[str, ...]]] = {
    "accounting": (accounting.figures, ("epsilon_gap", "below_oracle")),
    "noise": (noise.figures, ("noise_left",)),
    "records": (records.figures, ("dp_step_ratio",)),
    "masked_sums": (masked_sums.figures, ("masked_bytes_ratio", "masked_bytes_ratio_one_side")),
    "slots": (slots.figures, ("secure_excess_percent",)),
    "opened_sums": (opened_sums.figures, ("sum_exact", "lost_thirty_percent_seconds")),
    "robust": (robust.figures, ("robust_points_lost",)),
    "audit": (audit.figures, ("audit_false_alarms", "audit_missed")),
    "kills": (kills.figures, ()),
}
"""Parts, and the figures of each that stand in the last line."""


def main(arguments: list[str] | None = None) -> None:
    """Print the parts one after the other, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.privacy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="measure less, and keep nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[*PARTS], default=[*PARTS], help="some parts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured, failed = measure({name: PARTS[name][0] for name in options.only}, options.quick)
    print(json.dumps({key: measured.get(key) for _, keys in PARTS.values() for key in keys}))
    if failed:
        sys.exit(1)


def measure(parts: Mapping[str, Figures], quick: bool) -> tuple[dict[str, object], list[str]]:
    """The figures of these parts, which are kept unless `quick`, and which parts failed."""
    measured, failed = dict[str, object](), list[str]()
    for name, figures_of in parts.items():
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            figures = dict(figures_of(quick))
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
            continue
        seconds = round(time.monotonic() - began, 1)
        print(f"   {seconds} s: {json.dumps(figures)}", flush=True)
        measured |= figures
        if not quick:
            line = {"part": name, "figures": figures, "seconds": seconds, "machine": machine_kind()}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return measured, failed


if __name__ == "__main__":
    main()
