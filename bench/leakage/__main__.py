"""What a server that follows the protocol learns from a site's answers, by setting.

    python -m bench.leakage [--only NAME ...] [--seeds N]
    python -m bench.leakage --quick
    python -m bench.leakage --table

Clients hold rows of AG News (about 50 tokens each, cut at 64) and train all-MiniLM-L6-v2 with LoRA on query and value, AdamW,
dropout, and the default codec both ways. The server has the base, what it sent, what came back and 1,500 public rows; batches and
dropout are drawn from a secret that it does not have, unless a setting gives it. Four kinds of attack: `words` (which rarer words
stand in the rows), `places` (which word at which place), `rows` (was this row, or this planted text, trained on), `labels` (in which
shares). Beside each stands what is known without the answer.

Without flags the missing cells are measured, seed by seed, and appended to `results/leakage.jsonl`. `--quick` summarises what is
kept and measures one cell again. `--table` writes the table of `docs/leakage.md`. The last line is one JSON object, of means over the
seeds at the default limits and the usual learning rate, in the setting that tells most:

- `words_over_prior`: share of the ten surest words that is right, less that of the prior (bar 0.1);
- `canary_auc`: chance that a client with a planted text is told from one without (bar 0.70); 0.5 is nothing;
- `membership_shift`, `membership_lira`: the same for ordinary rows (bar 0.60);
- `median_place`: place of the right token among all 30,522 (bar 5,000 or more);
- `label_correlation`: of the change of the head's bias with the shares of labels (no bar);
- `reproduces`: whether the cell that was measured again has the kept figures (null: not measured).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch

from bench.leakage.cells import CELLS, QUICK, Cell
from bench.leakage.page import PAGE, RESULTS, Line, kept_lines, summary, table_lines, with_table
from bench.leakage.scene import AGNEWS, Scene, agnews_scene
from fedloom.runs.manifest import machine_kind

TOLERANCE = 0.02
"""By how much a figure may differ on another kind of machine; on the same kind it should not differ at all."""


def main(arguments: list[str] | None = None) -> None:
    """Measure or summarise; print the table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.leakage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="measure one cell again, and summarise what is kept")
    parser.add_argument("--table", action="store_true", help=f"write the table of {PAGE.name} from what is kept")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*CELLS], default=[*CELLS], help="some cells")
    parser.add_argument("--seeds", type=int, metavar="N", default=5, help="the first N seeds (default 5)")
    options = parser.parse_args(arguments)
    if options.table:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), kept_lines()), encoding="utf-8")
        return
    if not AGNEWS.exists():
        parser.exit(2, f"the sample of AG News is missing: put it at {AGNEWS} (columns idx, label, text, by tabs)\n")
    torch.set_num_threads(1)
    if options.quick:
        same = reproduces(kept_lines())
    else:
        same = None
        measure_missing(options.only, options.seeds)
    print("\n".join(table_lines(kept_lines())))
    print(json.dumps(summary(kept_lines()) | {"reproduces": same}))


def measure_missing(names: Sequence[str], seeds: int) -> None:
    """Measure cells that are not kept, first those of the default limits, and append each as it comes."""
    have = {(line["cell"], line["seed"]) for line in kept_lines()}
    for ordinary in (True, False):
        for seed in range(seeds):
            scenes: dict[float, Scene] = {}
            for name in names:
                cell = CELLS[name]
                if cell.ordinary is not ordinary or seed >= cell.seeds or (name, seed) in have:
                    continue
                if cell.dropout not in scenes:
                    scenes = {cell.dropout: agnews_scene(seed, cell.dropout)}  # one at a time in memory
                line = line_of(name, cell, scenes[cell.dropout])
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name}, seed {seed}: {line['seconds']} s", flush=True)


def line_of(name: str, cell: Cell, scene: Scene) -> Line:
    """Measure a cell; its line of the results."""
    began = time.process_time()
    figures = {key: round(value, 4) for key, value in cell.measure(scene).items()}
    seconds = round(time.process_time() - began, 1)
    return {
        "cell": name,
        "seed": scene.seed,
        "setting": cell.facts,
        "figures": figures,
        "seconds": seconds,
        "machine": machine_kind(),
    }


def reproduces(lines: Sequence[Line]) -> bool | None:
    """Measure one kept cell again; whether its figures are the same (None: it is not kept)."""
    kept = next((line for line in lines if line["cell"] == QUICK), None)
    if kept is None:
        return None
    again = line_of(QUICK, CELLS[QUICK], agnews_scene(kept["seed"], CELLS[QUICK].dropout))["figures"]
    gaps = {name: abs(again[name] - value) for name, value in kept["figures"].items()}
    print(f"{QUICK}, seed {kept['seed']}, measured again: largest difference {max(gaps.values()):.4f}")
    return bool(max(gaps.values()) <= TOLERANCE)


if __name__ == "__main__":
    main()
