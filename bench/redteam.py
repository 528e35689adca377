"""Attacks on a site, a server, the wire and files: what came of each, and of its control, in which what stops it is lifted.

    python -m bench.redteam [--quick]

Each attack of `tests/attacks/every_attack.py` is tried twice. It must fail against the defaults, and succeed in its control. What
came of all is written to `results/redteam.jsonl`; `--quick` tries those that start no processes again, and takes the others, and
the figures of the network, from there.

The last line is one JSON object:

- `attacks`: how many there are;
- `succeeded`: how many succeeded against the defaults (bar 0);
- `controls_failed`: how many failed although their limit was lifted: such a test is blind (bar 0);
- `texts_recovered`, `labels_recovered`: texts and labels of a site that a server read at the default limits (bar 0);
- `weight_of_a_liar`: points of accuracy (of 100) that one of six sites costs, which lies about its examples, at registration and in
  its answers, and turns its change round, under `Rounds` with the canary on: the mean of five seeds, of that of five sizes of the
  change which costs most (bar 5); `liar_worst_seed`: its worst seed;
- `locked_out_seconds`: until a site is answered under 2,000 idle connections, with TLS or without (bar 10);
- `memory_growth_mb`: of the gate under ten bodies of 57 MB by somebody without a key (bar 64);
- `reproduces`: whether what was tried again came out as it is kept, and all attacks are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.runs.manifest import machine_kind
from tests.attacks import network
from tests.attacks.attack import Attack
from tests.attacks.every_attack import ATTACKS
from tests.attacks.liars import weight_of_a_liar
from tests.support.tiny_models import hush, settle

RESULTS = Path(__file__).parents[1] / "results" / "redteam.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """What came of an attack.

    Fields:
        kind: what attacks what.
        attack: what is tried.
        outcome: against the defaults: what it read, or 1; 0 where it failed.
        control: the same with the limit lifted.
        reads: what is counted: "texts", "labels" or nothing.
        error: the error by which it ended ("": none); its outcomes count as a success and a failed control.
        seconds: of both (s).
    """

    kind: str
    attack: str
    outcome: int
    control: int
    reads: str = ""
    error: str = ""
    seconds: float = 0.0


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each attack, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.redteam", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="try again only what starts no processes; keep nothing")
    options = parser.parse_args(arguments)
    rows, liar = tried_here()
    kept, figures = read_results() if options.quick else ([], {})
    if options.quick:
        again = {(row.kind, row.attack): (row.outcome, row.control) for row in rows}
        before = {(row.kind, row.attack): (row.outcome, row.control) for row in kept}
        rows += [row for row in kept if (row.kind, row.attack) in {(kind, one.name) for kind, one in every(True)}]
        same = before.keys() == {(kind, one.name) for kind, one in every()} and again.items() <= before.items()
    else:
        rows += tried_with_processes()
        figures, same = network_figures(), True
        write_results(rows, figures)
    places = [(kind, one.name) for kind, one in every()]
    rows.sort(key=lambda row: places.index((row.kind, row.attack)))
    print_rows(rows)
    print(json.dumps(summary(rows, liar, figures) | {"reproduces": same}))


def every(processes: bool | None = None) -> list[tuple[str, Attack]]:
    """All attacks, or those that start processes, or that start none."""
    listed = [(kind, one) for kind, attacks in ATTACKS.items() for one in attacks]
    return [(kind, one) for kind, one in listed if processes is None or one.processes is processes]


def tried_here() -> tuple[list[Row], Sequence[float]]:
    """What came of the attacks without processes, and what a liar costs, by seed; on all processors."""
    names = [(kind, one.name) for kind, one in every(False)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=begin) as pool:
        liar = pool.submit(weight_of_a_liar)
        return [*pool.map(tried_by_name, *zip(*names, strict=True))], liar.result()


def begin() -> None:
    """Prepare a process: one thread, no messages of libraries."""
    settle()
    hush()


def tried_by_name(kind: str, name: str) -> Row:
    """What came of the attack of this name."""
    return tried(kind, next(one for one in ATTACKS[kind] if one.name == name))


def tried(kind: str, attack: Attack) -> Row:
    """What came of an attack and its control, each in an empty folder."""
    found, error, began = [1, 0], "", time.monotonic()
    for number in range(2):
        with tempfile.TemporaryDirectory(prefix="redteam-") as place:
            try:
                found[number] = int(attack.run(Path(place), bool(number)))
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"[:200]
    return Row(kind, attack.name, found[0], found[1], attack.reads, error, round(time.monotonic() - began, 1))


def tried_with_processes() -> list[Row]:
    """What came of the attacks that start processes, one after the other: memory and seconds are measured."""
    begin()
    return [tried(kind, one) for kind, one in every(True)]


def network_figures() -> Mapping[str, float]:
    """How long a site is locked out by idle connections (s), and what bodies without a key cost the gate (MB)."""
    with tempfile.TemporaryDirectory(prefix="redteam-") as made:
        place = Path(made)
        idle = network.idle_connections(place / "idle", network.LIMITS)
        silent = network.silent_connections(place / "silent", network.LIMITS)
        bodies = network.bodies_without_key(place / "bodies", network.LIMITS)
    return {
        "locked_out_seconds": round(max(idle.locked_out_seconds, silent.locked_out_seconds), 2),
        "memory_growth_mb": round(bodies.memory_growth_mb, 1),
    }


# What is kept ----------------------------------------------------------------------------------------------------------


def write_results(rows: Sequence[Row], figures: Mapping[str, float]) -> None:
    """Write a line for the figures of the network, with version and machine, and one for each attack."""
    about = {"version": version("fedloom"), "machine": machine_kind()}
    lines: Iterator[Mapping[str, Any]] = iter([{"figures": figures, **about}, *map(asdict, rows)])
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_results() -> tuple[list[Row], Mapping[str, float]]:
    """The attacks and the figures of the network that were kept."""
    first, *lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return [Row(**line) for line in lines], first["figures"]


# What is shown ---------------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table with a line for each attack."""
    kind = ""
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            print(f"\n{kind:76s}  outcome   control")
        counted = f" ({row.control} {row.reads})" if row.reads else ""
        outcome = f"{row.outcome} {row.reads}" if row.outcome and row.reads else "SUCCEEDS" if row.outcome else "fails"
        print(
            f"  {row.attack:74s}  {outcome:8s}  {'succeeds' if row.control else 'FAILS'}{counted}  {row.error}".rstrip()
        )
    print()


def summary(rows: Sequence[Row], liar: Sequence[float], figures: Mapping[str, float]) -> dict[str, object]:
    """The figures of the last line."""
    points = [100 * one for one in liar]
    print(f"A liar costs {fmean(points):.1f} points of accuracy, by seed {', '.join(f'{one:.1f}' for one in points)}")
    return {
        "attacks": len(rows),
        "succeeded": sum(row.outcome > 0 for row in rows),
        "controls_failed": sum(row.control == 0 for row in rows),
        **{f"{what}_recovered": sum(row.outcome for row in rows if row.reads == what) for what in ("texts", "labels")},
        "weight_of_a_liar": round(fmean(points), 1),
        "liar_worst_seed": round(max(points), 1),
        **figures,
    }


if __name__ == "__main__":
    main()
